"""The sampler that other code imports: checks its input, then runs one compiled program."""

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
from diffusiongemma.sampling.controls import Controls, is_known
from diffusiongemma.sampling.drafter import LosslessState
from diffusiongemma.sampling.finite import are_finite, check_finite
from diffusiongemma.sampling.passes import CausalModel
from diffusiongemma.sampling.prompts import check_fits, check_prompts
from diffusiongemma.sampling.randomness import row_keys, typed_key
from diffusiongemma.sampling.rows import map_but
from diffusiongemma.sampling.state import GenerationState, SamplerOutput

_STATIC = ('model', 'config')

OneState = TypeVar('OneState', GenerationState, LosslessState)


@dataclasses.dataclass(frozen=True)
class Mode(Generic[OneState]):
    """The compiled pieces of a decode mode.

    Attributes:
      generate: the whole of it, from prompts to the output.
      start: from prompts to the state before the first block; arguments as of `prefilled`. With
        a `capacity` states of prompts of any width are of equal shapes, so that rows of one can
        take the place of rows of another. `whole` are the prompts and their lengths together with
        what a given cache holds of them, for drafts that look something up.
      advance: one more block of every unfinished row.
      until_one_finishes: blocks until another row is finished.
    """

    generate: Callable[..., SamplerOutput]
    start: Callable[..., OneState]
    advance: Callable[..., OneState]
    until_one_finishes: Callable[..., OneState]


def _compiled(first: Callable[..., OneState], advance: Callable[..., OneState]) -> Mode[OneState]:
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
            wider = ((0, 0), (0, capacity - tokens.shape[1]))
            tokens = jnp.pad(tokens, wider, constant_values=config.pad_id)
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
        advance=jax.jit(advance, static_argnames=_STATIC),
        until_one_finishes=jax.jit(until_one_finishes, static_argnames=_STATIC),
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
    """Caches the prompts; arguments as of a call of `Sampler`.

    With a `cache` they stand behind what it holds, and it must have room for the responses too.
    Without one, a cache of `capacity` tokens a row is made; None for as many as the width of the
    prompts and max_new_tokens.

    Returns:
      Empty responses behind them, and the hidden states [B, D] of the prompts' last tokens.
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
    """The mode that a model is made for."""
    if not passes.canvas_length(model):
        return 'autoregressive'
    return 'diffusion' if passes.light_config(model) is None else 'lossless'


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Generates responses to a batch of prompts.

        sampler = Sampler(model, SamplingConfig.for_tokenizer(tokenizer, max_new_tokens=512))
        tokens, lengths = pad_prompts([tokenizer.format_prompt('Hello')], tokenizer.pad_id)
        output = sampler(params, tokens, lengths, rng=jax.random.key(0))

    It compiles once for each shape of `tokens` and may be called inside another `jax.jit`.
    A row's tokens depend on its prompt and its key alone, not on the rows beside it.

    Attributes:
      model: a flax module with the passes of `DenoisingModel`; those of `CausalModel` do for
        the autoregressive mode.
      config: how to sample.
      mode: 'diffusion'; 'autoregressive', the baseline on the encode pass; or 'lossless', whose
        output is distributed exactly as the autoregressive one: canvases are drafts that the
        causal pass verifies.
    """

    model: CausalModel
    config: SamplingConfig = SamplingConfig()
    mode: str = 'diffusion'

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f'mode must be one of {sorted(MODES)}, got {self.mode!r}.')
        drafts = self.mode == 'lossless' and self.config.drafts is not None
        longest = passes.canvas_length(self.model)
        if self.mode != 'autoregressive' and not (drafts or longest):
            raise ValueError(
                f'mode {self.mode!r} needs a model with a canvas, but canvas_length of this '
                f'{type(self.model).__name__} is 0. Use a DiffusionGemma, or '
                "mode='autoregressive'."
            )
        light = passes.light_config(self.model) if longest else None
        if self.mode == 'diffusion' and light is not None:
            raise ValueError(
                'a light denoiser drafts for the teacher, which has to verify it: use '
                "mode='lossless', or a student with a 'shared' or 'separate' denoiser."
            )
        if self.mode == 'diffusion' and self.config.logprobs is not None:
            raise ValueError(
                "logprobs need a causal pass over the tokens, which mode='diffusion' does not "
                "take: its tokens come from many denoise steps. Use mode='lossless' or "
                "'autoregressive'."
            )
        for name in ('draft_length', 'model_draft_length'):
            if (getattr(self.config, name) or 0) > longest > 0:
                raise ValueError(
                    f'{name}={getattr(self.config, name)} is longer than the canvas of {longest} '
                    'tokens that the model was trained with.'
                )
        vocab_size = self.model.config.vocab_size
        if (self.config.logprobs or 0) > vocab_size:
            raise ValueError(
                f'logprobs={self.config.logprobs} asks for more tokens at a place than the '
                f'{vocab_size} of the model; lower it.'
            )
        ids = (self.config.pad_id, *self.config.stop_ids)
        if max(ids) >= vocab_size or (self.config.vocab_size or 0) > vocab_size:
            raise ValueError(
                f'The model knows {vocab_size} tokens, but the sampling config has '
                f'pad_id={self.config.pad_id}, stop_ids={self.config.stop_ids}, '
                f'vocab_size={self.config.vocab_size}. Is it made for another tokenizer?'
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
        """Generates until every row met a stop token or has max_new_tokens tokens.

        Args:
          params: the model's parameters.
          tokens: [B, P] integer prompts, right-padded (see `pad_prompts`).
          lengths: [B] integer, tokens of each prompt.
          rng: one key, of which row r uses `fold_in(rng, r)`, or one key per row [B].
          controls: settings and constraints of the rows; None for none.

        Returns:
          Tokens [B, max_new_tokens], lengths and costs.

        Raises:
          ValueError: when shapes, types, lengths, token ids, keys or controls are unfit. Values
            are checked where they are known, which inside another jit they are not.
          FloatingPointError: when logits are NaN or infinite; it names the pass and the row.
            Inside another jit `failed_pass` of the output says so.
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
        """Yields every canvas as soon as it is done; arguments and errors as of a call.

        In each, `tokens` is [B, C] ([B, 1] in the autoregressive mode; narrower where
        max_new_tokens leaves less room), and `lengths` is how many of them belong to the response:
        0 in rows that have finished before. Put behind each other a row's tokens are those of a
        call with the same arguments, and the numbers add up to its numbers.
        """
        return self._stream(params, self.checked(tokens, lengths, rng, controls))

    def states(self, params: Params, *prompts: Any) -> Iterator[GenerationState | LosslessState]:
        """Yields the state before the first block and after every one; the last is finished.

        Each block is a program of its own; arguments, which are not checked, as of `prefilled`.

        Raises:
          FloatingPointError: as a call.
        """
        mode = MODES[self.mode]
        state = mode.start(self.model, self.config, params, *prompts)
        while True:
            check_finite(state.output().failed_pass)
            yield state
            if not state.running:
                return
            state = mode.advance(self.model, self.config, params, state)

    def _stream(self, params: Params, arguments: tuple) -> Iterator[SamplerOutput]:
        block = 1
        if self.mode == 'lossless':
            block = lossless.draft_length(self.model, self.config) + 1
        elif self.mode == 'diffusion':
            block = self.model.config.canvas_length
        before = None
        for state in self.states(params, *arguments):
            after = state.output()
            before = before or jax.tree.map(jnp.zeros_like, after)
            if jnp.any(after.lengths > before.lengths):
                yield self._news(before, after, block)
                before = after

    def _news(self, before: SamplerOutput, after: SamplerOutput, block: int) -> SamplerOutput:
        """What each row gained between two outputs: [B, at most block] tokens, then the pad id."""
        limit = after.tokens.shape[1]
        gained = after.lengths > before.lengths
        width = min(block, limit - int(jnp.min(jnp.where(gained, before.lengths, limit - 1))))
        slots = before.lengths[:, None] + jnp.arange(width)  # [B, width]
        rows = jnp.arange(len(slots))[:, None]

        def latest(leaf: jax.Array) -> jax.Array:
            return leaf[rows, jnp.minimum(slots, limit - 1)]

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
        """The arguments of a call, tokens and lengths as int32 arrays; raises ValueError."""
        shape = np.shape(tokens)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f'tokens must be [batch, prompt width], neither of them 0, got shape {shape}. '
                'pad_prompts makes them from lists of ids.'
            )
        if np.shape(lengths) != shape[:1]:
            raise ValueError(
                f'lengths must hold one number per row of tokens, {shape[:1]}, got shape '
                f'{np.shape(lengths)}.'
            )
        for name, array in (('tokens', tokens), ('lengths', lengths)):
            if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
                raise ValueError(f'{name} must be integers, got {jnp.result_type(array)}.')
        key_shape = typed_key(rng).shape
        if key_shape not in ((), shape[:1]):
            raise ValueError(
                f'rng must be one key or one per row, {shape[:1]}, got keys of shape {key_shape}.'
            )
        vocab_size, max_new_tokens = self.model.config.vocab_size, self.config.max_new_tokens
        if is_known(tokens) and is_known(lengths):
            check_prompts(np.asarray(tokens), np.asarray(lengths), vocab_size)
            check_fits(np.asarray(lengths), max_new_tokens, passes.max_positions(self.model))
        controls = Controls() if controls is None else controls
        controls.check(shape[0], vocab_size, max_new_tokens)
        limits = (self.config.top_k, self.config.top_p, controls.top_p)
        cut = any(limit is not None for limit in limits)
        if controls.automaton is not None and cut and self.mode == 'diffusion':
            raise ValueError(
                'top_k and top_p do not go with an automaton in the diffusion mode: they could '
                'rule out every valid canvas. Leave them out, or use another mode.'
            )
        return jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32), rng, controls
