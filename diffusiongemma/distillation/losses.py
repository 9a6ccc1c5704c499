"""Losses of teacher training and of Diffuse-Distill, all in float32.

Notation: p_T are the teacher conditionals on clean text, q_S is the denoiser, t the noise level.

All arrays with a vocabulary axis are computed inside `over_positions`, for some positions at a
time. A mean over a batch is a sum with `mean_weights` of the whole batch, so the losses of parts
of a batch add up to the loss of the whole batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from diffusiongemma.distillation.teacher import TeacherDistribution
from diffusiongemma.models.arrays import Array


def over_positions(score: Callable[..., Any], chunk: int, shape: Sequence[int], *trees: Any) -> Any:
    """Applies `score` to at most `chunk` positions of each row at a time.

    Intermediate values of `score`, above all logits, exist for one chunk only and are recomputed
    in the backward pass. If there is only one chunk, they are kept. A chunk has positions of every
    row and of every shard of a row, so all devices are busy.

    Args:
      score: a pure function from trees with leaves [B, c, ...] to a tree with leaves [B, c, ...],
        which handles each position independently.
      chunk: the maximum number of positions of a row at a time; 0 for all.
      shape: the axes of rows and positions, [B, L] or [B, N, C].
      *trees: trees with leaves [*shape, ...].

    Returns:
      The results of `score`, leaves [*shape, ...].
    """
    rows, *axes = shape
    positions, last = math.prod(axes), len(axes)
    flat = (rows, positions)

    def flatten(leaf: jax.Array) -> jax.Array:
        """Reshapes [B, N, C, ...] -> [B, C * N, ...], because C may be sharded."""
        return jnp.moveaxis(leaf, last, 1).reshape(*flat, *leaf.shape[last + 1 :])

    def restore(leaf: jax.Array) -> jax.Array:
        leaf = leaf.reshape(rows, axes[-1], *axes[:-1], *leaf.shape[2:])  # [B, C, N, ...]
        return jnp.moveaxis(leaf, 1, last)

    trees = jax.tree.map(flatten, trees)  # [B, P, ...], P = N * C positions
    if not 0 < chunk < positions:
        return jax.tree.map(restore, score(*trees))
    count = -(-positions // chunk)
    size = -(-positions // count)

    def split(leaf: jax.Array) -> jax.Array:
        """Reshapes [B, P, ...] -> [chunks, B, size, ...], every chunks-th position in a chunk."""
        trailing = [(0, 0)] * (leaf.ndim - 2)
        leaf = jnp.pad(leaf, [(0, 0), (0, count * size - positions), *trailing])
        return jnp.moveaxis(leaf.reshape(rows, size, count, *leaf.shape[2:]), 2, 0)

    def join(leaf: jax.Array) -> jax.Array:
        leaf = jnp.moveaxis(leaf, 0, 2)  # [B, size, chunks, ...]
        return leaf.reshape(rows, count * size, *leaf.shape[3:])[:, :positions]

    # Needs no barriers: in a loop of several iterations XLA can't merge recomputed values.
    scored = jax.checkpoint(lambda args: score(*args), prevent_cse=False)
    results = jax.lax.map(scored, jax.tree.map(split, trees))  # [chunks, B, size, ...]
    return jax.tree.map(lambda leaf: restore(join(leaf)), results)


def cross_entropy(logits: Float[Array, '*B V'], labels: Int[Array, '*B']) -> Float[Array, '*B']:
    """Returns -log softmax(logits)[labels] in nats: [..., V], [...] int32 -> [...] float32."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]


def mean_weights(mask: Shaped[Array, '*B']) -> Float[Array, '*B']:
    """Returns float32 weights that turn a sum into the mean over `mask`; 0 for an empty mask."""
    mask = mask.astype(jnp.float32)
    return mask / jnp.maximum(jnp.sum(mask), 1.0)


def before(target_mask: Bool[Array, 'B L']) -> Bool[Array, 'B L']:
    """Returns the positions [B, L] whose next token is a target; the first token never is one."""
    return jnp.roll(target_mask, -1, axis=1)


@runtime_checkable
class TokenLoss(Protocol):
    """The loss of each canvas position in stage 1, such as `denoise_loss`; hashable."""

    def __call__(
        self,
        logits: Float[Array, '*B V'],
        canvas: Int[Array, '*B'],
        teacher: TeacherDistribution,
        kl_weight: Float[Array, '*B'],
    ) -> Float[Array, '*B']:
        """Returns the loss in nats; `denoise_loss` describes the arguments."""
        ...


def denoise_loss(
    logits: Float[Array, '*B V'],
    canvas: Int[Array, '*B'],
    teacher: TeacherDistribution,
    kl_weight: Float[Array, '*B'],
) -> Float[Array, '*B']:
    """Returns (1 - w) CE(x | q_S) + w KL(p_T || q_S) for each canvas position.

    Args:
      logits: [..., V], denoiser logits on the noisy canvases.
      canvas: [...] int32, clean tokens.
      teacher: p_T of the same tokens, [...].
      kl_weight: [...] float32, w in [0, 1].

    Returns:
      [...] float32.
    """
    hard = cross_entropy(logits, canvas)
    soft = teacher.kl(logits)
    return (1.0 - kl_weight) * hard + kl_weight * soft
