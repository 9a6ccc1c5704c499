"""Autoregressive sampling with the encode pass, as the baseline and for the teacher."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusiongemma.constraints.automaton import allowed
from diffusiongemma.models.arrays import Params
from diffusiongemma.sampling import passes
from diffusiongemma.sampling.config import SamplingConfig
from diffusiongemma.sampling.controls import restrict, without_unknown
from diffusiongemma.sampling.epilogue import adjust, draw
from diffusiongemma.sampling.finite import chosen_are_finite
from diffusiongemma.sampling.interface import CausalModel, check_logits
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
) -> GenerationState:
    """Returns the state after the first token of each row.

    Args:
      model: a Gemma, or a DiffusionGemma whose denoiser is not used.
      config: the sampling settings; steps and rules of the diffusion mode are ignored.
      params: the parameters of the model.
      state: the state after the prefill.
      hidden: [B, D], hidden states of the last prompt tokens.
      prompt: [B, P] int32, ignored.
      prompt_lengths: [B] int32, ignored.
    """
    del prompt, prompt_lengths
    keys = fold_in_rows(state.keys, 0)
    token, finite, scores = draw_token(model, config, params, state, hidden, keys)
    state = state.finish_unless(finite, 'prefill')
    return state.emit(config, token[:, None], passes=1, scores=scores)


def next_token(
    model: CausalModel, config: SamplingConfig, params: Params, state: GenerationState
) -> GenerationState:
    """Encodes the latest token of each unfinished row and emits the next one."""
    latest = state.last_token[:, None]
    hidden, cache = passes.extend(model, params, state.cache, latest, ~state.finished)
    state = dataclasses.replace(state, cache=cache)
    keys = fold_in_rows(state.keys, state.lengths)
    token, finite, scores = draw_token(model, config, params, state, hidden[:, 0], keys)
    state = state.finish_unless(finite, 'autoregressive')
    return state.emit(config, token[:, None], passes=1, scores=scores)


def draw_token(
    model: CausalModel,
    config: SamplingConfig,
    params: Params,
    state: GenerationState,
    hidden: jax.Array,
    keys: jax.Array,
) -> tuple[jax.Array, jax.Array, TokenScores | None]:
    """Draws the next token of each row.

    Args:
      model: the model, whose head computes the logits.
      config: the sampling settings.
      params: the parameters of the model.
      state: the responses so far.
      hidden: [B, D], hidden states of the latest tokens.
      keys: [B] keys.

    Returns:
      The tokens [B] int32; whether their logits are finite [B] bool; and the scores of the tokens
      [B, 1], or None unless the config requests them.
    """
    unembedded = model.apply({'params': params}, hidden, method='unembed')[:, None]  # [B, 1, V]
    check_logits(model, unembedded, 'unembed')
    states = None if state.automaton_states is None else state.automaton_states[:, None]  # [B, 1]
    logits = next_token_logits(config, state, unembedded, state.lengths, states)[:, 0]  # [B, V]
    token = draw(logits, state.temperature(config), keys)
    scores = scores_of(config, unembedded, token[:, None])
    return token, chosen_are_finite(logits, token), scores


def scores_of(config: SamplingConfig, logits: jax.Array, tokens: jax.Array) -> TokenScores | None:
    """Returns the scores of tokens [B, T] under logits [B, T, V], or None if not requested."""
    if config.logprobs is None:
        return None
    return TokenScores.of(without_unknown(logits, config.vocab_size), tokens, config.logprobs)


def next_token_logits(
    config: SamplingConfig,
    state: GenerationState,
    logits: jax.Array,
    offsets: jax.Array,
    states: jax.Array | None,
) -> jax.Array:
    """Returns the logits [B, T, V] of the distribution that autoregressive decoding draws from.

    Args:
      config: the sampling settings: temperature, top_k, top_p; ids >= vocab_size are banned.
      state: the state whose controls restrict tokens and may set the temperature.
      logits: [B, T, V], logits of the causal pass.
      offsets: [B] int32, the position in the response of the first predicted token.
      states: [B, T] int32, the automaton's state before each predicted token, or None.
    """
    length, controls, automaton = logits.shape[1], state.controls, state.controls.automaton
    logits = without_unknown(logits, config.vocab_size)
    logits = restrict(
        logits, controls.pinned_at(offsets, length), controls.allowed_at(offsets, length)
    )
    if automaton is not None and states is not None:
        remaining = (state.limits - offsets)[:, None] - jnp.arange(length)  # [B, T]
        valid = allowed(automaton, states.reshape(-1), remaining.reshape(-1))  # [B * T, V]
        valid = valid.reshape(logits.shape)  # [B, T, V]
        possible = jnp.any(valid & jnp.isfinite(logits), axis=-1, keepdims=True)  # [B, T, 1]
        logits = jnp.where(valid | ~possible, logits, -jnp.inf)
    return adjust(logits, state.temperature(config), config.top_k, state.top_p(config))
