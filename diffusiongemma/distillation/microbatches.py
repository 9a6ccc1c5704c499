"""Gradient accumulation: computes a batch in parts, one after another."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]
Gradients = Callable[[Any, Any], tuple[Any, Metrics]]


def in_microbatches(gradients: Gradients, microbatches: int) -> Gradients:
    """Returns a version of `gradients` that computes a batch in parts and sums over them.

    Activations exist for one part at a time, at the cost of a second copy of the gradients.

    Args:
      gradients: a function from parameters and rows, a tree with leaves [B, ...], to the gradients
        and metrics that these rows contribute to the sums over the batch.
      microbatches: the number of parts; with 1 `gradients` is returned unchanged.

    Raises:
      ValueError: if the rows of a call can't be divided into that many parts.
    """
    if microbatches == 1:
        return gradients
    return functools.partial(_summed, gradients, microbatches)


def _summed(gradients: Gradients, microbatches: int, params: Any, rows: Any) -> tuple[Any, Metrics]:
    batch_size = jax.tree.leaves(rows)[0].shape[0]
    if microbatches < 1 or batch_size % microbatches:
        raise ValueError(
            f'a batch of {batch_size} rows does not divide into microbatches={microbatches}; '
            f'use a divisor of {batch_size}.'
        )

    def split(leaf: jax.Array) -> jax.Array:
        """Splits rows such that part i has rows i, i + parts, ..., which need not change device."""
        return jnp.moveaxis(leaf.reshape(-1, microbatches, *leaf.shape[1:]), 1, 0)

    parts = jax.tree.map(split, rows)  # [parts, B / parts, ...]
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(gradients, params, first)
    )

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients(params, part)), None

    total: tuple[Any, Metrics] = jax.lax.scan(add, zeros, parts)[0]
    return total
