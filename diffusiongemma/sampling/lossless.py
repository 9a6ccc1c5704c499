"""Lossless generation: the canvas is a draft, the causal pass that commits it also verifies it.

prefill -> while rows are unfinished { denoise a draft -> encode it -> accept its longest valid
prefix -> cache and emit that prefix }. The causal logits come with the commit at no extra cost.
Acceptance is speculative sampling (Leviathan et al. 2023, arXiv:2211.17192) with a draft that
puts all its mass on one token: position i is accepted with probability p(x_i | x_<i), and where
it is not, the next token is drawn from p without x_i. So every token has exactly the distribution
of autoregressive decoding at the same temperature; at temperature 0 the text is the same.

The token that is known for certain but not yet encoded, the "pending" one, is the first of the
next canvas and pinned there.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.constraints.automaton import trace
from diffusiongemma.models.cache import KVCache
from diffusiongemma.models.vocabulary import likeliest_tokens
from diffusiongemma.sampling import passes
from diffusiongemma.sampling.autoregressive import first_token, next_token_logits
from diffusiongemma.sampling.controls import OPEN
from diffusiongemma.sampling.diffusion import canvas_task, denoise_canvas, hold
from diffusiongemma.sampling.epilogue import always_greedy, draw, per_row
from diffusiongemma.sampling.passes import DenoisingModel
from diffusiongemma.sampling.randomness import split_rows
from diffusiongemma.sampling.state import (
    CanvasTask,
    DenoiseState,
    GenerationState,
    SamplerOutput,
    SamplingConfig,
)


@flax.struct.dataclass
class LosslessState:
    """The loop's carry.

    Attributes:
      generation: what has been emitted and cached.
      pending: [B] int32, each row's next token, drawn but neither emitted nor cached.
      draft_steps: [B] int32, denoise steps that each row's next draft may take.
    """

    generation: GenerationState
    pending: jax.Array
    draft_steps: jax.Array

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
        return LosslessState(
            generation=self.generation.insert(new.generation, slots),
            pending=self.pending.at[slots].set(new.pending, mode='drop'),
            draft_steps=self.draft_steps.at[slots].set(new.draft_steps, mode='drop'),
        )

    def output(self) -> SamplerOutput:
        return self.generation.output()


def start(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Any,
    state: GenerationState,
    hidden: jax.Array,
) -> LosslessState:
    """Draws the first tokens.

    Args:
      model: the denoiser.
      config: how to sample.
      params: the model's parameters.
      state: the prompts.
      hidden: [B, D], hidden states of their last tokens.
    """
    first_keys, keys = split_rows(state.keys)
    return LosslessState(
        generation=state.replace(keys=keys),
        pending=first_token(model, config, params, state, hidden, first_keys),
        draft_steps=jnp.ones_like(state.lengths),
    )


def next_draft(
    model: DenoisingModel, config: SamplingConfig, params: Any, state: LosslessState
) -> LosslessState:
    """Drafts a canvas of every unfinished row, verifies it, emits and caches what holds."""
    task, verify_keys = draft_task(model, state)
    cache, limit = state.cache, config.max_draft_steps
    draft = denoise_canvas(model, config, params, cache, task, limit)
    return verify_draft(model, config, params, state, draft, verify_keys)


def draft_task(model: DenoisingModel, state: LosslessState) -> tuple[CanvasTask, jax.Array]:
    """The next draft of every row, and the keys [B] that verify it."""
    before = state.generation
    task = canvas_task(model, before)
    draft_keys, verify_keys = split_rows(task.keys)
    nothing = jnp.full((before.lengths.shape[0], model.config.canvas_length), OPEN, jnp.int32)
    pinned = hold(task.pinned, nothing).at[:, 0].set(state.pending)
    return task.replace(keys=draft_keys, pinned=pinned, max_steps=state.draft_steps), verify_keys


def verify_draft(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Any,
    state: LosslessState,
    denoised: DenoiseState,
    keys: jax.Array,
) -> LosslessState:
    """Encodes a draft, emits and caches what holds; arguments as of `draft_task`."""
    before, draft = state.generation, denoised.argmax
    length, active = model.config.canvas_length, ~before.finished
    hidden, block_kv = passes.encode_block(model, params, before.cache, draft, active)
    logits = model.apply({'params': params}, hidden, method='unembed')  # [B, C, V]
    states = before.automaton_states
    if states is not None:
        states = trace(before.controls.automaton, states, draft)[:, 1:]  # [B, C]
    logits = next_token_logits(config, before, logits, before.lengths + 1, states)
    counts, pending = verify(logits, draft, before.temperature(config), keys)
    after = before.emit(config, draft, denoised.steps, counts)
    cache = before.cache.append(block_kv, after.lengths - before.lengths)
    # A draft that held wholly was worth fewer steps, one that fell early is worth more.
    steps = state.draft_steps - (counts == length) + (counts < length // 4)
    return LosslessState(
        generation=after.replace(cache=cache, canvases=before.canvases + active),
        pending=pending,
        draft_steps=jnp.clip(steps, 1, config.max_draft_steps),
    )


def verify(
    logits: jax.Array, draft: jax.Array, temperature: float | jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How much of each draft holds, and the token that follows.

    Args:
      logits: [B, C, V] of the autoregressive distributions; those at i predict token i + 1.
      draft: [B, C] int32; its first token is known to be right.
      temperature: a number or [B]; where it is 0, greedily.
      keys: [B] keys.

    Returns:
      [B] int32, tokens of the draft that hold, at least 1; and [B] int32, the token after them.
    """
    length = draft.shape[1]
    accept_keys, next_keys = split_rows(keys)
    predicting, proposed = logits[:, :-1], draft[:, 1:]
    holds = likeliest_tokens(logits)[:, :-1] == proposed
    if not always_greedy(temperature):
        log_probs = jax.nn.log_softmax(predicting, axis=-1)
        log_probs = jnp.take_along_axis(log_probs, proposed[..., None], axis=-1)[..., 0]
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (length - 1,)))(accept_keys)
        greedy = per_row(jnp.asarray(temperature) == 0, holds)
        holds = jnp.where(greedy, holds, uniform < jnp.exp(log_probs))
    counts = 1 + jnp.sum(jnp.cumprod(holds.astype(jnp.int32), axis=-1), axis=-1)  # [B]
    last = jnp.take_along_axis(logits, (counts - 1)[:, None, None], axis=1)[:, 0]  # [B, V]
    # The residual distribution: p without the token that was refused, if one was.
    refused = jnp.take_along_axis(draft, jnp.minimum(counts, length - 1)[:, None], axis=1)
    refused = jnp.where(counts[:, None] < length, refused, -1)
    last = jnp.where(jnp.arange(last.shape[-1]) == refused, -jnp.inf, last)
    return counts, draw(last, temperature, next_keys)
