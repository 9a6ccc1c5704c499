"""Token by token on the encode pass: the baseline, and how the teacher is sampled."""

from typing import Any

import jax
import jax.numpy as jnp

from diffusiongemma.sampling import passes
from diffusiongemma.sampling.epilogue import draw_tokens
from diffusiongemma.sampling.passes import CausalModel
from diffusiongemma.sampling.randomness import fold_in_rows, row_keys
from diffusiongemma.sampling.state import GenerationState, SamplingConfig


def start(
    model: CausalModel,
    config: SamplingConfig,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    rng: jax.Array,
) -> GenerationState:
    """Prefills the prompts and emits the first token.

    Args:
      model: a Gemma, or a denoiser, of which only the encode pass is used.
      config: how to sample; of it count `temperature` and what ends a response.
      params: the model's parameters.
      tokens: [B, P] int32 prompts, right-padded.
      lengths: [B] int32, tokens of each prompt, at least 1.
      rng: one key, or one per row [B].
    """
    # The last token is never encoded.
    capacity = tokens.shape[1] + config.max_new_tokens - 1
    hidden, cache = passes.prefill(model, params, tokens, lengths, capacity, config.prefill_chunk)
    state = GenerationState.create(config, cache, row_keys(rng, tokens.shape[0]), tokens)
    return _emit_next(model, config, params, state, hidden)


def next_token(
    model: CausalModel, config: SamplingConfig, params: Any, state: GenerationState
) -> GenerationState:
    """Encodes each unfinished row's latest token and emits the next one."""
    latest = jax.lax.dynamic_slice_in_dim(state.tokens, state.blocks - 1, 1, axis=1)  # [B, 1]
    hidden, cache = passes.extend(model, params, state.cache, latest, ~state.finished)
    return _emit_next(model, config, params, state.replace(cache=cache), hidden[:, 0])


def _emit_next(
    model: CausalModel,
    config: SamplingConfig,
    params: Any,
    state: GenerationState,
    hidden: jax.Array,
) -> GenerationState:
    logits = model.apply({'params': params}, hidden, method='unembed')  # [B, V]
    if config.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        keys = fold_in_rows(state.keys, state.blocks)
        token = draw_tokens(logits / config.temperature, keys)
    return state.emit(config, token[:, None], passes=1)
