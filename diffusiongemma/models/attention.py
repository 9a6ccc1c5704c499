"""Grouped-query attention over a shared prefix and the block of tokens itself."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.layers import (
    RMSNorm,
    apply_rope,
    kernel_init,
    logical_param,
    rms_normalize,
)
from diffusiongemma.models.masks import AttentionMask

MASKED_SCORE = -1e30  # finite, so that a row without visible keys stays free of NaN


class Attention(nn.Module):
    """One attention sub-layer of type `kind` ('sliding' or 'full').

    Queries, keys (with scale) and values (without) are RMS-normed per head, then queries and
    keys are rotated. Scores and softmax are float32.
    """

    config: ModelConfig
    kind: str
    dtype: jnp.dtype

    def setup(self):
        config, attention = self.config, self.config.attention(self.kind)
        d, n, k, h = config.width, config.num_heads, attention.num_kv_heads, attention.head_dim
        self.query = logical_param(
            self, 'query', kernel_init(d), (d, n, h), ('embed', 'heads', 'head_dim')
        )
        kv_axes = ('embed', 'kv_heads', 'head_dim')
        self.key = logical_param(self, 'key', kernel_init(d), (d, k, h), kv_axes)
        if not attention.value_is_key:
            self.value = logical_param(self, 'value', kernel_init(d), (d, k, h), kv_axes)
        self.output = logical_param(
            self, 'output', kernel_init(n * h), (n, h, d), ('heads', 'head_dim', 'embed')
        )
        # Scores of freshly initialised queries and keys have unit variance.
        init_value = (h * config.query_scale**2) ** -0.25
        norm = {'eps': config.norm_eps, 'scale_offset': config.norm_scale_offset}
        self.query_norm = RMSNorm(**norm, init_value=init_value)
        self.key_norm = RMSNorm(**norm, init_value=init_value)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: AttentionMask,
        prefix_kv: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Attends from M blocks of T tokens to the prefix and to their own block.

        Args:
          x: [B, M, T, D].
          rope: cosine and sine tables [B, M, T, H/2] at the tokens' positions.
          mask: who sees whom.
          prefix_kv: keys and values of the prefix, [B, S, K, H] each.

        Returns:
          The output [B, M, T, D] and the block's keys and values, [B, M, T, K, H] each.
        """
        query = jnp.einsum('bmtd,dnh->bmtnh', x, self.query.astype(self.dtype))
        key = jnp.einsum('bmtd,dkh->bmtkh', x, self.key.astype(self.dtype))
        if self.config.attention(self.kind).value_is_key:
            value = key
        else:
            value = jnp.einsum('bmtd,dkh->bmtkh', x, self.value.astype(self.dtype))
        if self.config.value_norm:
            value = rms_normalize(value, self.config.norm_eps).astype(self.dtype)
        query = apply_rope(self.query_norm(query), *rope) * self.config.query_scale
        key = apply_rope(self.key_norm(key), *rope)
        context = attend(query, (key, value), prefix_kv, mask)  # [B, M, T, N, H]
        output = jnp.einsum('bmtnh,nhd->bmtd', context, self.output.astype(self.dtype))
        return output, (key, value)


def attend(
    query: jax.Array,
    block_kv: tuple[jax.Array, jax.Array],
    prefix_kv: tuple[jax.Array, jax.Array],
    mask: AttentionMask,
) -> jax.Array:
    """Softmax attention over prefix and block without joining their keys in memory.

    Args:
      query: [B, M, T, N, H].
      block_kv: [B, M, T, K, H] each.
      prefix_kv: [B, S, K, H] each; S may be 0.
      mask: who sees whom.

    Returns:
      [B, M, T, N, H] in the query's dtype.
    """
    b, m, t, n, h = query.shape
    block_key, block_value = block_kv
    num_kv_heads = block_key.shape[-2]
    query = query.reshape(b, m, t, num_kv_heads, n // num_kv_heads, h)
    scores = jnp.einsum(
        'bmtkgh,bmskh->bmkgts', query, block_key, preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask.block[:, :, None, None], scores, MASKED_SCORE)
    prefix_key, prefix_value = (a.astype(query.dtype) for a in prefix_kv)
    prefix_length = prefix_key.shape[1]
    if prefix_length:
        prefix_scores = jnp.einsum(
            'bmtkgh,bskh->bmkgts', query, prefix_key, preferred_element_type=jnp.float32
        )
        prefix_scores = jnp.where(mask.prefix[:, :, None, None], prefix_scores, MASKED_SCORE)
        scores = jnp.concatenate([prefix_scores, scores], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1).astype(query.dtype)  # [B, M, K, G, T, S + T]
    context = jnp.einsum('bmkgts,bmskh->bmtkgh', probs[..., prefix_length:], block_value)
    if prefix_length:
        context += jnp.einsum('bmkgts,bskh->bmtkgh', probs[..., :prefix_length], prefix_value)
    return context.reshape(b, m, t, n, h)
