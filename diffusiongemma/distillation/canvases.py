"""Noisy canvases of a packed batch: drawing, denoising and their training targets."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from diffusiongemma.diffusion.corruption import Corruption, sample_noise_levels
from diffusiongemma.models.arrays import Array, Params
from diffusiongemma.models.cache import Prefix
from diffusiongemma.models.denoiser import DiffusionGemma

Batch = dict[str, jax.Array]


class NoisyCanvases(NamedTuple):
    """Noisy canvases with their noise levels.

    Attributes:
      tokens: [B, N, C] int32, the noisy canvases.
      corrupted: [B, N, C] bool, the corrupted positions.
      noise_level: [B, N] float32, t of each canvas.
    """

    tokens: Int[Array, 'B N C']
    corrupted: Bool[Array, 'B N C']
    noise_level: Float[Array, 'B N']


def draw_noise(
    key: Key[Array, ''],
    canvases: Int[Array, 'B N C'],
    corruption: Corruption,
    *,
    min_noise_level: float,
    all_noise_rate: float = 0.0,
) -> NoisyCanvases:
    """Corrupts clean canvases [B, N, C], each at its own noise level t.

    Args:
      key: a PRNG key.
      canvases: [B, N, C] int32, clean tokens.
      corruption: the forward process.
      min_noise_level: the lowest level; t ~ U(min_noise_level, 1), evenly spread over the batch.
      all_noise_rate: the probability that a canvas is all noise (t = 1) instead, as at the start
        of sampling.
    """
    level_key, all_key, noise_key = jax.random.split(key, 3)
    noise_level = sample_noise_levels(level_key, canvases.shape[:2], min_noise_level)  # [B, N]
    all_noise = jax.random.bernoulli(all_key, all_noise_rate, noise_level.shape)
    noise_level = jnp.where(all_noise, 1.0, noise_level)
    noisy, corrupted = corruption.corrupt(noise_key, canvases, noise_level[..., None])
    return NoisyCanvases(noisy, corrupted, noise_level)


def denoise(
    model: DiffusionGemma,
    params: Params,
    batch: Batch,
    prefix: Prefix,
    noisy: Int[Array, 'B N C'],
    soft_embeddings: Float[Array, 'B N C D'] | None = None,
) -> Float[Array, 'B N C D']:
    """Returns hidden states [B, N, C, D] of noisy versions [B, N, C] of the batch's canvases."""
    starts, segment_ids = batch['canvas_starts'], batch['canvas_segment_ids']
    before = jnp.maximum(batch['canvas_offsets'] - 1, 0)
    previous = jnp.take_along_axis(batch['tokens'], before, axis=1)  # [B, N]
    hidden: jax.Array = model.apply(
        {'params': params},
        noisy,
        starts,
        segment_ids,
        prefix,
        soft_embeddings,
        previous,
        method='denoise_hidden',
    )
    return hidden


def canvas_teacher(values: Any, batch: Batch) -> tuple[Any, Bool[Array, 'B N C']]:
    """Returns teacher conditionals p_T(x_i | x_<i, c) for every canvas position.

    Args:
      values: the teacher's values on the clean rows (`TeacherStates`), leaves [B, L, ...]; the
        value at index i describes the distribution of token i + 1.
      batch: a packed batch.

    Returns:
      The values with leaves [B, N, C, ...], and [B, N, C] bool, whether the position is a token of
      the document. The values at other positions (padding, unused slots) are undefined.
    """
    canvas_length = batch['canvas_tokens'].shape[-1]
    index = batch['canvas_offsets'][..., None] + jnp.arange(canvas_length)  # [B, N, C]
    row_length = batch['tokens'].shape[1]
    clipped = jnp.clip(index, 1, row_length - 1)
    rows = jnp.arange(index.shape[0])[:, None, None]  # [B, 1, 1]
    same_document = batch['segment_ids'][rows, clipped] == batch['canvas_segment_ids'][..., None]
    used = (batch['canvas_segment_ids'] > 0)[..., None]  # [B, N, 1]
    conditionals = jax.tree.map(lambda leaf: leaf[rows, clipped - 1], values)  # [B, N, C, ...]
    return conditionals, same_document & used & (index < row_length)


def used_positions(batch: Batch) -> Bool[Array, 'B N C']:
    """Returns which positions belong to a used canvas, [B, N, C] bool, padding included."""
    used = (batch['canvas_segment_ids'] > 0)[..., None]
    return jnp.broadcast_to(used, batch['canvas_tokens'].shape)


def kl_weights(
    noisy: NoisyCanvases, has_target: Bool[Array, 'B N C'], kd_weight: float
) -> Float[Array, 'B N C']:
    """Returns w [B, N, C] of the loss (1 - w) CE(x | q_S) + w KL(p_T || q_S).

    w = kd_weight * t at corrupted positions of the document, 0 at clean positions and padding. At
    t = 1, the teacher's conditional has the same expectation as the hard label with less variance.
    At lower t, the context on the right is evidence that the causal teacher does not have.

    Args:
      noisy: the canvases that were denoised.
      has_target: [B, N, C] bool, the positions for which there is a teacher distribution.
      kd_weight: the weight of the KL at t = 1.
    """
    weight = kd_weight * noisy.noise_level[..., None]  # [B, N, 1]
    return jnp.where(noisy.corrupted & has_target, weight, 0.0)


def hits(logits: Float[Array, '*B V'], clean: Int[Array, '*B']) -> Float[Array, '*B']:
    """Returns 1.0 where the argmax of logits [..., V] is the clean token [...], else 0.0."""
    return (jnp.argmax(logits, axis=-1) == clean).astype(jnp.float32)
