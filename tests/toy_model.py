"""Defines a small model with the passes of sampling and a fixed rule instead of a network.

Its K/V cache holds one number per token. Every prediction depends on all previous tokens, their
positions and the token itself, so that a wrong mask, position or cache slot changes it.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    vocab_size: int = 23
    canvas_length: int = 4
    max_positions: int | None = None
    mask_id: int | None = None


class ToyModel(nn.Module):
    """A model whose denoiser predicts a decoy that depends on the noise, and its target when
    enough of the canvas is correct; the number of steps depends on the draws."""

    config: ToyConfig = ToyConfig()

    def setup(self):
        size = self.config.vocab_size
        self.embedding = self.param(
            'embedding', lambda key: jnp.eye(size) + 0.05 * jax.random.normal(key, (size, size))
        )

    def encode(self, tokens, positions, segment_ids, prefix=None):
        values = ((tokens + 1) * (positions + 2) * (segment_ids > 0)).astype(jnp.float32)
        before = (positions[:, :, None] >= positions[:, None, :]) & (
            segment_ids[:, :, None] == segment_ids[:, None, :]
        )
        total = jnp.sum(before * values[:, None, :], axis=-1)  # [B, T]
        if prefix is not None:
            visible = (prefix.segment_ids[:, None, :] > 0) & (
                prefix.positions[:, None, :] < positions[:, :, None]
            )
            total += jnp.sum(visible * prefix.kv['values'][:, :, :, 0], axis=-1)
        target = (total.astype(jnp.int32) + 7 * tokens) % self.config.vocab_size
        hidden = 3.0 * jax.nn.one_hot(target, self.config.vocab_size)
        return hidden, {'values': values[:, None, :, None]}  # [B, K=1, T, H=1]

    def unembed(self, hidden):
        return hidden @ self.embedding

    def denoise(self, canvas, starts, segment_ids, prefix, soft_embeddings=None):
        size, length = self.config.vocab_size, canvas.shape[-1]
        visible = (segment_ids[..., None] == prefix.segment_ids[:, None]) & (
            prefix.positions[:, None] < starts[..., None]
        )
        total = jnp.sum(visible * prefix.kv['values'][:, :, :, 0], axis=-1)  # [B, N]
        positions = starts[..., None] + jnp.arange(length)
        target = (total[..., None].astype(jnp.int32) + 5 * positions) % size
        decoy = (2 * canvas + jnp.sum(canvas, axis=-1, keepdims=True)) % size
        wanted = jax.nn.one_hot(target, size)
        right = jnp.mean(canvas == target, axis=-1)[..., None, None]
        if soft_embeddings is None:
            soft_embeddings = jnp.zeros(wanted.shape)
        believed = jnp.sum(soft_embeddings * wanted, axis=-1, keepdims=True)
        logits = wanted * (2.5 + 6.0 * right + 4.0 * believed) + 4.0 * jax.nn.one_hot(decoy, size)
        return logits @ self.embedding

    def soft_embed(self, logits):
        return jax.nn.softmax(logits) @ self.embedding

    def __call__(self):
        return self.embedding


def toy(canvas_length: int = 4):
    """Returns a toy model and its parameters."""
    model = ToyModel(ToyConfig(canvas_length=canvas_length))
    return model, model.init(jax.random.key(7))['params']
