"""Grouped-query attention of a block of tokens to a shared prefix and to the block itself."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusiongemma.models.arrays import AnyArray, Array
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.kernels.fused_attention import attend_fused, fits
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

# For up to this many queries per key head, XLA on CPUs transposes (copies) the keys of a prefix,
# which takes up to 7 times as long as the matmul with the keys as its first operand.
FEW_QUERIES = 32
MASKED_SCORE = -1e30  # finite, so that a row without visible keys has no NaN


class Attention(nn.Module):
    """An attention sub-layer of type `kind` ('sliding' or 'full').

    Queries and keys (with scale) and, with `config.value_norm`, values (without scale) are
    RMS-normed per head; then queries and keys are rotated. Scores and softmax are float32. With
    `shares_kv` the layer only computes queries and attends to the keys and values of an earlier
    layer.
    """

    config: ModelConfig
    kind: str
    dtype: jnp.dtype
    shares_kv: bool = False
    execution: Execution = Execution()

    def setup(self) -> None:
        config, attention = self.config, self.config.attention(self.kind)
        d, n, k, h = config.width, config.num_heads, attention.num_kv_heads, attention.head_dim
        execution = self.execution
        self.query = weight(self, 'attention/query', kernel_init(d), (d, n, h), execution)
        if not self.shares_kv:
            self.key = weight(self, 'attention/key', kernel_init(d), (d, k, h), execution)
        if not (self.shares_kv or attention.value_is_key):
            self.value = weight(self, 'attention/value', kernel_init(d), (d, k, h), execution)
        self.output = weight(self, 'attention/output', kernel_init(n * h), (n, h, d), execution)
        # With this initial value, the scores of a new model have unit variance.
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
        """Returns keys and values [B, K, M, T, H] of M blocks of T tokens x [B, M, T, D].

        It must not be called on a layer with `shares_kv`.
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
        # Heads before tokens, so that no pass has to transpose the cache.
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
          x: [B, M, T, D], the inputs.
          rope: cosine and sine tables [B, M, T, H/2] at the positions of the tokens.
          mask: the visible keys of each query.
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
    """Computes `attend` for some queries at a time, to limit the memory of scores and masks.

    Each part has every n-th query, so that all devices of a sharded row work on each part. Scores
    are recomputed in the backward pass. With one part this is `attend`.

    Args:
      query: [B, M, T, N, H].
      block_kv: keys and values [B, K, M, T, H] each.
      prefix_kv: keys and values [B, K, S, H] each; S may be 0.
      mask: the visible keys of each query; a `CausalMask` only if there are several parts.
      query_block: the maximum number of queries of a block at a time; 0 for all.
      keys_first: see `attend`.

    Returns:
      [B, M, T, N, H] in the dtype of the query.
    """
    length = query.shape[2]
    if not in_parts(length, query_block):
        assert not isinstance(mask, CausalMask)
        return attend(query, block_kv, prefix_kv, mask, keys_first)
    count = -(-length // query_block)  # P parts
    size = -(-length // count)  # of Q queries
    padded = jnp.pad(query, [(0, 0), (0, 0), (0, count * size - length), (0, 0), (0, 0)])
    parts = padded.reshape(*query.shape[:2], size, count, *query.shape[3:])  # [B, M, Q, P, N, H]
    index = jnp.minimum(jnp.arange(count * size), length - 1).reshape(size, count)  # [Q, P]

    def part(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, index = args  # [B, M, Q, N, H], [Q]
        return attend(query, block_kv, prefix_kv, mask.rows(index), keys_first)

    # Needs no barriers: in a loop of several iterations XLA can't merge recomputed values.
    part = jax.checkpoint(part, prevent_cse=False)
    context = jax.lax.map(part, (jnp.moveaxis(parts, 3, 0), index.T))  # [P, B, M, Q, N, H]
    return jnp.moveaxis(context, 0, 3).reshape(padded.shape)[:, :, :length]


def in_parts(length: int, query_block: int) -> bool:
    """Returns whether attention for `length` queries is computed in several parts."""
    return 0 < query_block < length


def attend(
    query: Float[Array, 'B M T N H'],
    block_kv: tuple[Float[Array, 'B K M L H'], Float[Array, 'B K M L H']],
    prefix_kv: tuple[Float[Array, 'B K S H'], Float[Array, 'B K S H']],
    mask: AttentionMask,
    keys_first: bool = False,
) -> Float[Array, 'B M T N H']:
    """Returns softmax attention over prefix and block, without concatenating their keys.

    Args:
      query: [B, M, T, N, H].
      block_kv: keys and values [B, K, M, L, H] each; L >= T, if these are T of L queries.
      prefix_kv: keys and values [B, K, S, H] each; S may be 0.
      mask: the visible keys of each query.
      keys_first: for few float32 queries, computes prefix scores as keys times queries, which is
        faster on CPUs (`output_major_kernels` does the same for weights).

    Returns:
      [B, M, T, N, H] in the dtype of the query.
    """
    b, m, t, n, h = query.shape
    block_key, block_value = block_kv
    prefix_key, prefix_value = (a.astype(query.dtype) for a in prefix_kv)
    k, prefix_length = prefix_key.shape[1:3]
    # With heads before tokens, each contraction below is one batched matmul, and so are its
    # gradients, without transposes in between.
    # G = N / K queries share a key head, and a block has R = G * T queries per key head.
    query = query.reshape(b, m, t, k, n // k, h).transpose(0, 3, 1, 4, 2, 5)  # [B, K, M, G, T, H]
    query = query.reshape(b, k, m, n // k * t, h)  # [B, K, M, R, H]

    def visible_scores(scores: jax.Array, visible: AnyArray) -> jax.Array:
        scores = scores.reshape(b, k, m, n // k, t, -1)  # [B, K, M, G, T, keys]
        # The mask becomes [B, 1, M, 1, T or 1, keys].
        return jnp.where(visible[:, None, :, None], scores, MASKED_SCORE)

    scores = contract('bkmrh,bkmsh->bkmrs', query, block_key)
    scores = visible_scores(scores, mask.block)
    if prefix_length:
        few = keys_first and m * n // k * t <= FEW_QUERIES and query.dtype == jnp.float32
        score = _scores_keys_first if few else functools.partial(contract, 'bkmrh,bksh->bkmrs')
        prefix_scores = score(query, prefix_key)
        scores = jnp.concatenate([visible_scores(prefix_scores, mask.prefix), scores], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1).astype(query.dtype)  # [B, K, M, G, T, S + L]
    probs = probs.reshape(b, k, m, n // k * t, -1)  # [B, K, M, R, S + L]
    context = contract('bkmrs,bkmsh->bkmrh', probs[..., prefix_length:], block_value)
    if prefix_length:
        context += contract('bkmrs,bksh->bkmrh', probs[..., :prefix_length], prefix_value)
    # [B, K, M, R, H] -> [B, M, T, K, G, H]
    context = context.reshape(b, k, m, n // k, t, h).transpose(0, 2, 4, 1, 3, 5)
    return context.astype(query.dtype).reshape(b, m, t, n, h)


def _scores_keys_first(
    query: Float[Array, 'B K M R H'], key: Float[Array, 'B K S H']
) -> Float[Array, 'B K M R S']:
    """Returns scores: [B, K, M, R, H], [B, K, S, H] -> [B, K, M, R, S] float32."""
    b, k, m, r, h = query.shape
    # Without the barrier XLA swaps the operands of the matmul to avoid the transpose.
    scores: jax.Array = contract('bksh,bkrh->bksr', key, query.reshape(b, k, m * r, h))
    scores = jax.lax.optimization_barrier(scores).swapaxes(2, 3)  # [B, K, M * R, S]
    return scores.reshape(b, k, m, r, -1)
