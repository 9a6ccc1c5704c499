"""The light denoiser: a few layers that draft from the frozen teacher's states.

Each layer starts from a teacher layer and attends to the cached keys and values of that layer, so
the prefix is not encoded a second time. This is the design of fast lossless systems (EAGLE-3,
arXiv:2503.01840; DFlash, arXiv:2602.06036), but with the teacher's cache instead of a projected
cache for the draft.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusiongemma.models.arrays import Array
from diffusiongemma.models.backbone import KVPair, LayerInput, PassContext, rematerialized
from diffusiongemma.models.cache import KV, layer_kv
from diffusiongemma.models.config import LightConfig, ModelConfig
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.layers import RMSNorm, kernel_init, project, weight


def draft_layer_config(config: ModelConfig, layer: int) -> ModelConfig:
    """Returns the config of the draft layer for a teacher layer: dense, with the same width."""
    shares_kv = config.kv_source(layer) != layer
    return config.autoregressive.replace(
        moe=None, ffn_width=config.ffn_width_of(shares_kv), kv_shared_ffn_width=None
    )


def shares_draft_kv(config: ModelConfig, layer: int) -> bool:
    """Returns whether a draft layer attends to the canvas keys and values of an earlier one.

    It does if its teacher layer shares those of another layer that is also a draft layer.
    """
    source, light = config.kv_source(layer), _light(config)
    return source != layer and source in light.layers


class LightBackbone(nn.Module):
    """The draft layers of a light denoiser and the final norm."""

    config: ModelConfig
    dtype: jnp.dtype
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B M T D'],
        prefix_kv: KV,
        context: PassContext,
        per_layer: Float[Array, 'B M T layers P'] | None,
    ) -> Float[Array, 'B M T D']:
        """Returns normed hidden states [B, M, T, D].

        Args:
          x: [B, M, T, D], the inputs of the first layer.
          prefix_kv: the teacher's keys and values of the prefix in all of its layers.
          context: rotary tables and masks.
          per_layer: [B, M, T, teacher layers, P], if the teacher has per-layer embeddings.
        """
        config = self.config
        canvas_kv: dict[int, KVPair] = {}  # by the index of the teacher layer
        make_layer = rematerialized(self.execution.remat)
        for number, layer in enumerate(_light(config).layers):
            kind, shares_kv = config.layer_types[layer], shares_draft_kv(config, layer)
            cached = layer_kv(config, prefix_kv, layer)
            layer_context = context
            if shares_kv:
                source = canvas_kv[config.kv_source(layer)]
                layer_context = dataclasses.replace(context, shared_kv={kind: (cached, source)})
            draft_layer = make_layer(
                draft_layer_config(config, layer),
                kind,
                'encode',
                self.dtype,
                self.execution,
                shares_kv,
                name=f'layer_{number}',
            )
            inputs = LayerInput(cached, None if per_layer is None else per_layer[..., layer, :])
            x, block_kv = draft_layer(x, inputs, layer_context)
            if block_kv is not None:
                canvas_kv[layer] = block_kv
        return RMSNorm(config.norm_eps, config.norm_scale_offset, name='final_norm')(x)


class TeacherState(nn.Module):
    """A zero-initialized projection of the teacher's state, added to every canvas input."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B M T D'], state: Float[Array, 'B M D']
    ) -> Float[Array, 'B M T D']:
        """Returns x with the projection added: x [B, M, T, D], state [B, M, D] -> [B, M, T, D]."""
        width = self.config.width
        kernel = weight(self, 'teacher_state/kernel', nn.initializers.zeros, (width, width))
        added = project('bmd,de->bme', state.astype(self.dtype), kernel)
        return x + added.astype(x.dtype)[:, :, None]


class SerialCorrection(nn.Module):
    """A low-rank bigram term on the logits of a draft, conditioned on the previous token.

    All positions of a draft are predicted together, independently of each other; this term makes
    each depend on the previous token. It is zero-initialized.
    """

    config: ModelConfig

    def setup(self) -> None:
        light = _light(self.config)
        rank, size = light.serial_rank, light.draft_vocab_size or self.config.vocab_size
        # One additional row represents all tokens outside of the draft vocabulary.
        rows = size + (1 if light.draft_vocab_size else 0)
        self.previous = weight(self, 'serial/previous', kernel_init(rank), (rows, rank))
        self.following = weight(self, 'serial/following', nn.initializers.zeros, (rank, size))

    def __call__(self, previous: Int[Array, '*B']) -> Float[Array, '*B Vd']:
        """Returns the bigram term for previous tokens, as rows [...] int32 -> [..., Vd] float32."""
        rows = jnp.take(self.previous, previous.reshape(-1), axis=0).astype(jnp.float32)  # [t, r]
        gain = project('tr,rv->tv', rows, self.following)
        return gain.reshape(*previous.shape, gain.shape[-1])


def _light(config: ModelConfig) -> LightConfig:
    assert config.light is not None
    return config.light
