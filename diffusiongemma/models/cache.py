"""Keys and values of a block of tokens or of a prefix, and the K/V cache.

`KV` is a pair (stacked, single). For scanned layers, `stacked` has one (key, value) pair for each
position of the layer pattern, stacked over its G repetitions: [G, B, K, S, H]. `single` has one
pair [B, K, S, H] for each other layer: the layers left over after a scan, or all layers if there
is no scan, which avoids copies. Heads come before tokens, as the matmuls of attention need them.
Keys are stored after their norm and rotary embedding. Layers that share the keys and values of an
earlier layer are not included.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusiongemma.models.arrays import Array
from diffusiongemma.models.config import LayerStack, ModelConfig
from diffusiongemma.models.masks import KeyTokens, canvas_prefix_window

# [B, K, S, H], or [B, K, M, T, H] of M blocks; scanned layers have a leading axis G.
Heads = Float[Array, '... _ _ _ _']
KV = tuple[tuple[tuple[Heads, Heads], ...], tuple[tuple[Heads, Heads], ...]]


def cache_slots(config: ModelConfig, capacity: int) -> dict[str, int]:
    """Returns the number of slots per row of a cache for `capacity` tokens, by layer type.

    A layer with a window W keeps the tokens that a later pass can still see. A causal query sees
    the W - 1 keys before its own. A canvas sees `canvas_prefix_window(W)` tokens; with
    `predict_next` these end before the last cached token, which is then part of the canvas.
    """
    slots = {}
    for kind in sorted(set(config.kv_layers.types)):
        window = config.attention(kind).window
        needed = capacity if window is None else max(window - 1, canvas_prefix_window(window) + 1)
        slots[kind] = min(capacity, needed)
    return slots


def zeros_kv(
    config: ModelConfig, batch_size: int, slots: dict[str, int], dtype: Any, scanned: bool = True
) -> KV:
    """Returns zero keys and values, with `slots` tokens per row in the layers of each type.

    `scanned` is `Execution.scan_layers`.
    """

    def pair(kind: str, *lead: int) -> tuple[Heads, Heads]:
        attention = config.attention(kind)
        shape = (*lead, batch_size, attention.num_kv_heads, slots[kind], attention.head_dim)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    stack = config.kv_layers.as_loop(scanned)
    stacked = tuple(pair(kind, stack.num_groups) for kind in stack.stacked)
    return stacked, tuple(pair(kind) for kind in stack.single)


def kv_stack(config: ModelConfig, kv: KV) -> LayerStack:
    """Returns the stack of layers of keys and values; it is scanned if these are stacked."""
    return config.kv_layers.as_loop(bool(kv[0]))


def layer_kv(config: ModelConfig, kv: KV, layer: int) -> tuple[Heads, Heads]:
    """Returns the keys and values that a layer attends to, [B, K, ..., H] each."""
    (stacked, single), stack = kv, kv_stack(config, kv)
    layer = config.kv_source(layer)
    first_single = len(stack.types) - len(stack.single)
    if layer >= first_single:
        return single[layer - first_single]
    group, place = divmod(layer, len(stack.stacked))
    key, value = stacked[place]  # [G, B, K, ..., H]
    return key[group], value[group]


def last_kv(config: ModelConfig, kv: KV, kind: str) -> tuple[Heads, Heads]:
    """Returns keys and values of the last non-sharing layer of a type, [B, K, ..., H] each."""
    types = config.kv_layers.types
    return layer_kv(config, kv, max(i for i, layer in enumerate(types) if layer == kind))


def ring_tokens(lengths: Int[Array, ' B'], slots: int) -> KeyTokens:
    """Returns the tokens in a ring of R slots for rows of `lengths` [B] tokens.

    These are the last R tokens, with position p in slot p mod R. Before a ring is full, the slot of
    a token is its position, as in a plain cache.
    """
    last = lengths[:, None] - 1  # [B, 1], the position of the last token
    positions = last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots  # [B, R]
    return KeyTokens(positions, (positions >= 0).astype(jnp.int32))


@flax.struct.dataclass
class Prefix:
    """The read-only tokens that a pass attends to in addition to its own.

    Attributes:
      kv: keys and values of S tokens; for a cache, leaves with fewer slots are rings.
      positions: [B, S] int32, the position of each token in its document.
      segment_ids: [B, S] int32, the document of each token; 0 marks an empty slot.
      lengths: [B] int32, the number of tokens of each row of a cache; None for packed rows.
    """

    kv: Any
    positions: Int[Array, 'B S']
    segment_ids: Int[Array, 'B S']
    lengths: Int[Array, ' B'] | None = None

    @classmethod
    def empty(
        cls, config: ModelConfig, batch_size: int, dtype: Any, scanned: bool = True
    ) -> 'Prefix':
        """Returns a prefix without tokens (S = 0); `scanned` is `Execution.scan_layers`."""
        no_tokens = jnp.zeros((batch_size, 0), jnp.int32)
        kv = zeros_kv(config, batch_size, cache_slots(config, 0), dtype, scanned)
        return cls(kv, no_tokens, no_tokens)

    def key_tokens(self, slots: int) -> KeyTokens:
        """Returns the tokens of the keys in a leaf with this number of slots."""
        if slots == self.positions.shape[1]:
            return KeyTokens(self.positions, self.segment_ids)
        assert self.lengths is not None  # only a cache has rings
        return ring_tokens(self.lengths, slots)

    def tokens_by_kind(self, config: ModelConfig) -> dict[str, KeyTokens]:
        """Returns the tokens of the keys in the layers of each type."""
        (stacked, single), stack = self.kv, kv_stack(config, self.kv)
        pairs = zip((*stack.stacked, *stack.single), (*stacked, *single), strict=True)
        return {kind: self.key_tokens(key.shape[-2]) for kind, (key, _) in pairs}


@flax.struct.dataclass
class KVCache:
    """A K/V cache with one document per row. Rows only grow.

    A leaf with R slots holds the last R tokens of a row: the token at position p is in slot p mod R
    (`ring_tokens`). R is the capacity for a full layer and less for a layer with a window
    (`cache_slots`). Appended tokens overwrite the oldest ones of a ring, so a row can't be
    shortened again: a draft is encoded first, and only its accepted tokens are appended.

    Attributes:
      kv: keys and values, [..., B, K, R, H].
      lengths: [B] int32, the number of tokens of each row.
    """

    kv: Any
    lengths: Int[Array, ' B']

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: Any = jnp.float32,
        scanned: bool = True,
    ) -> 'KVCache':
        """Returns an empty cache for `capacity` tokens per row, see `zeros_kv` for `scanned`."""
        kv = zeros_kv(config, batch_size, cache_slots(config, capacity), dtype, scanned)
        return cls(kv, jnp.zeros((batch_size,), jnp.int32))

    def append(self, block_kv: Any, counts: Int[Array, ' B']) -> 'KVCache':
        """Returns the cache with the first `counts` of T tokens appended to each row.

        Args:
          block_kv: keys and values [..., B, K, T, H] of T tokens per row, as `encode` returns them.
          counts: [B] int32, the number of appended tokens; 0 leaves a row unchanged.
        """
        counts = counts.astype(jnp.int32)

        def write(cache: jax.Array, block: jax.Array) -> jax.Array:
            slots, length = cache.shape[-2], block.shape[-2]
            index = jnp.arange(length)
            last = counts[:, None]
            # Only the last R: a scatter of several tokens to one slot has no defined order.
            written = (index < last) & (index >= last - slots)  # [B, T]; others are dropped
            where = jnp.where(written, (self.lengths[:, None] + index) % slots, slots)
            rows = jnp.arange(cache.shape[-4])[:, None]
            stacked = cache.reshape(-1, *cache.shape[-4:])  # [G, B, K, R, H]
            block = block.astype(cache.dtype).reshape(-1, *block.shape[-4:])  # [G, B, K, T, H]
            # A slice between the indices of rows and slots moves their axes [B, T] to the front.
            block = block.transpose(1, 3, 0, 2, 4)  # [B, T, G, K, H]
            return stacked.at[:, rows, :, where].set(block, mode='drop').reshape(cache.shape)

        return KVCache(jax.tree.map(write, self.kv, block_kv), self.lengths + counts)

    def as_prefix(self) -> Prefix:
        """Returns the cached tokens as a prefix with segment id 1."""
        slots = max(leaf.shape[-2] for leaf in jax.tree.leaves(self.kv))
        return Prefix(self.kv, *ring_tokens(self.lengths, slots), self.lengths)


def cache_bytes(config: ModelConfig, context: int, dtype: Any = jnp.bfloat16) -> int:
    """Returns the size in bytes of a K/V cache for one sequence of `context` tokens."""
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, context, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.kv))
