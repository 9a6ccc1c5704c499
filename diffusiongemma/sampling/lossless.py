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

import dataclasses

import jax
import jax.numpy as jnp

from diffusiongemma.constraints.automaton import trace
from diffusiongemma.models.arrays import Params
from diffusiongemma.sampling import passes
from diffusiongemma.sampling.autoregressive import first_token, next_token_logits, scores_of
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.sampling.drafter import (
    Drafted,
    LosslessState,
    config_of_model_drafts,
    draft,
    draft_length,
    with_draft,
)
from diffusiongemma.sampling.epilogue import always_greedy, gumbel_noise, pick
from diffusiongemma.sampling.finite import chosen_are_finite
from diffusiongemma.sampling.passes import CausalModel
from diffusiongemma.sampling.randomness import fold_in_rows
from diffusiongemma.sampling.scores import TokenScores
from diffusiongemma.sampling.state import GenerationState


def start(
    model: CausalModel,
    config: SamplingConfig,
    params: Params,
    state: GenerationState,
    hidden: jax.Array,
    prompt: jax.Array,
    prompt_lengths: jax.Array,
) -> LosslessState:
    """Draws the first tokens.

    Args:
      model: it drafts too, unless the config has a source of drafts.
      config: how to sample.
      params: the model's parameters.
      state: the prompts, cached.
      hidden: [B, D], hidden states of their last tokens.
      prompt: [B, P] int32, their tokens, right-padded.
      prompt_lengths: [B] int32.
    """
    sizes = (prompt.shape[0], draft_length(model, config) + 2)
    keys = fold_in_rows(state.keys, 0)
    pending, finite, scores = first_token(model, config, params, state, hidden, keys)
    return LosslessState(
        generation=state.finish_unless(finite, 'prefill'),
        pending=pending,
        hidden=hidden,
        prompt=prompt,
        prompt_lengths=prompt_lengths,
        draft_steps=jnp.ones_like(state.lengths),
        accepted_lengths=jnp.zeros(sizes, jnp.int32),
        pending_scores=scores,
    )


def next_draft(
    model: CausalModel, config: SamplingConfig, params: Params, state: LosslessState
) -> LosslessState:
    """Drafts for every unfinished row, verifies the drafts, emits and caches what holds."""
    noise = text_noise(model, config, state)

    def verified(drafted: Drafted) -> LosslessState:
        return verify_draft(model, config, params, state, drafted, noise)

    if config_of_model_drafts(config, state) is None:  # one length, and one verification
        return verified(draft(model, config, params, state, noise))
    return with_draft(model, config, params, state, noise, verified)


def text_noise(
    model: CausalModel, config: SamplingConfig, state: LosslessState
) -> jax.Array | None:
    """Gumbel noise [B, K + 1, V] of the tokens after the pending ones; None for greedy text."""
    before = state.generation
    if always_greedy(before.temperature(config)):
        return None
    places = before.lengths[:, None] + 1 + jnp.arange(draft_length(model, config) + 1)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(before.keys, places)
    return gumbel_noise(keys, model.config.vocab_size)


def verify_draft(
    model: CausalModel,
    config: SamplingConfig,
    params: Params,
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
      drafted: what may follow the pending tokens, [B, K].
      noise: [B, >= K + 1, V] from `text_noise`.
    """
    active = ~state.finished
    before = state.generation.finish_unless(drafted.finite, 'denoise')
    block = jnp.concatenate([state.pending[:, None], drafted.tokens], axis=1)  # [B, K + 1]
    length = block.shape[1]
    hidden, block_kv = passes.encode_block(model, params, before.cache, block, active)
    said = model.apply({'params': params}, hidden, method='unembed')  # [B, K + 1, V]
    states, automaton = before.automaton_states, before.controls.automaton
    if states is not None and automaton is not None:
        states = trace(automaton, states, block)[:, 1:]  # [B, K + 1]
    logits = next_token_logits(config, before, said, before.lengths + 1, states)
    if noise is not None:
        noise = noise[:, :length]
    counts, pending, finite = verify(logits, block, before.temperature(config), noise)
    before = before.finish_unless(finite, 'verify')
    following = jnp.concatenate([drafted.tokens, pending[:, None]], axis=1)
    following = following.at[jnp.arange(len(counts)), counts - 1].set(pending)
    scores = scores_of(config, said, following)  # [B, K + 1], each a token later than the block's
    emitted_scores, pending_scores = _shifted(state.pending_scores, scores, counts)
    after = before.emit(config, block, drafted.steps, counts, emitted_scores)
    emitted = after.lengths - before.lengths
    cache = before.cache.append(block_kv, emitted)
    last = jnp.take_along_axis(hidden, (counts - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
    rows = jnp.arange(len(counts))
    # A draft that held wholly was worth fewer steps, one that fell early is worth more.
    draft_steps = state.draft_steps - (counts == length) + (counts < length // 4)
    return dataclasses.replace(
        state,
        generation=dataclasses.replace(
            after,
            cache=cache,
            canvases=before.canvases + active,
            causal_passes=before.causal_passes + active,
        ),
        pending=pending,
        hidden=last,
        draft_steps=jnp.clip(draft_steps, 1, config.max_draft_steps),
        accepted_lengths=state.accepted_lengths.at[rows, emitted].add(active),
        pending_scores=pending_scores,
    )


def _shifted(
    first: TokenScores | None, following: TokenScores | None, counts: jax.Array
) -> tuple[TokenScores | None, TokenScores | None]:
    """Scores of a block [B, T], and of the tokens [B, 1] that come after its first counts [B].

    Args:
      first: of the first token of the block, [B, 1].
      following: of the tokens after each token of the block, [B, T].
      counts: [B] int32, at least 1.
    """

    def shift(first: jax.Array, following: jax.Array) -> jax.Array:
        return jnp.concatenate([first, following[:, :-1]], axis=1)

    def last(following: jax.Array) -> jax.Array:
        return following[jnp.arange(len(counts)), counts - 1][:, None]

    return jax.tree.map(shift, first, following), jax.tree.map(last, following)


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
