"""Generation by discrete diffusion: canvas after canvas, each denoised as a whole.

prefill -> while rows are unfinished { noise -> while rows are uncertain { denoise -> accept ->
renoise -> stop? } -> emit -> commit }. Both loops are `lax.while_loop`s (the outer one is the
sampler's), so that the whole compiles to one program that never waits for the host.
"""

from typing import Any

import jax
import jax.numpy as jnp

from diffusiongemma.models.cache import KVCache
from diffusiongemma.sampling import passes
from diffusiongemma.sampling.epilogue import read_logits
from diffusiongemma.sampling.passes import DenoisingModel
from diffusiongemma.sampling.randomness import fold_in_rows, row_keys, split_rows, uniform_tokens
from diffusiongemma.sampling.state import (
    DenoiseState,
    GenerationState,
    SamplingConfig,
)


def start(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    rng: jax.Array,
) -> GenerationState:
    """Prefills the prompts.

    Args:
      model: the denoiser.
      config: how to sample.
      params: the model's parameters.
      tokens: [B, P] int32 prompts, right-padded.
      lengths: [B] int32, tokens of each prompt, at least 1.
      rng: one key, or one per row [B].
    """
    canvas_length = model.config.canvas_length
    max_canvases = -(-config.max_new_tokens // canvas_length)
    # The last canvas is never committed.
    capacity = tokens.shape[1] + (max_canvases - 1) * canvas_length
    _, cache = passes.prefill(model, params, tokens, lengths, capacity, config.prefill_chunk)
    return GenerationState.create(config, cache, row_keys(rng, tokens.shape[0]), tokens)


def next_canvas(
    model: DenoisingModel, config: SamplingConfig, params: Any, state: GenerationState
) -> GenerationState:
    """Denoises one canvas of every unfinished row, emits it and commits it to the cache."""
    active = ~state.finished
    keys = fold_in_rows(state.keys, state.blocks)
    canvas = denoise_canvas(
        model, config, params, state.cache, keys, active, last_token=state.last_token
    )
    state = state.emit(config, canvas.argmax, canvas.steps)
    state = state.replace(canvases=state.canvases + active)

    def commit(cache: KVCache) -> KVCache:
        return passes.extend(model, params, cache, canvas.argmax, ~state.finished)[1]

    cache = jax.lax.cond(state.running, commit, lambda cache: cache, state.cache)
    return state.replace(cache=cache)


def denoise_canvas(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Any,
    cache: KVCache,
    keys: jax.Array,
    active: jax.Array,
    pinned: jax.Array | None = None,
    max_steps: jax.Array | None = None,
    last_token: jax.Array | None = None,
) -> DenoiseState:
    """Takes a canvas from noise to its last step, row by row as far as each row needs.

    Args:
      model: the denoiser.
      config: how to sample.
      params: the denoiser's parameters.
      cache: the tokens before the canvas.
      keys: [B] keys of this canvas.
      active: [B] bool; the other rows take no step.
      pinned: [B, C] int32, the token that a position holds throughout, -1 where it is open;
        None for all open.
      max_steps: [B] int32, limit of each row's steps beside the config's; None for no other.
      last_token: [B] int32, the last cached token; may be None for a model that needs none.

    Returns:
      The state after the last step; `argmax` is the result, `steps` its cost.
    """
    batch_size, length = keys.shape[0], model.config.canvas_length
    noise_keys, step_keys = split_rows(keys)
    window = config.stopping_rule.history_length
    if pinned is None:
        pinned = jnp.full((batch_size, length), -1, jnp.int32)
    if max_steps is None:
        max_steps = jnp.full((batch_size,), config.max_denoising_steps, jnp.int32)
    if last_token is None:
        last_token = jnp.zeros((batch_size,), jnp.int32)
    state = DenoiseState(
        step=jnp.zeros((), jnp.int32),
        canvas=hold(pinned, uniform_tokens(noise_keys, length, _noise_vocab(model, config))),
        argmax_history=jnp.full((batch_size, window, length), -1, jnp.int32),
        soft_embeddings=passes.no_soft_embeddings(model, params, batch_size, length),
        stopped=~active,
        steps=jnp.zeros((batch_size,), jnp.int32),
        pinned=pinned,
        max_steps=max_steps,
        last_token=last_token,
    )
    return jax.lax.while_loop(
        lambda state: (state.step < config.max_denoising_steps) & ~jnp.all(state.stopped),
        lambda state: denoise_step(model, config, params, cache, step_keys, state),
        state,
    )


def hold(pinned: jax.Array, canvas: jax.Array) -> jax.Array:
    """The canvas with its pinned tokens in their places; [..., C] int32 twice."""
    return jnp.where(pinned >= 0, pinned, canvas)


def denoise_step(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Any,
    cache: KVCache,
    keys: jax.Array,
    state: DenoiseState,
) -> DenoiseState:
    """One denoise pass, and what follows from it; stopped rows keep their state.

    Args:
      model: the denoiser.
      config: how to sample.
      params: the denoiser's parameters.
      cache: the tokens before the canvas.
      keys: [B] keys of this canvas; the step is folded in here.
      state: the state after `state.step` steps.
    """
    candidate_keys, noise_keys = split_rows(fold_in_rows(keys, state.step))
    temperature = config.schedule.temperature(config.schedule.noise_level(state.step))
    greedy = config.temperature == 0
    if not greedy:
        temperature = temperature * config.temperature

    logits = passes.denoise(
        model, params, cache, state.canvas, state.soft_embeddings, state.last_token
    )  # [B, C, V]
    prediction = read_logits(logits, temperature, None if greedy else candidate_keys)
    # A pinned position is certain, and takes nothing of the entropy bound.
    entropies = jnp.where(state.pinned >= 0, 0.0, prediction.entropies)
    accepted = config.acceptance_rule.accept(entropies)  # [B, C]
    # Nothing is frozen: every position that is not accepted now becomes noise again.
    noise = uniform_tokens(noise_keys, accepted.shape[-1], _noise_vocab(model, config))
    canvas = hold(state.pinned, jnp.where(accepted, prediction.candidates, noise))
    argmax = hold(state.pinned, prediction.argmax)
    history = jnp.concatenate([state.argmax_history[:, 1:], argmax[:, None]], axis=1)  # [B, W, C]
    stop = config.stopping_rule.should_stop(history, entropies)
    stop |= state.step + 1 >= state.max_steps
    soft_embeddings = passes.soft_embed(model, params, logits / temperature)  # [B, C, D]

    def unless_stopped(new: jax.Array, old: jax.Array) -> jax.Array:
        stopped = state.stopped.reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(stopped, old, new)

    return DenoiseState(
        step=state.step + 1,
        canvas=unless_stopped(canvas, state.canvas),
        argmax_history=unless_stopped(history, state.argmax_history),
        soft_embeddings=unless_stopped(soft_embeddings, state.soft_embeddings),
        stopped=state.stopped | stop,
        steps=state.steps + ~state.stopped,
        pinned=state.pinned,
        max_steps=state.max_steps,
        last_token=state.last_token,
    )


def _noise_vocab(model: DenoisingModel, config: SamplingConfig) -> int:
    return config.vocab_size or model.config.vocab_size
