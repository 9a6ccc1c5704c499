"""Grouped-query attention over a shared prefix and the block of tokens itself."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusiongemma.models.arrays import Array
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.fused_attention import attend_fused, fits
from diffusiongemma.models.layers import (
    RMSNorm,
    apply_rope,
    contract,
    kernel_init,
    project,
    rms_normalize,
    weight,
)
from diffusiongemma.models.masks import AttentionMask, CausalMask

# Up to so many queries of a head of keys XLA's programs for CPUs turn the keys of a prefix, a copy
# of the cache, which takes up to 7 times as long as the product with the keys in front.
FEW_QUERIES = 32
MASKED_SCORE = -1e30  # finite, so that a row without visible keys stays free of NaN


class Attention(nn.Module):
    """One attention sub-layer of type `kind` ('sliding' or 'full').

    Queries, keys (with scale) and values (without) are RMS-normed per head, then queries and
    keys are rotated. Scores and softmax are float32. With `shares_kv` the layer has queries
    only: its keys and values are those of an earlier layer.
    """

    config: ModelConfig
    kind: str
    dtype: jnp.dtype
    shares_kv: bool = False
    execution: Execution = Execution()

    def setup(self) -> None:
        config, attention = self.config, self.config.attention(self.kind)
        d, n, k, h = config.width, config.num_heads, attention.num_kv_heads, attention.head_dim
        layout = self.execution.output_major
        self.query = weight(self, 'attention/query', kernel_init(d), (d, n, h), layout)
        if not self.shares_kv:
            self.key = weight(self, 'attention/key', kernel_init(d), (d, k, h), layout)
        if not (self.shares_kv or attention.value_is_key):
            self.value = weight(self, 'attention/value', kernel_init(d), (d, k, h), layout)
        self.output = weight(self, 'attention/output', kernel_init(n * h), (n, h, d), layout)
        # Scores of freshly initialized queries and keys have unit variance.
        init_value = (h * config.query_scale**2) ** -0.25
        norm: dict[str, Any] = {'eps': config.norm_eps, 'scale_offset': config.norm_scale_offset}
        self.query_norm = RMSNorm(**norm, init_value=init_value)
        if not self.shares_kv:
            self.key_norm = RMSNorm(**norm, init_value=init_value)

    def keys_and_values(
        self,
        x: Float[Array, 'B M T D'],
        rope: tuple[Float[Array, 'B M T h'], Float[Array, 'B M T h']],
    ) -> tuple[Float[Array, 'B K M T H'], Float[Array, 'B K M T H']]:
        """Keys and values [B, K, M, T, H] of M blocks of T tokens x [B, M, T, D].

        Not for a layer that shares an earlier one's.
        """
        key = self._project('bmtd,dkh->bmtkh', x, self.key)
        if self.config.attention(self.kind).value_is_key:
            value = key
        else:
            value = self._project('bmtd,dkh->bmtkh', x, self.value)
        if self.config.value_norm:
            value = rms_normalize(value, self.config.norm_eps)
        key = apply_rope(self.key_norm(key), *rope)
        key, value = key.astype(self.dtype), value.astype(self.dtype)
        # Heads in front of tokens once and for all: what is cached is never transposed again.
        return key.transpose(0, 3, 1, 2, 4), value.transpose(0, 3, 1, 2, 4)

    def __call__(
        self,
        x: Float[Array, 'B M T D'],
        rope: tuple[Float[Array, 'B M T h'], Float[Array, 'B M T h']],
        mask: AttentionMask | CausalMask,
        prefix_kv: tuple[Float[Array, 'B K S H'], Float[Array, 'B K S H']],
        block_kv: tuple[Float[Array, 'B K M T H'], Float[Array, 'B K M T H']],
    ) -> Float[Array, 'B M T D']:
        """Attends from M blocks of T tokens to the prefix and to their own block.

        Args:
          x: [B, M, T, D].
          rope: cosine and sine tables [B, M, T, H/2] at the tokens' positions.
          mask: who sees whom.
          prefix_kv: keys and values of the prefix, [B, K, S, H] each.
          block_kv: keys and values of the blocks, [B, K, M, T, H] each.

        Returns:
          [B, M, T, D].
        """
        query = self._project('bmtd,dnh->bmtnh', x, self.query)
        query = apply_rope(self.query_norm(query), *rope) * self.config.query_scale
        query = query.astype(self.dtype)
        shapes = (query.shape, block_kv[0].shape[1], prefix_kv[0].shape[2])
        if isinstance(mask, CausalMask) and fits(*shapes, self.execution):
            context = attend_fused(query, block_kv, mask, self.execution)
        else:
            query_block, keys_first = self.execution.query_block, self.execution.output_major
            context = attend_in_blocks(query, block_kv, prefix_kv, mask, query_block, keys_first)
        output = self._project('bmtnh,nhd->bmtd', context, self.output)
        return output.astype(self.dtype)

    def _project(self, equation: str, x: Float[Array, '...'], kernel: Any) -> Float[Array, '...']:
        return project(equation, x, kernel, self.execution.output_major)


def attend_in_blocks(
    query: Float[Array, 'B M T N H'],
    block_kv: tuple[Float[Array, 'B K M L H'], Float[Array, 'B K M L H']],
    prefix_kv: tuple[Float[Array, 'B K S H'], Float[Array, 'B K S H']],
    mask: AttentionMask | CausalMask,
    query_block: int,
    keys_first: bool = False,
) -> Float[Array, 'B M T N H']:
    """`attend` for some queries at a time, whose scores and mask alone are in memory.

    A part has every n-th query, so that each device of a sharded row works on each of them; in
    the backward pass its scores are computed again. With one part this is `attend`.

    Args:
      query: [B, M, T, N, H].
      block_kv: [B, K, M, L, H] each, of L = T tokens.
      prefix_kv: [B, K, S, H] each; S may be 0.
      mask: who sees whom; a `CausalMask` only where there is more than one part.
      query_block: most queries of a block at a time; 0 for all.
      keys_first: as for `attend`.

    Returns:
      [B, M, T, N, H] in the query's dtype.
    """
    length = query.shape[2]
    if not in_parts(length, query_block):
        assert not isinstance(mask, CausalMask)
        return attend(query, block_kv, prefix_kv, mask, keys_first)
    count = -(-length // query_block)
    size = -(-length // count)
    padded = jnp.pad(query, [(0, 0), (0, 0), (0, count * size - length), (0, 0), (0, 0)])
    parts = padded.reshape(*query.shape[:2], size, count, *query.shape[3:])
    index = jnp.minimum(jnp.arange(count * size), length - 1).reshape(size, count)

    def part(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, index = args
        return attend(query, block_kv, prefix_kv, mask.rows(index), keys_first)

    part = jax.checkpoint(part, prevent_cse=False)
    context = jax.lax.map(part, (jnp.moveaxis(parts, 3, 0), index.T))
    return jnp.moveaxis(context, 0, 3).reshape(padded.shape)[:, :, :length]


def in_parts(length: int, query_block: int) -> bool:
    """Whether so many queries are attended from part by part."""
    return 0 < query_block < length


def attend(
    query: Float[Array, 'B M T N H'],
    block_kv: tuple[Float[Array, 'B K M L H'], Float[Array, 'B K M L H']],
    prefix_kv: tuple[Float[Array, 'B K S H'], Float[Array, 'B K S H']],
    mask: AttentionMask,
    keys_first: bool = False,
) -> Float[Array, 'B M T N H']:
    """Softmax attention over prefix and block without joining their keys in memory.

    Args:
      query: [B, M, T, N, H].
      block_kv: [B, K, M, L, H] each; L is T, or more where these are some of L queries.
      prefix_kv: [B, K, S, H] each; S may be 0.
      mask: who sees whom.
      keys_first: few float32 queries meet the prefix as keys times queries, which on CPUs is
        faster (`output_major_kernels` does the same with weights).

    Returns:
      [B, M, T, N, H] in the query's dtype.
    """
    b, m, t, n, h = query.shape
    block_key, block_value = block_kv
    prefix_key, prefix_value = (a.astype(query.dtype) for a in prefix_kv)
    k, prefix_length = prefix_key.shape[1:3]
    # Heads in front of tokens: each product below is one batched matrix product, and so are
    # its gradients, with no transposes in between.
    query = query.reshape(b, m, t, k, n // k, h).transpose(0, 3, 1, 4, 2, 5)
    query = query.reshape(b, k, m, n // k * t, h)

    def visible_scores(scores: jax.Array, visible: jax.Array) -> jax.Array:
        scores = scores.reshape(b, k, m, n // k, t, -1)
        return jnp.where(visible[:, None, :, None], scores, MASKED_SCORE)

    scores = contract('bkmrh,bkmsh->bkmrs', query, block_key)
    scores = visible_scores(scores, mask.block)
    if prefix_length:
        few = keys_first and m * n // k * t <= FEW_QUERIES and query.dtype == jnp.float32
        score = _scores_keys_first if few else functools.partial(contract, 'bkmrh,bksh->bkmrs')
        prefix_scores = score(query, prefix_key)
        scores = jnp.concatenate([visible_scores(prefix_scores, mask.prefix), scores], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    probs = probs.reshape(b, k, m, n // k * t, -1)
    context = contract('bkmrs,bkmsh->bkmrh', probs[..., prefix_length:], block_value)
    if prefix_length:
        context += contract('bkmrs,bksh->bkmrh', probs[..., :prefix_length], prefix_value)
    context = context.reshape(b, k, m, n // k, t, h).transpose(0, 2, 4, 1, 3, 5)
    return context.astype(query.dtype).reshape(b, m, t, n, h)


def _scores_keys_first(
    query: Float[Array, 'B K M R H'], key: Float[Array, 'B K S H']
) -> Float[Array, 'B K M R S']:
    """[B, K, M, R, H], [B, K, S, H] -> [B, K, M, R, S] float32."""
    b, k, m, r, h = query.shape
    # Without the barrier XLA turns the product round, so that it need not be transposed.
    scores = contract('bksh,bkrh->bksr', key, query.reshape(b, k, m * r, h))
    scores = jax.lax.optimization_barrier(scores).swapaxes(2, 3)
    return scores.reshape(b, k, m, r, -1)
