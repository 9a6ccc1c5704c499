"""The autoregressive Gemma (the teacher).

Layers are scanned over repetitions of the layer pattern, so that compile time does not grow with
depth (`unroll_layers` trades compile time for speed). Layers that share keys and values are a
second scan after those that compute them. One pass runs over M blocks of T tokens per row (see
masks.py).
"""

from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusiongemma.models.arrays import Array, Params
from diffusiongemma.models.attention import in_parts
from diffusiongemma.models.backbone import ACTIVATION_AXES, Backbone, PassContext
from diffusiongemma.models.cache import KV, Prefix, cache_slots, zeros_kv
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.kernels.fused_attention import fits
from diffusiongemma.models.layers import Embedder, rope_tables
from diffusiongemma.models.masks import AttentionMask, CausalMask, KeyTokens
from diffusiongemma.models.per_layer import PerLayerEmbedder

CACHE_AXES = ('batch', 'kv_heads', 'slots', 'head_dim')  # logical axes of K/V [.., B, K, R, H]


def rope_by_kind(
    config: ModelConfig, positions: Int[Array, '*B']
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns the rotary tables [..., H/2] of each layer type for positions [...]."""
    tables = {}
    for kind in sorted(set(config.layer_types)):
        attention = config.attention(kind)
        tables[kind] = rope_tables(
            positions,
            attention.head_dim,
            attention.rope_theta,
            attention.rope_fraction,
            attention.rope_scale,
        )
    return tables


class Gemma(nn.Module):
    """An autoregressive Gemma: the causal pass over tokens, with or without a prefix.

    Attributes:
      config: the architecture.
      dtype: the compute dtype; parameters are created in float32 and may have any dtype in `apply`.
      execution: the execution settings (`parallel.on_mesh` sets a mesh).
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    execution: Execution = Execution()

    if TYPE_CHECKING:  # flax's type allows `mutable`, which this project does not use

        def apply(self, *args: Any, **kwargs: Any) -> Any: ...

    def setup(self) -> None:
        config = self.config
        self.embedder = Embedder(
            config.vocab_size,
            config.width,
            config.final_logit_softcap,
            self.dtype,
            self.execution,
        )
        if config.per_layer is not None:
            self.per_layer_embedder = PerLayerEmbedder(config, self.dtype)
        backbone = config.autoregressive if config.has_frozen_encoder else config
        self.backbone = Backbone(backbone, self.dtype, self.execution)

    def encode(
        self,
        tokens: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
        segment_ids: Int[Array, 'B T'],
        prefix: Prefix | None = None,
    ) -> tuple[Float[Array, 'B T D'], KV]:
        """Runs the causal pass: prefill, commit, verify, an AR step, or a packed training row.

        Args:
          tokens: [B, T] int32; the tokens of a document are contiguous and in order.
          positions: [B, T] int32, the position of each token in its document.
          segment_ids: [B, T] int32, the document of each token; 0 for padding.
          prefix: earlier tokens of the same documents, or None.

        Returns:
          Final hidden states [B, T, D] and the keys and values [.., B, K, T, H] of the T tokens.
        """
        if prefix is None:
            scanned = self.execution.scan_layers
            prefix = Prefix.empty(self.config, tokens.shape[0], self.dtype, scanned)
        masks = {
            kind: self._causal_mask(kind, positions, segment_ids, keys)
            for kind, keys in prefix.tokens_by_kind(self.config).items()
        }
        context = PassContext(rope_by_kind(self.config, positions[:, None]), masks)
        x = self.embedder.encode(tokens)[:, None]  # [B, 1, T, D]
        x = self.execution.constrain(x, *ACTIVATION_AXES)
        per_layer = self.per_layer_inputs(tokens[:, None], x)
        hidden, block_kv = self.backbone(x, prefix.kv, context, 'encode', per_layer)
        # Keys and values [.., B, K, 1, T, H] lose the axis of blocks.
        return hidden[:, 0], jax.tree.map(lambda a: a.squeeze(-3), block_kv)

    def _causal_mask(
        self,
        kind: str,
        positions: Int[Array, 'B T'],
        segment_ids: Int[Array, 'B T'],
        prefix: KeyTokens,
    ) -> AttentionMask | CausalMask:
        """Returns the mask of a layer type, expanded for all queries unless positions suffice."""
        attention, (batch_size, length) = self.config.attention(kind), positions.shape
        mask = CausalMask(positions, segment_ids, prefix, attention.window)
        query_shape = (batch_size, 1, length, self.config.num_heads, attention.head_dim)
        prefix_length = prefix.positions.shape[1]
        if in_parts(length, self.execution.query_block) or fits(
            query_shape, attention.num_kv_heads, prefix_length, self.execution
        ):
            return mask
        return mask.all_rows()

    def per_layer_inputs(
        self, tokens: Int[Array, '*B'], embeddings: Float[Array, '*B D']
    ) -> Float[Array, '*B layers P'] | None:
        """Returns per-layer inputs [..., layers, P], or None for a model without them.

        Args:
          tokens: [...] int32.
          embeddings: [..., D], the inputs of the first layer.
        """
        if self.config.per_layer is None:
            return None
        return self.per_layer_embedder(tokens, embeddings)

    def empty_kv(self, batch_size: int, capacity: int) -> KV:
        """Returns the keys and values of an empty `KVCache`; short windows are stored as rings."""
        slots = cache_slots(self.config, capacity)
        kv = zeros_kv(self.config, batch_size, slots, self.dtype, self.execution.scan_layers)

        def place(leaf: jax.Array) -> jax.Array:
            return self.execution.constrain(leaf, *[None] * (leaf.ndim - 4), *CACHE_AXES)

        result: KV = jax.tree.map(place, kv)
        return result

    def unembed(self, hidden: Float[Array, '*B D']) -> Float[Array, '*B V']:
        """Returns float32 soft-capped logits [..., V] of hidden states [..., D]."""
        return self.embedder.decode(hidden)

    def __call__(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T V']:
        """Returns AR logits [B, T, V] of one document per row; `init` also traces this method."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = self.encode(tokens, positions, jnp.ones_like(tokens))
        return self.unembed(hidden)


def init_boxed_params(model: nn.Module, rng: jax.Array) -> Params:
    """Returns float32 parameters with their logical axis names (for `parallel.sharding`)."""
    tokens = jnp.zeros((1, max(model.config.canvas_length, 1)), jnp.int32)
    params: Params = model.init(rng, tokens)['params']
    return params


def init_params(model: nn.Module, rng: jax.Array) -> Params:
    """Returns newly initialized float32 parameters as a plain nested dict."""
    params: Params = nn.meta.unbox(init_boxed_params(model, rng))
    return params


def parameter_count(params: Any) -> int:
    """Returns the number of parameters in a pytree of arrays or ShapeDtypeStructs."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
