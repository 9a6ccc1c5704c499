"""Keys and values: of a block of tokens, of a prefix to attend to, and the K/V cache.

`KV` is a pair (stacked, single). Of scanned layers `stacked` has one (key, value) pair for each
position of the layer pattern, stacked over its G repetitions: [G, B, K, S, H]. `single` has one
pair for each other layer, [B, K, S, H]: the leftover ones of a scan, or all layers without one,
which read them where they lie. Heads stand in front of tokens, as the products of attention want
them. Keys are stored after their norm and rotary embedding. Layers that share the keys and values
of an earlier one have none here.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusiongemma.models.arrays import Array
from diffusiongemma.models.config import LayerStack, ModelConfig
from diffusiongemma.models.masks import KeyTokens, canvas_prefix_window

# [B, K, S, H], of M blocks [B, K, M, T, H]; of scanned layers with G before them.
Heads = Float[Array, '... _ _ _ _']
KV = tuple[tuple[tuple[Heads, Heads], ...], tuple[tuple[Heads, Heads], ...]]


def cache_slots(config: ModelConfig, capacity: int) -> dict[str, int]:
    """Slots per row of a cache for `capacity` tokens, by layer type.

    A layer with a window W keeps what a later pass may still see of it. A causal query sees the
    W - 1 keys before its own. A canvas sees `canvas_prefix_window(W)` tokens, with `predict_next`
    those before the last cached one, which then stands in the canvas itself.
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
    """Zero keys and values of each row, `slots` of them in a layer of each type.

    `scanned` says whether the layers are a loop (`Execution.scan_layers`).
    """

    def pair(kind: str, *lead: int) -> tuple[Heads, Heads]:
        attention = config.attention(kind)
        shape = (*lead, batch_size, attention.num_kv_heads, slots[kind], attention.head_dim)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    stack = config.kv_layers.as_loop(scanned)
    stacked = tuple(pair(kind, stack.num_groups) for kind in stack.stacked)
    return stacked, tuple(pair(kind) for kind in stack.single)


def kv_stack(config: ModelConfig, kv: KV) -> LayerStack:
    """The layers that keys and values belong to, in a loop where these are stacked."""
    return config.kv_layers.as_loop(bool(kv[0]))


def layer_kv(config: ModelConfig, kv: KV, layer: int) -> tuple[Heads, Heads]:
    """Keys and values that a layer attends to, its own or an earlier one's, [B, K, ..., H] each."""
    (stacked, single), stack = kv, kv_stack(config, kv)
    layer = config.kv_source(layer)
    first_single = len(stack.types) - len(stack.single)
    if layer >= first_single:
        return single[layer - first_single]
    group, place = divmod(layer, len(stack.stacked))
    key, value = stacked[place]
    return key[group], value[group]


def last_kv(config: ModelConfig, kv: KV, kind: str) -> tuple[Heads, Heads]:
    """Keys and values of the last layer of a type that has its own, [B, K, ..., H] each."""
    types = config.kv_layers.types
    return layer_kv(config, kv, max(i for i, layer in enumerate(types) if layer == kind))


def ring_tokens(lengths: Int[Array, ' B'], slots: int) -> KeyTokens:
    """What a ring of R slots holds of rows of `lengths` [B] tokens: the last R, p in slot p mod R.

    A ring that no row has filled is a plain cache, where the slot of a token is its position.
    """
    last = lengths[:, None] - 1
    positions = last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots  # [B, R]
    return KeyTokens(positions, (positions >= 0).astype(jnp.int32))


@flax.struct.dataclass
class Prefix:
    """What a pass may attend to besides its own tokens; read only.

    Attributes:
      kv: keys and values of S tokens, as of `KVCache`; of a cache also leaves of fewer slots,
        which are rings.
      positions: [B, S] int32, position of each token in its document.
      segment_ids: [B, S] int32, document of each token; 0 marks an empty slot.
      lengths: [B] int32, tokens of each row of a cache; None for packed rows.
    """

    kv: Any
    positions: Int[Array, 'B S']
    segment_ids: Int[Array, 'B S']
    lengths: Int[Array, ' B'] | None = None

    @classmethod
    def empty(
        cls, config: ModelConfig, batch_size: int, dtype: Any, scanned: bool = True
    ) -> 'Prefix':
        """A prefix of no tokens (S = 0); `scanned` as for `zeros_kv`."""
        nothing = jnp.zeros((batch_size, 0), jnp.int32)
        kv = zeros_kv(config, batch_size, cache_slots(config, 0), dtype, scanned)
        return cls(kv, nothing, nothing)

    def key_tokens(self, slots: int) -> KeyTokens:
        """The tokens behind the keys of a leaf of that many slots."""
        if slots == self.positions.shape[1]:
            return KeyTokens(self.positions, self.segment_ids)
        assert self.lengths is not None  # a ring is part of a cache
        return ring_tokens(self.lengths, slots)

    def tokens_by_kind(self, config: ModelConfig) -> dict[str, KeyTokens]:
        """The tokens behind the keys of the layers of each type."""
        (stacked, single), stack = self.kv, kv_stack(config, self.kv)
        pairs = zip((*stack.stacked, *stack.single), (*stacked, *single), strict=True)
        return {kind: self.key_tokens(key.shape[-2]) for kind, (key, _) in pairs}


@flax.struct.dataclass
class KVCache:
    """K/V cache with one document a row. Rows only grow.

    A leaf of R slots holds the last R tokens of a row: the token at position p is in slot p mod R
    (`ring_tokens`). R is the capacity where a layer sees everything, and less where it has a window
    (`cache_slots`). What is appended overwrites what falls out of the ring, so that a row can't
    be shortened again: a draft is encoded first, and only what holds of it is appended.

    Attributes:
      kv: keys and values, leaves [..., B, K, R, H]: a `KV`, or what another model has.
      lengths: [B] int32, tokens of each row.
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
        """An empty cache for `capacity` tokens a row; `scanned` as for `zeros_kv`."""
        kv = zeros_kv(config, batch_size, cache_slots(config, capacity), dtype, scanned)
        return cls(kv, jnp.zeros((batch_size,), jnp.int32))

    def append(self, block_kv: Any, counts: Int[Array, ' B']) -> 'KVCache':
        """Appends the first `counts` of T tokens to each row.

        Args:
          block_kv: keys and values [..., B, K, T, H] of T tokens per row, as `encode` returns them.
          counts: [B] int32, how many of the T tokens are appended; 0 leaves a row as it is.
        """
        counts = counts.astype(jnp.int32)

        def write(cache: jax.Array, block: jax.Array) -> jax.Array:
            slots, length = cache.shape[-2], block.shape[-2]
            index = jnp.arange(length)
            last = counts[:, None]
            written = (index < last) & (index >= last - slots)  # [B, T]; the rest is dropped
            where = jnp.where(written, (self.lengths[:, None] + index) % slots, slots)
            rows = jnp.arange(cache.shape[-4])[:, None]
            stacked = cache.reshape(-1, *cache.shape[-4:])  # [G, B, K, R, H]
            block = block.astype(cache.dtype).reshape(-1, *block.shape[-4:])
            block = block.transpose(1, 3, 0, 2, 4)  # [B, T, G, K, H]
            return stacked.at[:, rows, :, where].set(block, mode='drop').reshape(cache.shape)

        return KVCache(jax.tree.map(write, self.kv, block_kv), self.lengths + counts)

    def as_prefix(self) -> Prefix:
        """What the rows hold, as a prefix of segment 1."""
        slots = max(leaf.shape[-2] for leaf in jax.tree.leaves(self.kv))
        return Prefix(self.kv, *ring_tokens(self.lengths, slots), self.lengths)


def cache_bytes(config: ModelConfig, context: int, dtype: Any = jnp.bfloat16) -> int:
    """Bytes of a K/V cache for one sequence of `context` tokens."""
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, context, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.kv))
