"""The Gemma backbone and the autoregressive Gemma (the teacher).

Layers are scanned over repetitions of the layer pattern, so that compile time does not
grow with depth. One pass runs over M blocks of T tokens per row (see masks.py).
"""

from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.models.attention import Attention
from diffusiongemma.models.cache import KV, Prefix
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.layers import Embedder, GatedMLP, RMSNorm, logical_param, rope_tables
from diffusiongemma.models.masks import AttentionMask, causal_mask
from diffusiongemma.models.moe import MoE

Pass = Literal['encode', 'denoise']


@flax.struct.dataclass
class PassContext:
    """What all layers of one pass share: rotary tables and masks by layer type."""

    rope: dict[str, tuple[jax.Array, jax.Array]]
    mask: dict[str, AttentionMask]


class Layer(nn.Module):
    """One pre- and post-normed residual layer.

    The encode and the denoise pass share all weights except one scalar on the output.
    """

    config: ModelConfig
    kind: str
    which: Pass
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, prefix_kv: tuple[jax.Array, jax.Array], context: PassContext
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """x [B, M, T, D] -> the same shape, and the block's keys and values."""
        config = self.config

        def norm(name: str, value: jax.Array) -> jax.Array:
            return RMSNorm(config.norm_eps, config.norm_scale_offset, name=name)(value)

        attended, block_kv = Attention(config, self.kind, self.dtype, name='attention')(
            norm('pre_attention_norm', x),
            context.rope[self.kind],
            context.mask[self.kind],
            prefix_kv,
        )
        x = x + norm('post_attention_norm', attended)
        mlp = GatedMLP(config.width, config.ffn_width, self.dtype, name='mlp')
        update = mlp(norm('pre_ffn_norm', x))
        if config.moe is not None:
            moe = MoE(config.width, config.moe, config.norm_eps, self.dtype, name='moe')
            routed = moe(x, norm('pre_moe_norm', x))
            update = norm('post_mlp_norm', update) + norm('post_moe_norm', routed)
        x = x + norm('post_ffn_norm', update)
        return x * self._output_scalar().astype(self.dtype), block_kv

    def _output_scalar(self) -> jax.Array:
        scalars = {'encode': jnp.ones(())}
        if self.config.layer_scalar:
            scalars['encode'] = logical_param(self, 'encode_scalar', nn.initializers.ones, (), ())
        if self.config.is_diffusion:
            scalars['denoise'] = logical_param(self, 'denoise_scalar', nn.initializers.ones, (), ())
        return scalars[self.which]


class LayerGroup(nn.Module):
    """One repetition of the layer pattern; the body of the scan over layers."""

    config: ModelConfig
    kinds: tuple[str, ...]
    which: Pass
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, prefix_kv: tuple, context: PassContext
    ) -> tuple[jax.Array, tuple]:
        block_kv = []
        for i, kind in enumerate(self.kinds):
            layer = Layer(self.config, kind, self.which, self.dtype, name=f'layer_{i}')
            x, kv = layer(x, prefix_kv[i], context)
            block_kv.append(kv)
        return x, tuple(block_kv)


class Backbone(nn.Module):
    """All layers and the final norm."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, prefix_kv: KV, context: PassContext, which: Pass
    ) -> tuple[jax.Array, KV]:
        """x [B, M, T, D] -> normed hidden [B, M, T, D], keys and values [.., B, M, T, K, H]."""
        config = self.config
        groups_kv, tail_kv = prefix_kv
        scanned = nn.scan(
            LayerGroup,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=(0, nn.broadcast),
            length=config.num_groups,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )
        groups = scanned(config, config.pattern, which, self.dtype, name='layers')
        x, block_groups = groups(x, groups_kv, context)
        block_tail = ()
        if config.tail:
            tail = LayerGroup(config, config.tail, which, self.dtype, name='tail')
            x, block_tail = tail(x, tail_kv, context)
        x = RMSNorm(config.norm_eps, config.norm_scale_offset, name='final_norm')(x)
        return x, (block_groups, block_tail)


def rope_by_kind(config: ModelConfig, positions: jax.Array) -> dict:
    """Rotary tables [..., H/2] of each layer type for positions [...]."""
    tables = {}
    for kind in sorted(set(config.layer_types)):
        attention = config.attention(kind)
        tables[kind] = rope_tables(
            positions, attention.head_dim, attention.rope_theta, attention.rope_fraction
        )
    return tables


class Gemma(nn.Module):
    """Autoregressive Gemma: the causal pass over tokens, with or without a prefix.

    Attributes:
      config: the backbone.
      dtype: compute dtype; parameters are float32 or whatever is passed to `apply`.
    """

    config: ModelConfig
    dtype: Any = jnp.float32

    def setup(self):
        config = self.config
        self.embedder = Embedder(
            config.vocab_size, config.width, config.final_logit_softcap, self.dtype
        )
        self.backbone = Backbone(
            config.autoregressive if config.separate_denoiser else config, self.dtype
        )

    def encode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        prefix: Prefix | None = None,
    ) -> tuple[jax.Array, KV]:
        """The causal pass: prefill, commit, one AR step, or a packed training row.

        Args:
          tokens: [B, T] int32.
          positions: [B, T] int32, position of each token in its document.
          segment_ids: [B, T] int32, document of each token; 0 for padding.
          prefix: earlier tokens of the same documents, or None.

        Returns:
          Final hidden states [B, T, D] and the keys and values of the T tokens.
        """
        if prefix is None:
            prefix = Prefix.empty(self.config, tokens.shape[0], self.dtype)
        masks = {
            kind: causal_mask(positions, segment_ids, prefix, self.config.attention(kind).window)
            for kind in sorted(set(self.config.layer_types))
        }
        context = PassContext(rope_by_kind(self.config, positions[:, None]), masks)
        x = self.embedder.encode(tokens)[:, None]  # [B, 1, T, D]
        hidden, block_kv = self.backbone(x, prefix.kv, context, 'encode')
        return hidden[:, 0], jax.tree.map(lambda a: a.squeeze(-4), block_kv)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 soft-capped logits [..., V]."""
        return self.embedder.decode(hidden)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """AR logits [B, T, V] of one document a row; also what `init` traces."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = self.encode(tokens, positions, jnp.ones_like(tokens))
        return self.unembed(hidden)


def init_boxed_params(model: nn.Module, rng: jax.Array) -> dict:
    """Float32 parameters with their logical axis names (for `parallel.sharding`)."""
    tokens = jnp.zeros((1, max(model.config.canvas_length, 1)), jnp.int32)
    return model.init(rng, tokens)['params']


def init_params(model: nn.Module, rng: jax.Array) -> dict:
    """Freshly initialised float32 parameters as a plain nested dict."""
    return nn.meta.unbox(init_boxed_params(model, rng))


def parameter_count(params: Any) -> int:
    """Number of parameters in a pytree of arrays or ShapeDtypeStructs."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
