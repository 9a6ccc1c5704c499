"""Lossless generation: a draft is verified by the causal pass that commits it.

prefill -> while rows are unfinished { draft -> encode it -> accept its longest valid prefix ->
cache and emit that prefix }. The causal logits come with the commit at no extra cost.

A draft token is accepted while it is the one that autoregressive decoding draws at its place. Draws
are argmax(log p + g) with Gumbel noise g that depends on the row's key and the place in the
response alone (`epilogue.gumbel_noise`), so the text is token for token that of the autoregressive
mode with the same key, greedy or sampled. A draft that is drawn with the same noise is accepted
with a probability near 1 - TV(p, q) (shared Gumbel noise: Daliri et al. 2024, arXiv:2408.07978).

The token that is known for certain but not yet encoded, the "pending" one, is the first of the
block that is verified.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.constraints.automaton import trace
from diffusiongemma.models.cache import KVCache
from diffusiongemma.sampling import passes
from diffusiongemma.sampling.autoregressive import first_token, next_token_logits
from diffusiongemma.sampling.controls import OPEN
from diffusiongemma.sampling.diffusion import canvas_task, denoise_canvas, first_canvas, hold
from diffusiongemma.sampling.drafts import PromptLookup, history_of, light_draft
from diffusiongemma.sampling.epilogue import always_greedy, gumbel_noise, pick
from diffusiongemma.sampling.finite import chosen_are_finite
from diffusiongemma.sampling.passes import DenoisingModel
from diffusiongemma.sampling.randomness import fold_in_rows, split_rows
from diffusiongemma.sampling.state import (
    CanvasTask,
    DenoiseState,
    GenerationState,
    SamplerOutput,
    SamplingConfig,
)

LONGEST_NGRAM = 6  # that a lookup tells from a shorter one


@flax.struct.dataclass
class LosslessState:
    """The loop's carry.

    Attributes:
      generation: what has been emitted and cached.
      pending: [B] int32, each row's next token, drawn but neither emitted nor cached.
      hidden: [B, D], final hidden state of each row's last encoded token.
      prompt: [B, P] int32, right-padded.
      prompt_lengths: [B] int32.
      draft_steps: [B] int32, denoise steps that each row's next draft may take.
      accepted_lengths: [B, K + 2] int32, verifications after which so many tokens were emitted.
    """

    generation: GenerationState
    pending: jax.Array
    hidden: jax.Array
    prompt: jax.Array
    prompt_lengths: jax.Array
    draft_steps: jax.Array
    accepted_lengths: jax.Array

    @property
    def running(self) -> jax.Array:
        return self.generation.running

    @property
    def cache(self) -> KVCache:
        return self.generation.cache

    @property
    def finished(self) -> jax.Array:
        return self.generation.finished

    def insert(self, new: 'LosslessState', slots: jax.Array) -> 'LosslessState':
        """As `GenerationState.insert`."""

        def put(old: jax.Array, rows: jax.Array) -> jax.Array:
            return old.at[slots].set(rows, mode='drop')

        generation = self.generation.insert(new.generation, slots)
        others = jax.tree.map(put, self.replace(generation=None), new.replace(generation=None))
        return others.replace(generation=generation)

    def output(self) -> SamplerOutput:
        return self.generation.output().replace(accepted_lengths=self.accepted_lengths)


class Drafted(NamedTuple):
    """What is verified.

    Attributes:
      tokens: [B, K] int32, what may follow the pending tokens.
      steps: [B] int32, denoise passes that the draft took.
      finite: [B] bool, whether the logits of these passes were finite.
    """

    tokens: jax.Array
    steps: jax.Array
    finite: jax.Array


def start(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Any,
    state: GenerationState,
    hidden: jax.Array,
    prompt: jax.Array,
    prompt_lengths: jax.Array,
) -> LosslessState:
    """Draws the first tokens.

    Args:
      model: the denoiser.
      config: how to sample.
      params: the model's parameters.
      state: the prompts, cached.
      hidden: [B, D], hidden states of their last tokens.
      prompt: [B, P] int32, their tokens, right-padded.
      prompt_lengths: [B] int32.
    """
    sizes = (prompt.shape[0], draft_length(model, config) + 2)
    keys = fold_in_rows(state.keys, 0)
    pending, finite = first_token(model, config, params, state, hidden, keys)
    return LosslessState(
        generation=state.finish_unless(finite, 'prefill'),
        pending=pending,
        hidden=hidden,
        prompt=prompt,
        prompt_lengths=prompt_lengths,
        draft_steps=jnp.ones_like(state.lengths),
        accepted_lengths=jnp.zeros(sizes, jnp.int32),
    )


def draft_length(model: DenoisingModel, config: SamplingConfig) -> int:
    """K, tokens of a draft; the pending token is not one of them."""
    if config.drafts is not None:
        return config.drafts.length
    return canvas_length(model, config) - (0 if passes.predicts_next(model) else 1)


def canvas_length(model: DenoisingModel, config: SamplingConfig) -> int:
    """Tokens of a canvas that is a draft."""
    return config.draft_length or model.config.canvas_length


def next_draft(
    model: DenoisingModel, config: SamplingConfig, params: Any, state: LosslessState
) -> LosslessState:
    """Drafts for every unfinished row, verifies the drafts, emits and caches what holds."""
    noise = text_noise(model, config, state)
    drafted = draft(model, config, params, state, noise)
    return verify_draft(model, config, params, state, drafted, noise)


def draft(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Any,
    state: LosslessState,
    noise: jax.Array | None,
) -> Drafted:
    """What may follow the pending tokens; `noise` is that of `text_noise`."""
    no_steps = jnp.zeros_like(state.draft_steps)
    if config.drafts is not None:
        tokens = config.drafts.draft(*text_so_far(state))
        return Drafted(tokens, no_steps, jnp.ones_like(state.finished))
    if not config.lookup_ngram:
        return model_draft(model, config, params, state, noise)
    looked_up, found = looked_up_draft(model, config, state)

    def with_model() -> Drafted:
        drafted = model_draft(model, config, params, state, noise)
        return in_place_of(drafted, looked_up, found)

    def without_model() -> Drafted:
        return Drafted(looked_up, no_steps, jnp.ones_like(state.finished))

    return jax.lax.cond(jnp.all(found | state.finished), without_model, with_model)


def in_place_of(drafted: Drafted, looked_up: jax.Array, found: jax.Array) -> Drafted:
    """The model's drafts, but for the rows [B] in which the looked-up ones [B, K] were found."""
    return Drafted(
        tokens=jnp.where(found[:, None], looked_up, drafted.tokens),
        steps=jnp.where(found, 0, drafted.steps),
        finite=found | drafted.finite,
    )


def model_draft(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Any,
    state: LosslessState,
    noise: jax.Array | None,
) -> Drafted:
    """The denoiser's draft; arguments as of `draft`."""
    if drafts_in_one_pass(model, config, state):
        light = one_pass_draft(model, config, params, state, noise)
        return Drafted(light.tokens, jnp.ones_like(state.draft_steps), light.finite)
    task = draft_task(model, config, state, noise)
    denoised = denoise_canvas(model, config, params, state.cache, task, config.max_draft_steps)
    return Drafted(drafted_tokens(model, denoised), denoised.steps, denoised.finite)


def text_noise(
    model: DenoisingModel, config: SamplingConfig, state: LosslessState
) -> jax.Array | None:
    """Gumbel noise [B, K + 1, V] of the tokens after the pending ones; None for greedy text."""
    before = state.generation
    if always_greedy(before.temperature(config)):
        return None
    places = before.lengths[:, None] + 1 + jnp.arange(draft_length(model, config) + 1)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(before.keys, places)
    return gumbel_noise(keys, model.config.vocab_size)


def looked_up_draft(
    model: DenoisingModel, config: SamplingConfig, state: LosslessState
) -> tuple[jax.Array, jax.Array]:
    """Drafts [B, K] out of the text so far, and where `config.lookup_ngram` tokens match [B]."""
    source = PromptLookup(draft_length(model, config), max(LONGEST_NGRAM, config.lookup_ngram))
    tokens, matched = source.find(*text_so_far(state))
    return tokens, matched >= config.lookup_ngram


def text_so_far(state: LosslessState) -> tuple[jax.Array, jax.Array]:
    """Prompts, responses and pending tokens as one text a row, see `history_of`."""
    generation = state.generation
    rows = jnp.arange(len(state.pending))
    response = jnp.pad(generation.tokens, [(0, 0), (0, 1)])
    response = response.at[rows, generation.lengths].set(state.pending)
    return history_of(state.prompt, state.prompt_lengths, response, generation.lengths + 1)


def drafts_in_one_pass(model: DenoisingModel, config: SamplingConfig, state: Any) -> bool:
    """Whether a light denoiser drafts, and nothing is asked that takes a canvas to obey."""
    controls = state.generation.controls
    constrained = (controls.pinned, controls.seed, controls.allowed_sets, controls.automaton)
    is_light = getattr(model, 'light', None) is not None
    return is_light and config.max_draft_steps == 1 and all(c is None for c in constrained)


def one_pass_draft(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Any,
    state: LosslessState,
    noise: jax.Array | None,
) -> Any:
    """What a light denoiser drafts after the pending tokens, see `drafts.light_draft`."""
    before = state.generation
    keys = split_rows(fold_in_rows(before.keys, before.canvases))[0]
    canvas = first_canvas(model, config, keys, canvas_length(model, config))
    temperature = before.temperature(config)
    return light_draft(
        model,
        params,
        state.cache,
        canvas,
        state.pending,
        state.hidden,
        state.prompt,
        temperature,
        config.top_k,
        before.top_p(config),
        None if noise is None else noise[:, :-1],
    )


def draft_task(
    model: DenoisingModel, config: SamplingConfig, state: LosslessState, noise: jax.Array | None
) -> CanvasTask:
    """The next draft of every row as a canvas to denoise.

    The pending token is the first of the canvas and pinned there; of a model that predicts next
    tokens it is the token before the canvas.
    """
    before, length = state.generation, canvas_length(model, config)
    if passes.predicts_next(model):
        ahead = before.replace(lengths=before.lengths + 1, last_token=state.pending)
        task = canvas_task(model, ahead, length, first=1)
        task = task.replace(automaton_states=_after_pending(state))
        text_noise = None if noise is None else noise[:, :-1]
    else:
        task = canvas_task(model, before, length)
        nothing = jnp.full((before.lengths.shape[0], length), OPEN, jnp.int32)
        task = task.replace(pinned=hold(task.pinned, nothing).at[:, 0].set(state.pending))
        text_noise = None if noise is None else jnp.roll(noise, 1, axis=1)[:, :length]
    return task.replace(
        keys=split_rows(task.keys)[0],
        max_steps=state.draft_steps,
        text_noise=text_noise,
        teacher_state=state.hidden,
    )


def _after_pending(state: LosslessState) -> jax.Array | None:
    before = state.generation
    if before.automaton_states is None:
        return None
    automaton = before.controls.automaton
    return trace(automaton, before.automaton_states, state.pending[:, None])[:, 1]


def drafted_tokens(model: DenoisingModel, denoised: DenoiseState) -> jax.Array:
    """The draft [B, K] out of a denoised canvas: what follows the pending token."""
    return denoised.argmax if passes.predicts_next(model) else denoised.argmax[:, 1:]


def verify_draft(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Any,
    state: LosslessState,
    drafted: Drafted,
    noise: jax.Array | None,
) -> LosslessState:
    """Encodes pending tokens and drafts, emits and caches what holds.

    Args:
      model: the model.
      config: how to sample.
      params: its parameters.
      state: before the draft.
      drafted: what may follow the pending tokens.
      noise: [B, K + 1, V] from `text_noise`.
    """
    active = ~state.finished
    before = state.generation.finish_unless(drafted.finite, 'denoise')
    block = jnp.concatenate([state.pending[:, None], drafted.tokens], axis=1)  # [B, K + 1]
    length = block.shape[1]
    hidden, block_kv = passes.encode_block(model, params, before.cache, block, active)
    logits = model.apply({'params': params}, hidden, method='unembed')  # [B, K + 1, V]
    states = before.automaton_states
    if states is not None:
        states = trace(before.controls.automaton, states, block)[:, 1:]  # [B, K + 1]
    logits = next_token_logits(config, before, logits, before.lengths + 1, states)
    counts, pending, finite = verify(logits, block, before.temperature(config), noise)
    before = before.finish_unless(finite, 'verify')
    after = before.emit(config, block, drafted.steps, counts)
    emitted = after.lengths - before.lengths
    cache = before.cache.append(block_kv, emitted)
    last = jnp.take_along_axis(hidden, (counts - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
    rows = jnp.arange(len(counts))
    # A draft that held wholly was worth fewer steps, one that fell early is worth more.
    draft_steps = state.draft_steps - (counts == length) + (counts < length // 4)
    return state.replace(
        generation=after.replace(
            cache=cache,
            canvases=before.canvases + active,
            causal_passes=before.causal_passes + active,
        ),
        pending=pending,
        hidden=last,
        draft_steps=jnp.clip(draft_steps, 1, config.max_draft_steps),
        accepted_lengths=state.accepted_lengths.at[rows, emitted].add(active),
    )


def verify(
    logits: jax.Array,
    block: jax.Array,
    temperature: float | jax.Array,
    noise: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How much of each block autoregressive decoding would have written, and what comes next.

    Args:
      logits: [B, T, V] of the autoregressive distributions; those at i predict token i + 1.
      block: [B, T] int32; its first token is known to be right.
      temperature: a number or [B]; where it is 0, greedily.
      noise: [B, T, V] float32, the Gumbel noise that the tokens are drawn with; None for greedy.

    Returns:
      [B] int32, tokens of the block that hold, at least 1; [B] int32, the token after them; and
      [B] bool, whether the logits that both follow from are finite.
    """
    drawn = pick(logits, temperature, noise)  # [B, T]
    holds = drawn[:, :-1] == block[:, 1:]
    counts = 1 + jnp.sum(jnp.cumprod(holds.astype(jnp.int32), axis=-1), axis=-1)  # [B]
    unused = jnp.arange(drawn.shape[1]) >= counts[:, None]
    finite = jnp.all(chosen_are_finite(logits, drawn) | unused, axis=-1)
    return counts, jnp.take_along_axis(drawn, (counts - 1)[:, None], axis=1)[:, 0], finite
