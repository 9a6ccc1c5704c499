"""DiffusionGemma: the denoiser, one backbone with an encode and a denoise pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.models.cache import Prefix
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.layers import GatedMLP, RMSNorm, rms_normalize
from diffusiongemma.models.masks import canvas_mask
from diffusiongemma.models.precision import native_dtype
from diffusiongemma.models.transformer import (
    ACTIVATION_AXES,
    Backbone,
    Gemma,
    PassContext,
    rope_by_kind,
)

DENOISER_ALONE = ('denoise_backbone', 'self_conditioning')  # parameters of a separate denoiser


class SelfConditioning(nn.Module):
    """Adds what the previous denoise step believed to the canvas embeddings.

    h = rmsnorm(embed(canvas) + mlp(rmsnorm(soft embeddings))), the outer norm without
    scale. The MLP's output starts at zero, so that a fresh student ignores it.
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, embeddings: jax.Array, soft_embeddings: jax.Array | None) -> jax.Array:
        """[..., D], and [..., D] or None at the first step -> [..., D]."""
        config = self.config
        if soft_embeddings is None:
            soft_embeddings = jnp.zeros_like(embeddings)
        norm = RMSNorm(config.norm_eps, config.norm_scale_offset, name='pre_norm')
        mlp = GatedMLP(
            config.width,
            config.ffn_width,
            self.dtype,
            config.output_major,
            zero_init_output=True,
            name='mlp',
        )
        combined = embeddings + mlp(norm(soft_embeddings.astype(self.dtype)))
        return rms_normalize(combined, config.norm_eps).astype(self.dtype)


class DiffusionGemma(Gemma):
    """The denoiser. `encode` is the causal pass of its parent.

    Both passes run on the same weights but for the layer scalars (as released), or on two
    backbones with `config.separate_denoiser`.
    """

    def setup(self):
        if not self.config.is_diffusion:
            raise ValueError(
                'DiffusionGemma needs a config with canvas_length > 0; '
                'for a purely autoregressive model use Gemma.'
            )
        super().setup()
        self.self_conditioning = SelfConditioning(self.config, self.denoise_dtype)
        if self.config.separate_denoiser:
            self.denoise_backbone = Backbone(
                self.config.autoregressive, self.denoise_dtype, self.execution
            )

    @property
    def denoise_dtype(self) -> jnp.dtype:
        """Compute dtype of the denoise pass on the devices at hand."""
        if self.config.separate_denoiser and self.config.denoise_dtype is not None:
            return native_dtype(self.config.denoise_dtype, self.execution.platform)
        return jnp.dtype(self.dtype)

    def denoise_hidden(
        self,
        canvas: jax.Array,
        starts: jax.Array,
        segment_ids: jax.Array,
        prefix: Prefix,
        soft_embeddings: jax.Array | None = None,
        previous: jax.Array | None = None,
    ) -> jax.Array:
        """The denoise pass over M canvases per row (sampling: M = 1), short of the logits.

        Args:
          canvas: [B, M, C] int32 noisy tokens.
          starts: [B, M] int32, position of each canvas's first token.
          segment_ids: [B, M] int32, document of each canvas; 0 for an unused slot.
          prefix: the clean tokens, as cache or as the K/V of a packed training row.
          soft_embeddings: [B, M, C, D] from `soft_embed`, or None at the first step; of no effect
            without `config.self_conditioning`.
          previous: [B, M] int32, the token before each canvas; needed with
            `config.predict_next`, and only there.

        Returns:
          Final hidden states [B, M, C, D].
        """
        if not self.config.self_conditioning:
            soft_embeddings = None
        if self.config.predict_next:
            canvas = _behind(previous[..., None], canvas, axis=-1)
            starts = starts - 1
            if soft_embeddings is not None:
                nothing = jnp.zeros_like(soft_embeddings[..., :1, :])
                soft_embeddings = _behind(nothing, soft_embeddings, axis=-2)
        length = canvas.shape[-1]
        masks = {
            kind: canvas_mask(starts, segment_ids, length, keys, self.config.attention(kind).window)
            for kind, keys in prefix.tokens_by_kind(self.config).items()
        }
        positions = starts[..., None] + jnp.arange(length)  # [B, M, C]
        context = PassContext(rope_by_kind(self.config, positions), masks)
        embeddings = self.embedder.encode(canvas).astype(self.denoise_dtype)
        embeddings = self.execution.constrain(embeddings, *ACTIVATION_AXES)
        x = self.self_conditioning(embeddings, soft_embeddings)
        per_layer = self.per_layer_inputs(canvas, x)
        if self.config.separate_denoiser:
            hidden, _ = self.denoise_backbone(x, prefix.kv, context, 'encode', per_layer)
        else:
            hidden, _ = self.backbone(x, prefix.kv, context, 'denoise', per_layer)
        return hidden

    def denoise(
        self,
        canvas: jax.Array,
        starts: jax.Array,
        segment_ids: jax.Array,
        prefix: Prefix,
        soft_embeddings: jax.Array | None = None,
        previous: jax.Array | None = None,
    ) -> jax.Array:
        """`denoise_hidden` and the head: float32 logits [B, M, C, V]."""
        args = (canvas, starts, segment_ids, prefix, soft_embeddings, previous)
        return self.unembed(self.denoise_hidden(*args))

    def soft_embed(self, logits: jax.Array) -> jax.Array:
        """Self-conditioning input: softmax(logits) @ embedding * sqrt(D), [..., V] -> [..., D]."""
        return self.embedder.soft_encode(logits, self.denoise_dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Denoise logits [B, C, V] of tokens [B, C] as a canvas after themselves; for `init`."""
        batch_size, length = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        ones = jnp.ones_like(tokens)
        _, kv = self.encode(tokens, positions, ones)
        starts = jnp.full((batch_size, 1), length, jnp.int32)
        prefix = Prefix(kv, positions, ones)
        previous = tokens[:, -1:]
        logits = self.denoise(tokens[:, None], starts, ones[:, :1], prefix, previous=previous)
        return logits[:, 0]


def _behind(first: jax.Array, rest: jax.Array, axis: int) -> jax.Array:
    """`first` and all of `rest` but its last element along `axis`."""
    kept = jax.lax.slice_in_dim(rest, 0, rest.shape[axis] - 1, axis=axis)
    return jnp.concatenate([first, kept], axis=axis)
