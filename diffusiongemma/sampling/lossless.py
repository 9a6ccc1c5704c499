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

from diffusiongemma.sampling import passes
from diffusiongemma.sampling.diffusion import denoise_canvas
from diffusiongemma.sampling.epilogue import draw_tokens
from diffusiongemma.sampling.passes import DenoisingModel
from diffusiongemma.sampling.randomness import fold_in_rows, row_keys, split_rows
from diffusiongemma.sampling.state import GenerationState, SamplerOutput, SamplingConfig


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
    def blocks(self) -> jax.Array:
        return self.generation.blocks

    def output(self) -> SamplerOutput:
        return self.generation.output()


def start(
    model: DenoisingModel,
    config: SamplingConfig,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    rng: jax.Array,
) -> LosslessState:
    """Prefills the prompts and draws the first tokens.

    Args:
      model: the denoiser.
      config: how to sample.
      params: the model's parameters.
      tokens: [B, P] int32 prompts, right-padded.
      lengths: [B] int32, tokens of each prompt, at least 1.
      rng: one key, or one per row [B].
    """
    batch_size = tokens.shape[0]
    capacity = tokens.shape[1] + config.max_new_tokens
    hidden, cache = passes.prefill(model, params, tokens, lengths, capacity, config.prefill_chunk)
    first_keys, keys = split_rows(row_keys(rng, batch_size))
    logits = model.apply({'params': params}, hidden, method='unembed')  # [B, V]
    return LosslessState(
        generation=GenerationState.create(config, cache, keys, tokens),
        pending=_draw(logits, config.temperature, first_keys),
        draft_steps=jnp.ones((batch_size,), jnp.int32),
    )


def next_draft(
    model: DenoisingModel, config: SamplingConfig, params: Any, state: LosslessState
) -> LosslessState:
    """Drafts a canvas of every unfinished row, verifies it, emits and caches what holds."""
    generation = state.generation
    active = ~generation.finished
    draft_keys, verify_keys = split_rows(fold_in_rows(generation.keys, generation.blocks))
    length = model.config.canvas_length
    pinned = jnp.full((active.shape[0], length), -1, jnp.int32).at[:, 0].set(state.pending)
    draft = denoise_canvas(
        model,
        config,
        params,
        generation.cache,
        draft_keys,
        active,
        pinned,
        state.draft_steps,
        generation.last_token,
    )
    hidden, block_kv = passes.encode_block(model, params, generation.cache, draft.argmax, active)
    logits = model.apply({'params': params}, hidden, method='unembed')  # [B, C, V]
    counts, pending = verify(logits, draft.argmax, config.temperature, verify_keys)
    cache = generation.cache.append(block_kv, jnp.where(active, counts, 0))
    generation = generation.emit(config, draft.argmax, draft.steps, counts)
    # A draft that held wholly was worth fewer steps, one that fell early is worth more.
    steps = state.draft_steps - (counts == length) + (counts < length // 4)
    return LosslessState(
        generation=generation.replace(cache=cache, canvases=generation.canvases + active),
        pending=pending,
        draft_steps=jnp.clip(steps, 1, config.max_draft_steps),
    )


def verify(
    logits: jax.Array, draft: jax.Array, temperature: float, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How much of each draft holds, and the token that follows.

    Args:
      logits: [B, C, V] causal logits; those at i predict token i + 1.
      draft: [B, C] int32; its first token is known to be right.
      temperature: of the autoregressive distribution, 0 for greedy.
      keys: [B] keys.

    Returns:
      [B] int32, tokens of the draft that hold, at least 1; and [B] int32, the token after them.
    """
    length = draft.shape[1]
    accept_keys, next_keys = split_rows(keys)
    predicting, proposed = logits[:, :-1], draft[:, 1:]
    if temperature == 0:
        holds = jnp.argmax(predicting, axis=-1) == proposed
    else:
        log_probs = jax.nn.log_softmax(predicting / temperature, axis=-1)
        log_probs = jnp.take_along_axis(log_probs, proposed[..., None], axis=-1)[..., 0]
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (length - 1,)))(accept_keys)
        holds = uniform < jnp.exp(log_probs)
    counts = 1 + jnp.sum(jnp.cumprod(holds.astype(jnp.int32), axis=-1), axis=-1)  # [B]
    last = jnp.take_along_axis(logits, (counts - 1)[:, None, None], axis=1)[:, 0]  # [B, V]
    # The residual distribution: p without the token that was refused, if one was.
    refused = jnp.take_along_axis(draft, jnp.minimum(counts, length - 1)[:, None], axis=1)
    refused = jnp.where(counts[:, None] < length, refused, -1)
    last = jnp.where(jnp.arange(last.shape[-1]) == refused, -jnp.inf, last)
    return counts, _draw(last, temperature, next_keys)


def _draw(logits: jax.Array, temperature: float, keys: jax.Array) -> jax.Array:
    """[B, V] -> [B] int32, greedy at temperature 0."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return draw_tokens(logits / temperature, keys)
