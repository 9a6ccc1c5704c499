"""The backbone: residual layers, in a scan or unrolled, and the final norm."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.models.attention import Attention
from diffusiongemma.models.cache import KV, last_kv
from diffusiongemma.models.config import LayerStack, ModelConfig
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.layers import WEIGHT_PRODUCT, GatedMLP, RMSNorm, weight
from diffusiongemma.models.masks import AttentionMask, CausalMask
from diffusiongemma.models.moe import MoE
from diffusiongemma.models.per_layer import PerLayerUpdate

Pass = Literal['encode', 'denoise']
KVPair = tuple[jax.Array, jax.Array]

# Logical axes of the residual stream [B, M, T, D].
ACTIVATION_AXES = ('batch', None, 'length', None)


@flax.struct.dataclass
class PassContext:
    """The inputs that all layers of one pass share, by layer type.

    Attributes:
      rope: the rotary tables (cosine, sine), [B, M, T, H/2] each.
      mask: the attention masks.
      shared_kv: for layers that share keys and values: the keys and values of the prefix
        [B, K, S, H] and of the blocks [B, K, M, T, H].
    """

    rope: dict[str, tuple[jax.Array, jax.Array]]
    mask: dict[str, AttentionMask | CausalMask]
    shared_kv: dict[str, tuple[KVPair, KVPair]] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class LayerInput:
    """The inputs of one layer in addition to the residual stream.

    Attributes:
      prefix_kv: keys and values [B, K, S, H] of the prefix; None if the layer shares those of an
        earlier layer.
      per_layer: per-layer embeddings [B, M, T, P]; None in a model without them.
    """

    prefix_kv: KVPair | None
    per_layer: jax.Array | None


class Layer(nn.Module):
    """A residual layer with pre- and post-norms.

    The encode and the denoise pass share all weights except for one scalar on the output.
    """

    config: ModelConfig
    kind: str
    which: Pass
    dtype: jnp.dtype
    execution: Execution
    shares_kv: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: LayerInput, context: PassContext
    ) -> tuple[jax.Array, KVPair | None]:
        """Returns the output for x, [B, M, T, D], and the keys and values of the block, if any."""
        config = self.config

        def norm(name: str, value: jax.Array) -> jax.Array:
            return RMSNorm(config.norm_eps, config.norm_scale_offset, name=name)(value)

        attended, block_kv = self._attend(norm('pre_attention_norm', x), inputs, context)
        x = x + norm('post_attention_norm', attended)
        ffn_width = config.ffn_width_of(self.shares_kv)
        mlp = GatedMLP(config.width, ffn_width, self.dtype, self.execution, name='mlp')
        update = mlp(norm('pre_ffn_norm', x))
        if config.moe is not None:
            fields = (config.width, config.moe, config.norm_eps, self.dtype)
            moe = MoE(*fields, self.execution, name='moe')
            routed = moe(x, norm('pre_moe_norm', x))
            update = norm('post_mlp_norm', update) + norm('post_moe_norm', routed)
        x = x + norm('post_ffn_norm', update)
        if config.per_layer is not None:
            assert inputs.per_layer is not None  # set for every layer of such a model
            update = PerLayerUpdate(config, self.dtype, name='per_layer')(x, inputs.per_layer)
            x = x + norm('post_per_layer_norm', update)
        x = x * self._output_scalar().astype(self.dtype)
        return self.execution.constrain(x, *ACTIVATION_AXES), block_kv

    def _attend(
        self, x: jax.Array, inputs: LayerInput, context: PassContext
    ) -> tuple[jax.Array, KVPair | None]:
        fields = (self.config, self.kind, self.dtype, self.shares_kv, self.execution)
        attention = Attention(*fields, name='attention')
        rope, mask = context.rope[self.kind], context.mask[self.kind]
        if self.shares_kv:
            prefix_kv, block_kv = context.shared_kv[self.kind]
            return attention(x, rope, mask, prefix_kv, block_kv), None
        block_kv = attention.keys_and_values(x, rope)
        assert inputs.prefix_kv is not None  # None only for shared keys and values
        return attention(x, rope, mask, inputs.prefix_kv, block_kv), block_kv

    def _output_scalar(self) -> jax.Array:
        scalars = {'encode': jnp.ones(())}
        if self.config.layer_scalar:
            scalars['encode'] = weight(self, 'encode_scalar', nn.initializers.ones, ())
        if self.config.is_diffusion:
            scalars['denoise'] = weight(self, 'denoise_scalar', nn.initializers.ones, ())
        return scalars[self.which]


def rematerialized(remat: str) -> type[Layer]:
    """Returns `Layer` with the rematerialization of `Execution.remat`."""
    if remat == 'none':
        return Layer
    policy = None
    if remat == 'dots':
        policy = jax.checkpoint_policies.save_only_these_names(WEIGHT_PRODUCT)
    # Without barriers the compiler would recompute all layers of a group at once, and merge
    # recomputed values with the original ones where the loop has a single iteration.
    return nn.remat(Layer, policy=policy)


class LayerGroup(nn.Module):
    """One repetition of the layer pattern, which is the body of the scan over layers."""

    config: ModelConfig
    kinds: tuple[str, ...]
    which: Pass
    dtype: jnp.dtype
    execution: Execution
    shares_kv: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: tuple[LayerInput, ...], context: PassContext
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        block_kv = []
        fields = (self.which, self.dtype, self.execution, self.shares_kv)
        make_layer = rematerialized(self.execution.remat)
        for i, kind in enumerate(self.kinds):
            layer = make_layer(self.config, kind, *fields, name=f'layer_{i}')
            x, kv = layer(x, inputs[i], context)
            block_kv.append(kv)
        return x, tuple(block_kv)


def layer_inputs(
    stack: LayerStack, prefix_kv: KV | None, per_layer: jax.Array | None
) -> tuple[tuple[LayerInput, ...], tuple[LayerInput, ...]]:
    """Returns the inputs of scanned layers and of single layers.

    The inputs of scanned layers are one `LayerInput` for each position of the layer pattern, with a
    leading axis G; those of single layers are one `LayerInput` for each layer.

    Args:
      stack: the layers.
      prefix_kv: the keys and values of the prefix for these layers, or None if they are shared.
      per_layer: per-layer embeddings [B, M, T, all layers, P], or None.
    """

    def per_layer_of(layers: slice | int) -> jax.Array | None:
        if per_layer is None:
            return None
        if isinstance(layers, int):
            return per_layer[..., layers, :]  # [B, M, T, P]
        return jnp.moveaxis(per_layer[..., layers, :], -2, 0)  # [G, B, M, T, P]

    period, end = len(stack.stacked), stack.first + len(stack.types)
    stacked_kv, single_kv = prefix_kv or ((None,) * period, (None,) * len(stack.single))
    first_single = end - len(stack.single)
    stacked = tuple(
        LayerInput(kv, per_layer_of(slice(stack.first + i, first_single, period)))
        for i, kv in enumerate(stacked_kv)
    )
    single = tuple(LayerInput(kv, per_layer_of(first_single + i)) for i, kv in enumerate(single_kv))
    return stacked, single


class Backbone(nn.Module):
    """All layers and the final norm."""

    config: ModelConfig
    dtype: jnp.dtype
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        prefix_kv: KV,
        context: PassContext,
        which: Pass,
        per_layer: jax.Array | None = None,
    ) -> tuple[jax.Array, KV]:
        """Returns normed hidden states [B, M, T, D], and keys and values [.., B, K, M, T, H].

        Args:
          x: [B, M, T, D], the inputs of the first layer.
          prefix_kv: the keys and values of the prefix.
          context: rotary tables and masks.
          which: the pass, 'encode' or 'denoise'.
          per_layer: per-layer embeddings [B, M, T, layers, P], or None.
        """
        config = self.config
        scanned = self.execution.scan_layers
        stack, shared = (s.as_loop(scanned) for s in (config.kv_layers, config.kv_shared_layers))
        inputs = layer_inputs(stack, prefix_kv, per_layer)
        x, block_kv = self._run(stack, which, x, inputs, context)
        if shared.types:
            sources = {
                kind: (last_kv(config, prefix_kv, kind), last_kv(config, block_kv, kind))
                for kind in sorted(set(shared.types))
            }
            inputs = layer_inputs(shared, None, per_layer)
            context = dataclasses.replace(context, shared_kv=sources)
            x, _ = self._run(shared, which, x, inputs, context)
        x = RMSNorm(config.norm_eps, config.norm_scale_offset, name='final_norm')(x)
        return x, block_kv

    def _run(
        self,
        stack: LayerStack,
        which: Pass,
        x: jax.Array,
        inputs: tuple[tuple[LayerInput, ...], tuple[LayerInput, ...]],
        context: PassContext,
    ) -> tuple[jax.Array, tuple[tuple[Any, ...], tuple[Any, ...]]]:
        """Runs the layers of one stack; returns hidden states, keys and values."""
        fields: dict[str, Any] = {'config': self.config, 'which': which, 'dtype': self.dtype}
        fields |= {'execution': self.execution, 'shares_kv': stack.shares_kv}
        name = 'shared_{}' if stack.shares_kv else '{}'
        stacked, single = inputs
        stacked_kv: tuple[Any, ...] = ()
        single_kv: list[KVPair] = []
        if stack.scanned:
            scanned = nn.scan(
                LayerGroup,
                variable_axes={'params': 0},
                split_rngs={'params': True},
                check_constancy_invariants=False,  # the check traces all layers a second time
                in_axes=(0, nn.broadcast),  # inputs [G, ...], one context for all layers
                length=stack.num_groups,
                metadata_params={nn.PARTITION_NAME: 'layers'},
            )
            groups = scanned(kinds=stack.pattern, **fields, name=name.format('layers'))
            x, stacked_kv = groups(x, stacked, context)  # keys and values [G, B, K, M, T, H]
        else:
            period = len(stack.pattern)
            for g in range(stack.num_groups):
                group = LayerGroup(kinds=stack.pattern, **fields, name=name.format(f'layers_{g}'))
                x, kv = group(x, single[g * period : (g + 1) * period], context)
                single_kv += kv
        if stack.tail:
            tail = LayerGroup(kinds=stack.tail, **fields, name=name.format('tail'))
            x, kv = tail(x, single[-len(stack.tail) :], context)
            single_kv += kv
        return x, (stacked_kv, tuple(single_kv))
