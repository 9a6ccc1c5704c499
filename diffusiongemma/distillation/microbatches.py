"""Gradient accumulation: computes a batch in parts, one after another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]


def summed_gradients(
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Metrics]],
    params: Any,
    rows: Any,
    microbatches: int,
) -> tuple[Any, Metrics]:
    """Returns gradients and metrics of a batch whose loss is the sum of the losses of its parts.

    Activations exist for one part at a time, at the cost of a second copy of the gradients.

    Args:
      loss_fn: a function from parameters and some rows to their share of loss and metrics.
      params: the parameters, a tree of arrays.
      rows: the batch, a tree with leaves [B, ...].
      microbatches: the number of parts.

    Returns:
      Gradients with the structure of `params`, and metrics.

    Raises:
      ValueError: if the rows can't be divided into that many parts.
    """
    gradients = jax.grad(loss_fn, has_aux=True)
    batch_size = jax.tree.leaves(rows)[0].shape[0]
    if microbatches < 1 or batch_size % microbatches:
        raise ValueError(
            f'a batch of {batch_size} rows does not divide into microbatches={microbatches}; '
            f'use a divisor of {batch_size}.'
        )
    if microbatches == 1:
        return gradients(params, rows)

    def split(leaf: jax.Array) -> jax.Array:
        """Splits rows such that part i has rows i, i + parts, ..., which need not change device."""
        return jnp.moveaxis(leaf.reshape(-1, microbatches, *leaf.shape[1:]), 1, 0)

    parts = jax.tree.map(split, rows)
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradients, params, first)
    )

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(params, part)), None

    return jax.lax.scan(add, zeros, parts)[0]
