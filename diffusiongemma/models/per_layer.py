"""Per-layer embeddings (Gemma 4 E2B and E4B): a small vector per token and layer.

The vector is the sum of two parts: one is looked up by the token's id, the other is projected from
the inputs of the first layer. In the denoise pass the first part comes from the ids of the noisy
canvas and the second from the canvas embeddings after self-conditioning. So both passes run the
same code, and the predictions of the previous step reach every layer. No public model has both
per-layer embeddings and a denoise pass; this is a choice of this project.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.layers import RMSNorm, kernel_init, weight


class PerLayerEmbedder(nn.Module):
    """A module that computes the per-layer inputs of all layers before the first one runs."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        config, per_layer = self.config, self.config.per_layer
        assert per_layer is not None
        d, num_layers, p = config.width, config.num_layers, per_layer.width
        shape = (per_layer.vocab_size, num_layers, p)
        self.embedding = weight(self, 'per_layer_embedder/embedding', kernel_init(p), shape)
        shape = (d, num_layers, p)
        # `__call__` multiplies its outputs by D^-1/2, so its initial values have unit variance.
        self.projection = weight(self, 'per_layer_embedder/projection', kernel_init(1), shape)
        self.projection_norm = RMSNorm(config.norm_eps, config.norm_scale_offset)

    def __call__(self, tokens: jax.Array, embeddings: jax.Array) -> jax.Array:
        """Returns [..., layers, P] for tokens [...] int32 and first-layer inputs [..., D]."""
        width = self.embedding.shape[-1]
        looked_up = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)  # [..., layers, P]
        looked_up *= jnp.asarray(width**0.5, self.dtype)
        projected = jnp.einsum('...d,dlp->...lp', embeddings, self.projection.astype(self.dtype))
        projected = self.projection_norm(projected * self.config.width**-0.5)
        return (projected + looked_up) * 2**-0.5


class PerLayerUpdate(nn.Module):
    """The update of a layer from its per-layer input: (gelu_tanh(x Wg) * per-layer input) Wp."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        assert self.config.per_layer is not None
        d, p = self.config.width, self.config.per_layer.width
        self.gate = weight(self, 'per_layer/gate', kernel_init(d), (d, p))
        self.projection = weight(self, 'per_layer/projection', kernel_init(p), (p, d))

    def __call__(self, x: jax.Array, per_layer: jax.Array) -> jax.Array:
        """Returns the update [..., D] for x [..., D] and per-layer input [..., P]."""
        hidden = nn.gelu(x @ self.gate.astype(self.dtype), approximate=True) * per_layer
        update: jax.Array = hidden @ self.projection.astype(self.dtype)
        return update
