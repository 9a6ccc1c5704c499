"""Keys and values: of a block of tokens, of a prefix to attend to, and the K/V cache.

`KV` is a pair (groups, tail). `groups` has one (key, value) pair for each position of the
layer pattern, stacked over its G repetitions: [G, B, S, K, H]. `tail` has one pair for each
leftover layer: [B, S, K, H]. Keys are stored after their norm and rotary embedding. Layers that
share the keys and values of an earlier one have none here.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.models.config import ModelConfig

KV = tuple[tuple[tuple[jax.Array, jax.Array], ...], tuple[tuple[jax.Array, jax.Array], ...]]


def zeros_kv(config: ModelConfig, batch_size: int, length: int, dtype: Any) -> KV:
    """Zero keys and values for `length` tokens of each row."""

    def pair(kind: str, *lead: int) -> tuple[jax.Array, jax.Array]:
        attention = config.attention(kind)
        shape = (*lead, batch_size, length, attention.num_kv_heads, attention.head_dim)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    stack = config.kv_layers
    groups = tuple(pair(kind, stack.num_groups) for kind in stack.pattern)
    return groups, tuple(pair(kind) for kind in stack.tail)


def last_kv(config: ModelConfig, kv: KV, kind: str) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the last layer of a type that has its own, [B, ..., K, H] each."""
    (groups, tail), stack = kv, config.kv_layers
    for pair, tail_kind in zip(reversed(tail), reversed(stack.tail), strict=True):
        if tail_kind == kind:
            return pair
    slot = max(i for i, slot_kind in enumerate(stack.pattern) if slot_kind == kind)
    key, value = groups[slot]
    return key[-1], value[-1]


@flax.struct.dataclass
class Prefix:
    """What a pass may attend to besides its own tokens; read only.

    Attributes:
      kv: keys and values of S tokens.
      positions: [B, S] int32, position of each token in its document.
      segment_ids: [B, S] int32, document of each token; 0 marks an empty slot.
    """

    kv: KV
    positions: jax.Array
    segment_ids: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch_size: int, dtype: Any) -> 'Prefix':
        """A prefix of no tokens (S = 0)."""
        nothing = jnp.zeros((batch_size, 0), jnp.int32)
        return cls(zeros_kv(config, batch_size, 0, dtype), nothing, nothing)


@flax.struct.dataclass
class KVCache:
    """K/V cache with one document a row; the slot of a token is its position.

    Attributes:
      kv: keys and values of S slots (S = capacity).
      lengths: [B] int32, filled slots of each row. Rolling a row back means to lower it.
    """

    kv: KV
    lengths: jax.Array

    @classmethod
    def create(
        cls, config: ModelConfig, batch_size: int, capacity: int, dtype: Any = jnp.float32
    ) -> 'KVCache':
        """An empty cache for `capacity` tokens a row."""
        lengths = jnp.zeros((batch_size,), jnp.int32)
        return cls(zeros_kv(config, batch_size, capacity, dtype), lengths)

    @property
    def capacity(self) -> int:
        return jax.tree.leaves(self.kv)[0].shape[-3]

    def append(self, block_kv: KV, counts: jax.Array) -> 'KVCache':
        """Writes T tokens behind each row's last one and keeps the first `counts` of them.

        Args:
          block_kv: keys and values of T tokens per row, as `encode` returns them.
          counts: [B] int32, how many of the T tokens are real; the others are written but
            stay outside `lengths`, so that a later append overwrites them. Slots beyond the
            capacity are dropped: callers size the cache for what they keep.
        """
        length = jax.tree.leaves(block_kv)[0].shape[-3]
        rows = jnp.arange(self.lengths.shape[0])[:, None]  # [B, 1]
        slots = self.lengths[:, None] + jnp.arange(length)  # [B, T]

        def write(cache: jax.Array, block: jax.Array) -> jax.Array:
            block = block.astype(cache.dtype)
            if cache.ndim == 5:  # stacked over pattern groups
                return cache.at[:, rows, slots].set(block, mode='drop')
            return cache.at[rows, slots].set(block, mode='drop')

        kv = jax.tree.map(write, self.kv, block_kv)
        return KVCache(kv, self.lengths + counts.astype(jnp.int32))

    def as_prefix(self) -> Prefix:
        """The filled slots as a prefix of segment 1."""
        batch_size = self.lengths.shape[0]
        slots = jnp.arange(self.capacity, dtype=jnp.int32)
        slots = jnp.broadcast_to(slots, (batch_size, self.capacity))
        return Prefix(self.kv, slots, (slots < self.lengths[:, None]).astype(jnp.int32))
