"""Lossless generation: the causal pass that commits a draft also verifies it.

prefill -> while rows are unfinished { draft -> encode it -> accept its longest valid prefix ->
cache and emit that prefix }. The causal logits come with the commit at no extra cost.

Draft tokens are accepted up to the first one that differs from the token that autoregressive
decoding draws at the same position. A draw is argmax(log p + g), with Gumbel noise g that only
depends on the key of the row and the position in the response (`epilogue.gumbel_noise`). The text
therefore equals that of the autoregressive mode with the same key, token for token, greedy or
sampled. A draft that is drawn with the same noise is accepted with a probability near 1 - TV(p, q)
(shared Gumbel noise: Daliri et al. 2024, arXiv:2408.07978).

The pending token, which is final but not encoded yet, is the first token of the verified block.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffusiongemma.constraints.automaton import trace
from diffusiongemma.models.arrays import Params
from diffusiongemma.sampling import passes
from diffusiongemma.sampling.autoregressive import draw_token, next_token_logits, scores_of
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
from diffusiongemma.sampling.interface import CausalModel
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
    """Draws the first token of each row, which becomes its pending token.

    Args:
      model: the model.
      config: the sampling settings.
      params: the parameters of the model.
      state: the state after the prefill.
      hidden: [B, D], hidden states of the last prompt tokens.
      prompt: [B, P] int32 prompts, right-padded.
      prompt_lengths: [B] int32, the number of tokens of each prompt.
    """
    sizes = (prompt.shape[0], draft_length(model, config) + 2)
    keys = fold_in_rows(state.keys, 0)
    pending, finite, scores = draw_token(model, config, params, state, hidden, keys)
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
    """Drafts for every unfinished row, verifies the drafts, emits and caches accepted tokens."""
    noise = text_noise(model, config, state)

    def verify_drafted(drafted: Drafted) -> LosslessState:
        return verify_draft(model, config, params, state, drafted, noise)

    if config_of_model_drafts(config, state) is None:  # one length, and one verification
        return verify_drafted(draft(model, config, params, state, noise))
    return with_draft(model, config, params, state, noise, verify_drafted)


def text_noise(
    model: CausalModel, config: SamplingConfig, state: LosslessState
) -> jax.Array | None:
    """Returns the Gumbel noise [B, K + 1, V] of the tokens after the pending one.

    The result is None if all text is greedy.
    """
    before = state.generation
    if always_greedy(before.temperature(config)):
        return None
    # Positions in the response, [B, K + 1].
    positions = before.lengths[:, None] + 1 + jnp.arange(draft_length(model, config) + 1)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))(before.keys, positions)
    return gumbel_noise(keys, model.config.vocab_size)


def verify_draft(
    model: CausalModel,
    config: SamplingConfig,
    params: Params,
    state: LosslessState,
    drafted: Drafted,
    noise: jax.Array | None,
) -> LosslessState:
    """Encodes pending tokens and drafts, and emits and caches the accepted tokens.

    Args:
      model: the model.
      config: the sampling settings.
      params: the parameters of the model.
      state: the state before the draft.
      drafted: the draft tokens [B, K] after the pending tokens.
      noise: [B, >= K + 1, V] float32, the result of `text_noise`; None for greedy text.
    """
    active = ~state.finished
    before = state.generation.finish_unless(drafted.finite, 'denoise')
    block = jnp.concatenate([state.pending[:, None], drafted.tokens], axis=1)  # [B, K + 1]
    length = block.shape[1]
    hidden, block_kv = passes.encode_block(model, params, before.cache, block, active)
    unembedded = model.apply({'params': params}, hidden, method='unembed')  # [B, K + 1, V]
    states, automaton = before.automaton_states, before.controls.automaton
    if states is not None and automaton is not None:
        states = trace(automaton, states, block)[:, 1:]  # [B, K + 1]
    logits = next_token_logits(config, before, unembedded, before.lengths + 1, states)
    if noise is not None:
        noise = noise[:, :length]
    counts, pending, finite = verify(logits, block, before.temperature(config), noise)
    before = before.finish_unless(finite, 'verify')
    following = jnp.concatenate([drafted.tokens, pending[:, None]], axis=1)  # [B, K + 1]
    following = following.at[jnp.arange(len(counts)), counts - 1].set(pending)
    scores = scores_of(config, unembedded, following)  # [B, K + 1], one token after the block's
    emitted_scores, pending_scores = _shifted(state.pending_scores, scores, counts)
    after = before.emit(config, block, drafted.steps, counts, emitted_scores)
    emitted = after.lengths - before.lengths
    cache = before.cache.append(block_kv, emitted)
    last = jnp.take_along_axis(hidden, (counts - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
    rows = jnp.arange(len(counts))
    # After a fully accepted draft, fewer steps suffice; after an early mismatch, take more.
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
    """Returns the scores [B, T] of a block and [B, 1] of the token after its accepted tokens.

    Args:
      first: [B, 1], the scores of the first token of the block.
      following: [B, T], the scores of the token after each token of the block.
      counts: [B] int32, the number of accepted tokens, at least 1.
    """

    def shift(first: jax.Array, following: jax.Array) -> jax.Array:
        return jnp.concatenate([first, following[:, :-1]], axis=1)  # [B, T, ...]

    def last(following: jax.Array) -> jax.Array:
        return following[jnp.arange(len(counts)), counts - 1][:, None]  # [B, 1, ...]

    return jax.tree.map(shift, first, following), jax.tree.map(last, following)


def verify(
    logits: jax.Array,
    block: jax.Array,
    temperature: float | jax.Array,
    noise: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compares each block with autoregressive decoding.

    Args:
      logits: [B, T, V], logits of the autoregressive distributions; those at i predict token
        i + 1.
      block: [B, T] int32; its first token is final.
      temperature: a number or [B]; 0 means greedy.
      noise: [B, T, V] float32, the Gumbel noise of the draws; None for greedy text.

    Returns:
      The number of accepted tokens of each block, at least 1, [B] int32; the token that
      autoregressive decoding draws after them, [B] int32; and whether the logits that determine
      both are finite, [B] bool.
    """
    tokens = pick(logits, temperature, noise)  # [B, T]
    is_equal = tokens[:, :-1] == block[:, 1:]  # [B, T - 1]
    counts = 1 + jnp.sum(jnp.cumprod(is_equal.astype(jnp.int32), axis=-1), axis=-1)  # [B]
    unused = jnp.arange(tokens.shape[1]) >= counts[:, None]
    finite = jnp.all(chosen_are_finite(logits, tokens) | unused, axis=-1)
    return counts, jnp.take_along_axis(tokens, (counts - 1)[:, None], axis=1)[:, 0], finite
