"""The model as sampling sees it: what it must offer, and its passes against the K/V cache."""

from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from diffusiongemma.models.arrays import Array, Params
from diffusiongemma.models.cache import KVCache, Prefix
from diffusiongemma.models.config import LightConfig


@runtime_checkable
class CausalModel(Protocol):
    """A flax module that can be sampled autoregressively.

    `config` holds at least `vocab_size`. Keys and values may be any pytree of arrays
    [..., B, K, T, H]; the sampler only stores and returns them. A model may also have
    `empty_kv(batch_size, capacity)`: zeros like the keys and values of `capacity` tokens, but with
    fewer slots in place of T where a layer sees only the last tokens. Such an array is a ring
    (`KVCache`), and `prefix.key_tokens(slots)` says which tokens it holds. Without that method the
    cache has a slot for every token.
    """

    config: Any

    def apply(self, variables: dict, *args: Any, method: str) -> Any: ...

    def encode(
        self,
        tokens: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
        segment_ids: Int[Array, 'B T'],
        prefix: Prefix | None = None,
    ) -> tuple[Float[Array, 'B T D'], Any]:
        """Causal pass over tokens [B, T]: hidden states [B, T, D], keys and values."""
        ...

    def unembed(self, hidden: Float[Array, '*B D']) -> Float[Array, '*B V']:
        """[..., D] -> float32 logits [..., V]."""
        ...


@runtime_checkable
class DenoisingModel(CausalModel, Protocol):
    """A flax module that can also denoise; `config` holds `canvas_length` too.

    Where the config has a `mask_id` that is not None, noise is this token and a position that took
    a candidate keeps it (masked diffusion); else noise is uniform.
    """

    def denoise(
        self,
        canvas: Int[Array, 'B M C'],
        starts: Int[Array, 'B M'],
        segment_ids: Int[Array, 'B M'],
        prefix: Prefix,
        soft_embeddings: Float[Array, 'B M C D'] | None = None,
    ) -> Float[Array, 'B M C V']:
        """Canvases [B, N, C] behind a prefix -> float32 logits [B, N, C, V].

        A model whose config has a false `self_conditioning` has no use for soft embeddings. A
        model whose config has a true `predict_next` also gets `previous` [B, N] int32, the
        token before each canvas.
        """
        ...

    def soft_embed(self, logits: Float[Array, '*B V']) -> Float[Array, '*B D']:
        """[..., V] -> expected embeddings [..., D], the self-conditioning input."""
        ...


def denoising(model: CausalModel) -> DenoisingModel:
    """The same model; raises TypeError where it has no denoise pass."""
    if not hasattr(model, 'denoise'):
        raise TypeError(f'{type(model).__name__} has no method denoise, see DenoisingModel.')
    return cast(DenoisingModel, model)  # one without self-conditioning may lack soft_embed


def predicts_next(model: CausalModel) -> bool:
    """Whether a canvas token is predicted at the position before its own."""
    return getattr(model.config, 'predict_next', False)


def self_conditions(model: CausalModel) -> bool:
    """Whether a denoise pass reads what the one before it believed."""
    return getattr(model.config, 'self_conditioning', True)


def canvas_length(model: CausalModel) -> int:
    """Tokens of a canvas; 0 of a model without one."""
    return getattr(model.config, 'canvas_length', 0)


def max_positions(model: CausalModel) -> int | None:
    """The longest text that the model is made for; None for no limit."""
    return getattr(model.config, 'max_positions', None)


def light_config(model: CausalModel) -> LightConfig | None:
    """What a light denoiser has; None for any other model."""
    return getattr(model, 'light', None)


def mask_id(model: CausalModel) -> int | None:
    """The token that stands for noise; None for uniform noise."""
    return getattr(model.config, 'mask_id', None)


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
    """Encodes prompts behind what is cached.

    Args:
      model: the model.
      params: its parameters.
      cache: with room for them, see `empty_cache`.
      tokens: [B, P] int32, right-padded.
      lengths: [B] int32, tokens of each prompt, at least 1.
      chunk: prompts are encoded so many tokens at a time, which bounds the memory of masks and
        activations; None for all at once.
      is_empty: that the cache holds nothing yet, which saves looking at it.

    Returns:
      The hidden state of each prompt's last token [B, D] and the longer cache.
    """
    batch_size, width = tokens.shape
    chunk = min(chunk or width, width)
    padded = jnp.pad(tokens, ((0, 0), (0, -width % chunk)))
    chunks = padded.reshape(batch_size, -1, chunk).swapaxes(0, 1)  # [chunks, B, T]
    ends = cache.lengths + lengths

    def append(cache: KVCache, tokens: Int[Array, 'B T'], prefix: Prefix | None):
        counts = jnp.clip(ends - cache.lengths, 0, chunk)
        hidden, kv = _encode(model, params, tokens, counts, cache.lengths, prefix)
        last = jnp.maximum(counts - 1, 0)[:, None, None]
        last = jnp.take_along_axis(hidden, last, axis=1)[:, 0]  # [B, D]
        return _append(cache, hidden, kv, counts), last, counts > 0

    def next_chunk(carry: tuple[KVCache, Float[Array, 'B D']], tokens: Int[Array, 'B T']):
        cache, last = carry
        cache, latest, some = append(cache, tokens, cache.as_prefix())
        return (cache, jnp.where(some[:, None], latest, last)), None

    cache, last, _ = append(cache, chunks[0], None if is_empty else cache.as_prefix())
    if len(chunks) > 1:
        (cache, last), _ = jax.lax.scan(next_chunk, (cache, last), chunks[1:])
    return last, cache


def empty_cache(model: CausalModel, params: Params, batch_size: int, capacity: int) -> KVCache:
    """A cache for `capacity` tokens a row, with rings where the model has some."""
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
    """The causal pass over the first `counts` [B] of tokens [B, T], which begin at `starts` [B]."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions = starts[:, None] + index
    segment_ids = (index < counts[:, None]).astype(jnp.int32)
    args = (tokens, positions, segment_ids, prefix)
    return model.apply({'params': params}, *args, method='encode')


def _append(
    cache: KVCache, hidden: Float[Array, 'B T D'], kv: Any, counts: Int[Array, ' B']
) -> KVCache:
    """Appends the first `counts` [B] tokens of a block to the rows whose hidden states are finite.

    That the write depends on the last hidden states puts it behind everything that the pass
    reads. Otherwise XLA can't tell, and copies the whole cache twice in each step of a loop.
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
    """Encodes T more tokens of each active row behind its cached ones (commit, AR step).

    Arguments as of `encode_block`.

    Returns:
      Hidden states [B, T, D] and the longer cache; that of inactive rows stays as it is.
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
    """The causal pass over T tokens behind the cached ones; the cache is not written.

    Args:
      model: the model.
      params: its parameters.
      cache: what the rows hold so far; rows may differ in length.
      tokens: [B, T] int32.
      active: [B] bool; what is returned for the other rows means nothing.

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
    """One denoise pass over a canvas after the cached tokens: logits [B, C, V].

    Args:
      model: the denoiser.
      params: its parameters.
      cache: what the rows hold.
      canvas: [B, C] int32.
      soft_embeddings: [B, C, D].
      last_token: [B] int32, the token before the canvas.
      first: tokens between the cached ones and the canvas, 0 or 1: a pending one.
      teacher_state: [B, D], for a light denoiser that reads it.
    """
    starts = cache.lengths[:, None] + first
    logits = model.apply(
        {'params': params},
        canvas[:, None],
        starts,
        jnp.ones_like(starts),
        cache.as_prefix(),
        soft_embeddings[:, None],
        **_more(model, last_token, teacher_state),
        method='denoise',
    )
    return logits[:, 0]


@jax.named_scope('denoise')
def denoise_hidden(
    model: Any,
    params: Params,
    cache: KVCache,
    canvas: Int[Array, 'B C'],
    pending: Int[Array, ' B'],
    teacher_state: Float[Array, 'B D'],
) -> Float[Array, 'B K D']:
    """Hidden states [B, K, D] that predict what follows the pending tokens, without the head.

    Args:
      model: a DiffusionGemma.
      params: its parameters.
      cache: the tokens before the pending ones.
      canvas: [B, C] int32 noise; where the model does not predict next tokens, the first of each
        row gives its place to the pending token.
      pending: [B] int32.
      teacher_state: [B, D], hidden states of the last cached tokens.
    """
    starts, shifted = cache.lengths[:, None], predicts_next(model)
    if shifted:
        starts = starts + 1
    else:
        canvas = canvas.at[:, 0].set(pending)
    hidden = model.apply(
        {'params': params},
        canvas[:, None],
        starts,
        jnp.ones_like(starts),
        cache.as_prefix(),
        **_more(model, pending, teacher_state),
        method='denoise_hidden',
    )[:, 0]
    return hidden if shifted else hidden[:, 1:]


def _more(
    model: CausalModel,
    last_token: Int[Array, ' B'],
    teacher_state: Float[Array, 'B D'] | None,
) -> dict[str, Array]:
    """Arguments of a denoise pass that not every model takes."""
    more = {}
    if predicts_next(model):
        more['previous'] = last_token[:, None]
    light = light_config(model)
    if light is not None and light.teacher_state and teacher_state is not None:
        more['teacher_state'] = teacher_state[:, None]
    return more


def soft_embed(
    model: DenoisingModel, params: Params, logits: Float[Array, 'B C V']
) -> Float[Array, 'B C D']:
    """Self-conditioning input of the next denoise pass: [B, C, V] -> [B, C, D]."""
    return model.apply({'params': params}, logits, method='soft_embed')


def no_soft_embeddings(
    model: DenoisingModel, params: Params, batch_size: int, canvas_length: int
) -> Float[Array, 'B C D']:
    """Zeros [B, C, D] in the model's own dtype: self-conditioning of a first step."""
    logits = jax.ShapeDtypeStruct((batch_size, canvas_length, model.config.vocab_size), jnp.float32)
    out = jax.eval_shape(lambda p, x: soft_embed(model, p, x), params, logits)
    return jnp.zeros(out.shape, out.dtype)
