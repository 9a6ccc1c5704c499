"""The passes of a model with the K/V cache."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from diffusiongemma.models.arrays import Array, Params
from diffusiongemma.models.cache import KVCache, Prefix
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.sampling.interface import (
    CausalModel,
    DenoisingModel,
    check_logits,
    light_config,
    traits,
)


@jax.named_scope('prefill')
def prefill(
    model: CausalModel,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, 'B P'],
    lengths: Int[Array, ' B'],
    chunk: int | None = None,
    *,
    is_empty: bool = False,
) -> tuple[Float[Array, 'B D'], KVCache]:
    """Encodes prompts and appends them to the cache.

    Args:
      model: a model with a causal pass.
      params: the parameters of the model.
      cache: a cache with enough free slots, see `empty_cache`.
      tokens: [B, P] int32, right-padded.
      lengths: [B] int32, the number of tokens of each prompt, at least 1.
      chunk: the number of tokens that are encoded at a time, which bounds the memory of masks and
        activations; None for all at once.
      is_empty: whether the cache is known to be empty, so that the pass need not attend to it.

    Returns:
      The hidden state of each prompt's last token [B, D] and the extended cache.
    """
    batch_size, width = tokens.shape
    chunk = min(chunk or width, width)
    padded = jnp.pad(tokens, ((0, 0), (0, -width % chunk)))
    chunks = padded.reshape(batch_size, -1, chunk).swapaxes(0, 1)  # [chunks, B, T]
    ends = cache.lengths + lengths

    def append(
        cache: KVCache, tokens: Int[Array, 'B T'], prefix: Prefix | None
    ) -> tuple[KVCache, Float[Array, 'B D'], Bool[Array, ' B']]:
        counts = jnp.clip(ends - cache.lengths, 0, chunk)  # [B], tokens in this chunk
        hidden, kv = _encode(model, params, tokens, counts, cache.lengths, prefix)
        last = jnp.maximum(counts - 1, 0)[:, None, None]
        last = jnp.take_along_axis(hidden, last, axis=1)[:, 0]  # [B, D]
        return _append(cache, hidden, kv, counts), last, counts > 0

    def next_chunk(
        carry: tuple[KVCache, Float[Array, 'B D']], tokens: Int[Array, 'B T']
    ) -> tuple[tuple[KVCache, Float[Array, 'B D']], None]:
        cache, last = carry
        cache, latest, has_tokens = append(cache, tokens, cache.as_prefix())
        return (cache, jnp.where(has_tokens[:, None], latest, last)), None

    cache, last, _ = append(cache, chunks[0], None if is_empty else cache.as_prefix())
    if len(chunks) > 1:
        (cache, last), _ = jax.lax.scan(next_chunk, (cache, last), chunks[1:])
    return last, cache


def empty_cache(model: CausalModel, params: Params, batch_size: int, capacity: int) -> KVCache:
    """Returns an empty cache for `capacity` tokens per row, with rings if the model has them."""
    lengths = jnp.zeros((batch_size,), jnp.int32)
    if hasattr(model, 'empty_kv'):
        return KVCache(model.empty_kv(batch_size, capacity), lengths)
    tokens = jnp.zeros((batch_size, capacity), jnp.int32)
    _, kv = jax.eval_shape(lambda p: _encode(model, p, tokens, lengths, lengths, None), params)
    return KVCache(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kv), lengths)


def _encode(
    model: CausalModel,
    params: Params,
    tokens: Int[Array, 'B T'],
    counts: Int[Array, ' B'],
    starts: Int[Array, ' B'],
    prefix: Prefix | None,
) -> tuple[Float[Array, 'B T D'], Any]:
    """Runs the causal pass over the first `counts` [B] of tokens [B, T], from `starts` [B] on."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = starts[:, None] + index  # [B, T]
    segment_ids = (index < counts[:, None]).astype(jnp.int32)  # [B, T], 0 at padding
    args = (tokens, positions, segment_ids, prefix)
    hidden, kv = model.apply({'params': params}, *args, method='encode')
    return hidden, kv


def _append(
    cache: KVCache, hidden: Float[Array, 'B T D'], kv: Any, counts: Int[Array, ' B']
) -> KVCache:
    """Appends the first `counts` [B] tokens of a block to the rows with finite hidden states.

    The write depends on the last hidden states, so XLA knows that it comes after all reads of the
    pass. Without this dependence, XLA copies the whole cache twice in each step of a loop.
    """
    finite = jnp.isfinite(hidden[:, -1, 0])
    return cache.append(kv, jnp.where(finite, counts, 0))


def extend(
    model: CausalModel,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, 'B T'],
    active: Bool[Array, ' B'],
) -> tuple[Float[Array, 'B T D'], KVCache]:
    """Encodes T tokens of each active row and appends them to the cache (commit, AR step).

    The arguments are those of `encode_block`.

    Returns:
      Hidden states [B, T, D] and the extended cache, which is unchanged for inactive rows.
    """
    hidden, kv = encode_block(model, params, cache, tokens, active)
    return hidden, _append(cache, hidden, kv, jnp.where(active, tokens.shape[1], 0))


@jax.named_scope('encode')
def encode_block(
    model: CausalModel,
    params: Params,
    cache: KVCache,
    tokens: Int[Array, 'B T'],
    active: Bool[Array, ' B'],
) -> tuple[Float[Array, 'B T D'], Any]:
    """Runs the causal pass over T tokens after the cached ones, without writing the cache.

    Args:
      model: a model with a causal pass.
      params: the parameters of the model.
      cache: the K/V cache; rows may differ in length.
      tokens: [B, T] int32.
      active: [B] bool; results for other rows are undefined.

    Returns:
      Hidden states [B, T, D], keys and values of the block.
    """
    counts = jnp.where(active, tokens.shape[1], 0)
    return _encode(model, params, tokens, counts, cache.lengths, cache.as_prefix())


@jax.named_scope('denoise')
def denoise(
    model: DenoisingModel,
    params: Params,
    cache: KVCache,
    canvas: Int[Array, 'B C'],
    soft_embeddings: Float[Array, 'B C D'],
    last_token: Int[Array, ' B'],
    first: int = 0,
    teacher_state: Float[Array, 'B D'] | None = None,
) -> Float[Array, 'B C V']:
    """Runs one denoise pass over a canvas after the cached tokens; returns logits [B, C, V].

    Args:
      model: the diffusion model.
      params: the parameters of the model.
      cache: the K/V cache of the tokens before the canvas.
      canvas: [B, C] int32, noisy tokens.
      soft_embeddings: [B, C, D], the self-conditioning input.
      last_token: [B] int32, the token before the canvas.
      first: the number of tokens between the cached ones and the canvas: 1 for a pending token,
        else 0.
      teacher_state: [B, D], hidden states for a light denoiser that reads them.
    """
    starts = cache.lengths[:, None] + first  # [B, 1], one canvas per row
    segment_ids, more = jnp.ones_like(starts), _more(model, last_token, teacher_state)
    args = (canvas[:, None], starts, segment_ids, cache.as_prefix(), soft_embeddings[:, None])
    logits: jax.Array = model.apply({'params': params}, *args, **more, method='denoise')
    check_logits(model, logits, 'denoise')
    return logits[:, 0]  # [B, C, V]


@jax.named_scope('denoise')
def denoise_hidden(
    model: Any,
    params: Params,
    cache: KVCache,
    canvas: Int[Array, 'B C'],
    pending: Int[Array, ' B'],
    teacher_state: Float[Array, 'B D'],
) -> Float[Array, 'B K D']:
    """Returns the hidden states [B, K, D] that predict the tokens after the pending ones.

    Args:
      model: a DiffusionGemma.
      params: the parameters of the model.
      cache: the K/V cache of the tokens before the pending ones.
      canvas: [B, C] int32 noise; unless the model predicts next tokens, the pending token replaces
        the first token of each row.
      pending: [B] int32, the next token of each row, which is known but not yet encoded.
      teacher_state: [B, D], hidden states of the last cached tokens.
    """
    starts, shifted = cache.lengths[:, None], traits(model).predict_next
    if shifted:
        starts = starts + 1
    else:
        canvas = canvas.at[:, 0].set(pending)
    hidden: jax.Array = model.apply(
        {'params': params},
        canvas[:, None],
        starts,
        jnp.ones_like(starts),
        cache.as_prefix(),
        **_more(model, pending, teacher_state),
        method='denoise_hidden',
    )[:, 0]  # [B, C, D]
    return hidden if shifted else hidden[:, 1:]


def _more(
    model: CausalModel,
    last_token: Int[Array, ' B'],
    teacher_state: Float[Array, 'B D'] | None,
) -> dict[str, Array]:
    """Returns the arguments of a denoise pass that only some models take."""
    more = {}
    if traits(model).predict_next:
        more['previous'] = last_token[:, None]  # [B, 1]
    light = light_config(model)
    if light is not None and light.teacher_state and teacher_state is not None:
        more['teacher_state'] = teacher_state[:, None]  # [B, 1, D]
    return more


def soft_embed(
    model: DenoisingModel,
    params: Params,
    logits: Float[Array, 'B C V'],
    log_z: Float[Array, 'B C'] | None = None,
) -> Float[Array, 'B C D']:
    """Returns the self-conditioning input of the next denoise pass: [B, C, V] -> [B, C, D]."""
    more = (log_z,) if isinstance(model, DiffusionGemma) else ()  # others need not accept it
    soft: jax.Array = model.apply({'params': params}, logits, *more, method='soft_embed')
    return soft


def no_soft_embeddings(
    model: DenoisingModel, params: Params, batch_size: int, canvas_length: int
) -> Float[Array, 'B C D']:
    """Returns the self-conditioning input of a first step: zeros [B, C, D] in the model's dtype."""
    logits = jax.ShapeDtypeStruct((batch_size, canvas_length, model.config.vocab_size), jnp.float32)
    out = jax.eval_shape(lambda p, x: soft_embed(model, p, x), params, logits)
    return jnp.zeros(out.shape, out.dtype)
