"""The sampler: checks its arguments and runs one compiled program for each decode mode."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from diffusiongemma.models.arrays import AnyArray, Array, Params
from diffusiongemma.models.cache import KVCache
from diffusiongemma.sampling import autoregressive, diffusion, lossless, passes
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.sampling.controls import Controls, is_integer, is_known
from diffusiongemma.sampling.drafter import LosslessState, draft_length
from diffusiongemma.sampling.finite import are_finite, check_finite
from diffusiongemma.sampling.interface import CausalModel, check_model, light_config, traits
from diffusiongemma.sampling.prompts import check_fits, check_prompts
from diffusiongemma.sampling.randomness import row_keys, typed_key
from diffusiongemma.sampling.rows import map_but
from diffusiongemma.sampling.state import GenerationState, SamplerOutput

_STATIC = ('model', 'config')

State = GenerationState | LosslessState  # the carry of the outer loop
Arguments = tuple[jax.Array, jax.Array, jax.Array, Controls]  # the result of `Sampler.checked`
OneState = TypeVar('OneState', GenerationState, LosslessState)


@dataclasses.dataclass(frozen=True)
class Mode(Generic[OneState]):
    """The compiled functions of a decode mode.

    Attributes:
      generate: computes the output from prompts.
      start: computes the state before the first block, with the arguments of `prefilled`. With a
        `capacity`, the shapes of the state do not depend on the width of the prompts, so rows of
        one state can replace rows of another. If a cache is passed, `whole` contains the prompts
        [B, P] and lengths [B] including the cached tokens, which draft lookups search.
      advance: decodes one block of every unfinished row. It donates the buffers of the state, so
        the K/V cache is not copied.
      until_one_finishes: decodes blocks until another row has finished; it also donates the state.
    """

    generate: Callable[..., SamplerOutput]
    start: Callable[..., OneState]
    advance: Callable[..., OneState]
    until_one_finishes: Callable[..., OneState]


def _compiled(first: Callable[..., OneState], advance: Callable[..., OneState]) -> Mode[OneState]:
    """Compiles a mode: `first` takes the results of `prefilled`, `advance` decodes one block."""

    def start(
        model: CausalModel,
        config: SamplingConfig,
        params: Params,
        *prompts: Any,
        whole: tuple[Int[Array, 'B P'], Int[Array, ' B']] | None = None,
        capacity: int | None = None,
    ) -> OneState:
        prepared = prefilled(model, config, params, *prompts, capacity=capacity)
        tokens, lengths = prompts[:2] if whole is None else whole
        if capacity is not None:
            padding = ((0, 0), (0, capacity - tokens.shape[1]))
            tokens = jnp.pad(tokens, padding, constant_values=config.pad_id)
        return first(model, config, params, *prepared, tokens, lengths)

    def generate(
        model: CausalModel, config: SamplingConfig, params: Params, *prompts: Any
    ) -> SamplerOutput:
        state = jax.lax.while_loop(
            lambda state: state.running,
            functools.partial(advance, model, config, params),
            start(model, config, params, *prompts),
        )
        return state.output()

    def until_one_finishes(
        model: CausalModel, config: SamplingConfig, params: Params, state: OneState
    ) -> OneState:
        before = state.finished
        return jax.lax.while_loop(
            lambda state: state.running & jnp.all(state.finished == before),
            functools.partial(advance, model, config, params),
            state,
        )

    return Mode(
        generate=jax.jit(generate, static_argnames=_STATIC),
        start=jax.jit(start, static_argnames=(*_STATIC, 'capacity')),
        advance=jax.jit(advance, static_argnames=_STATIC, donate_argnames='state'),
        until_one_finishes=jax.jit(
            until_one_finishes, static_argnames=_STATIC, donate_argnames='state'
        ),
    )


def prefilled(
    model: CausalModel,
    config: SamplingConfig,
    params: Params,
    tokens: Int[Array, 'B P'],
    lengths: Int[Array, ' B'],
    rng: jax.Array,
    controls: Controls,
    cache: KVCache | None = None,
    *,
    capacity: int | None = None,
) -> tuple[GenerationState, Float[Array, 'B D']]:
    """Encodes the prompts.

    Args:
      model, config: those of the sampler.
      params, tokens, lengths, rng, controls: the arguments of a call of the sampler.
      cache: a cache to append the prompts to, with room for the responses; None for a new one.
      capacity: the number of tokens per row of a new cache; None for P + max_new_tokens.

    Returns:
      The state with empty responses, and the hidden states [B, D] of the last prompt tokens.
    """
    is_empty = cache is None
    if cache is None:
        capacity = capacity or tokens.shape[1] + config.max_new_tokens
        cache = passes.empty_cache(model, params, tokens.shape[0], capacity)
    hidden, cache = passes.prefill(
        model, params, cache, tokens, lengths, config.prefill_chunk, is_empty=is_empty
    )
    last_token = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    keys = row_keys(rng, tokens.shape[0])
    state = GenerationState.create(config, cache, last_token, keys, controls)
    return state.finish_unless(are_finite(hidden), 'prefill'), hidden


DIFFUSION = _compiled(diffusion.start, diffusion.next_canvas)
AUTOREGRESSIVE = _compiled(autoregressive.start, autoregressive.next_token)
LOSSLESS = _compiled(lossless.start, lossless.next_draft)
MODES: dict[str, Mode[GenerationState] | Mode[LosslessState]] = {
    'diffusion': DIFFUSION,
    'autoregressive': AUTOREGRESSIVE,
    'lossless': LOSSLESS,
}


def main_mode(model: CausalModel) -> str:
    """Returns the decode mode that a model was trained for."""
    if not traits(model).canvas_length:
        return 'autoregressive'
    return 'diffusion' if light_config(model) is None else 'lossless'


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler that generates responses to a batch of prompts.

        sampler = Sampler(model, SamplingConfig.for_tokenizer(tokenizer, max_new_tokens=512))
        tokens, lengths = pad_prompts([tokenizer.format_prompt('Hello')], tokenizer.pad_id)
        output = sampler(params, tokens, lengths, rng=jax.random.key(0))

    It compiles once for each shape of `tokens` and may be called inside another `jax.jit`.
    The tokens of a row only depend on its prompt and its key, not on other rows.

    Attributes:
      model: a flax module with the passes of `DenoisingModel`; for the autoregressive mode, those
        of `CausalModel` are sufficient.
      config: the sampling settings.
      mode: 'diffusion'; 'autoregressive', the baseline with the encode pass; or 'lossless', with
        exactly the output distribution of the autoregressive mode: canvases are drafts that the
        causal pass verifies.
    """

    model: CausalModel
    config: SamplingConfig = SamplingConfig()
    mode: str = 'diffusion'

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f'mode must be one of {sorted(MODES)}, got {self.mode!r}.')
        check_model(self.model)
        has_drafts = self.mode == 'lossless' and self.config.drafts is not None
        canvas_length = traits(self.model).canvas_length
        if self.mode != 'autoregressive' and not (has_drafts or canvas_length):
            raise ValueError(
                f'mode {self.mode!r} needs a model with a canvas, but canvas_length of this '
                f"{type(self.model).__name__} is 0; set it in its config, or mode='autoregressive'."
            )
        light = light_config(self.model) if canvas_length else None
        if self.mode == 'diffusion' and light is not None:
            raise ValueError(
                'a light denoiser only drafts; the teacher has to verify its drafts: use '
                "mode='lossless', or a student with a 'shared' or 'separate' denoiser."
            )
        if self.mode == 'diffusion' and self.config.logprobs is not None:
            raise ValueError(
                "logprobs need a causal pass over the tokens, which mode='diffusion' does not "
                "take: its tokens come from many denoise steps. Use mode='lossless' or "
                "'autoregressive'."
            )
        for name in ('draft_length', 'model_draft_length'):
            if (getattr(self.config, name) or 0) > canvas_length > 0:
                raise ValueError(
                    f'{name}={getattr(self.config, name)} is longer than the canvas of '
                    f'{canvas_length} tokens that the model was trained with.'
                )
        vocab_size = self.model.config.vocab_size
        if (self.config.logprobs or 0) > vocab_size:
            raise ValueError(
                f'logprobs={self.config.logprobs} asks for more tokens per position than the '
                f'{vocab_size} of the model; lower it.'
            )
        ids = (self.config.pad_id, *self.config.stop_ids)
        if max(ids) >= vocab_size or (self.config.vocab_size or 0) > vocab_size:
            raise ValueError(
                f'The model knows {vocab_size} tokens, but the sampling config has '
                f'pad_id={self.config.pad_id}, stop_ids={self.config.stop_ids}, '
                f'vocab_size={self.config.vocab_size}. Is it for another tokenizer?'
            )

    def __call__(
        self,
        params: Params,
        tokens: AnyArray,
        lengths: AnyArray,
        *,
        rng: jax.Array,
        controls: Controls | None = None,
    ) -> SamplerOutput:
        """Generates until every row has a stop token or max_new_tokens tokens.

        Args:
          params: the parameters of the model.
          tokens: [B, P] integer prompts, right-padded (see `pad_prompts`).
          lengths: [B] integer, the prompt lengths.
          rng: one key, of which row r uses `fold_in(rng, r)`, or one key per row [B].
          controls: settings and constraints of the rows, or None.

        Returns:
          The tokens [B, max_new_tokens], their lengths and the number of passes.

        Raises:
          ValueError: if shapes, types, lengths, token ids, keys or controls are invalid. Inside
            another jit, values of traced arrays are not checked.
          FloatingPointError: if logits are NaN or infinite; the message names the pass and the
            row. Inside another jit, `failed_pass` of the output contains this instead.
        """
        arguments = self.checked(tokens, lengths, rng, controls)
        output = MODES[self.mode].generate(self.model, self.config, params, *arguments)
        check_finite(output.failed_pass)
        return output

    def stream(
        self,
        params: Params,
        tokens: AnyArray,
        lengths: AnyArray,
        *,
        rng: jax.Array,
        controls: Controls | None = None,
    ) -> Iterator[SamplerOutput]:
        """Yields the output of every canvas immediately, with the arguments and errors of a call.

        In each output, `tokens` is [B, C] ([B, 1] in the autoregressive mode; narrower if
        max_new_tokens leaves less room), and `lengths` is the number of these tokens that belong to
        the response: 0 for rows that finished earlier. The concatenated tokens of a row equal those
        of a call with the same arguments, and the counts add up to its counts.
        """
        return self._stream(params, self.checked(tokens, lengths, rng, controls))

    def _stream(self, params: Params, arguments: Arguments) -> Iterator[SamplerOutput]:
        block = 1
        if self.mode == 'lossless':
            block = draft_length(self.model, self.config) + 1
        elif self.mode == 'diffusion':
            block = traits(self.model).canvas_length
        mode, before = MODES[self.mode], None
        # `advance` donates the state, which would otherwise contain arrays of the caller.
        arguments = jax.tree.map(jnp.copy, arguments)
        state: State = mode.start(self.model, self.config, params, *arguments)
        while True:
            after = jax.tree.map(jnp.copy, state.output())
            check_finite(after.failed_pass)
            if before is None:
                before = jax.tree.map(jnp.zeros_like, after)
            if jnp.any(after.lengths > before.lengths):
                yield self._difference(before, after, block)
                before = after
            if not state.running:
                return
            state = mode.advance(self.model, self.config, params, state)

    def _difference(self, before: SamplerOutput, after: SamplerOutput, block: int) -> SamplerOutput:
        """Returns the new tokens [B, <= block], right-padded, and the increase of all counts."""
        limit = after.tokens.shape[1]
        has_more = after.lengths > before.lengths
        width = min(block, limit - int(jnp.min(jnp.where(has_more, before.lengths, limit - 1))))
        slots = before.lengths[:, None] + jnp.arange(width)  # [B, width]
        rows = jnp.arange(len(slots))[:, None]

        def latest(leaf: jax.Array) -> jax.Array:
            return leaf[rows, jnp.minimum(slots, limit - 1)]  # [B, width, ...]

        tokens = latest(jnp.asarray(after.tokens))
        return map_but(
            jnp.subtract,
            after,
            before,
            tokens=jnp.where(slots < after.lengths[:, None], tokens, self.config.pad_id),
            scores=jax.tree.map(latest, after.scores),
        )

    def checked(
        self, tokens: AnyArray, lengths: AnyArray, rng: jax.Array, controls: Controls | None
    ) -> tuple[Int[Array, 'B P'], Int[Array, ' B'], jax.Array, Controls]:
        """Returns the arguments of a call, tokens and lengths as int32; raises ValueError."""
        shape = np.shape(tokens)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f'tokens must be [batch, prompt width], neither of them 0, got shape {shape}. '
                'pad_prompts creates them from lists of ids.'
            )
        if np.shape(lengths) != shape[:1]:
            raise ValueError(
                f'lengths must hold one number per row of tokens, {shape[:1]}, got shape '
                f'{np.shape(lengths)}.'
            )
        for name, array in (('tokens', tokens), ('lengths', lengths)):
            if not is_integer(array):
                raise ValueError(f'{name} must be integers, got {jnp.result_type(array)}.')
        key_shape = typed_key(rng).shape
        if key_shape not in ((), shape[:1]):
            raise ValueError(
                f'rng must be one key or one per row, {shape[:1]}, got keys of shape {key_shape}.'
            )
        vocab_size, max_new_tokens = self.model.config.vocab_size, self.config.max_new_tokens
        if is_known(tokens) and is_known(lengths):
            check_prompts(np.asarray(tokens), np.asarray(lengths), vocab_size)
            check_fits(np.asarray(lengths), max_new_tokens, traits(self.model).max_positions)
        controls = Controls() if controls is None else controls
        controls.check(shape[0], vocab_size, max_new_tokens)
        limits = (self.config.top_k, self.config.top_p, controls.top_p)
        is_truncated = any(limit is not None for limit in limits)
        if controls.automaton is not None and is_truncated and self.mode == 'diffusion':
            raise ValueError(
                'top_k and top_p cannot be combined with an automaton in the diffusion mode: they '
                'could exclude every valid canvas. Leave them out, or use another mode.'
            )
        return jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32), rng, controls
