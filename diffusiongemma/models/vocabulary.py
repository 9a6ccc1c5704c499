"""Matmuls and reductions over a large vocabulary, computed in parts where that is faster.

On CPUs, XLA loses half of its speed or more on axes as long as a large vocabulary: intermediate
arrays go through memory instead of the cache, and some reductions are neither vectorized nor
parallel. The results are the same; TPUs and GPUs do not use parts.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusiongemma.models.arrays import Array

Total = TypeVar('Total')
Pair = tuple[jax.Array, jax.Array]
Largest = tuple[Float[Array, '*B'], Int[Array, '*B']]  # maxima over a vocabulary, their tokens

LARGE_VOCABULARY = 65_536  # above this size parts are faster
VOCABULARY_PART = 2_048  # 6 MB for the logits of 64 tokens and 640 columns of a table
SMALLEST_CHUNK = 16  # the minimum chunk size of an argmax by chunks


def fold_parts(
    add: Callable[[Total, jax.Array | int, int], Total], total: Total, vocab_size: int
) -> Total:
    """Returns the total after `total = add(total, start, length)` for every part of the vocabulary.

    Args:
      add: a function of the total, the first token of a part and its (static) number of tokens.
      total: the initial total, a pytree of arrays.
      vocab_size: the vocabulary size V.
    """
    count, remainder = divmod(vocab_size, VOCABULARY_PART)
    if remainder:
        total = add(total, vocab_size - remainder, remainder)
    result: Total = jax.lax.fori_loop(
        0, count, lambda i, total: add(total, i * VOCABULARY_PART, VOCABULARY_PART), total
    )
    return result


def logits_by_parts(
    hidden: Float[Array, 't D'], product: Callable[..., jax.Array], table: Float[Array, 'V D']
) -> Float[Array, 't V']:
    """Returns the logits [t, V] float32 of hidden states [t, D], see `Embedder.decode`.

    Args:
      hidden: [t, D], hidden states.
      product: a function of hidden states and rows [n, D] of the table that returns [t, n].
      table: [V, D], the embedding table.
    """

    def add(logits: jax.Array, start: jax.Array | int, length: int) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(table, start, length)  # [n, D]
        return jax.lax.dynamic_update_slice_in_dim(logits, product(hidden, rows), start, axis=1)

    logits = jnp.zeros((hidden.shape[0], table.shape[0]), jnp.float32)
    return fold_parts(add, logits, table.shape[0])


def expected_rows_by_parts(
    logits: Float[Array, 't V'], product: Callable[..., jax.Array], table: Float[Array, 'V D']
) -> Float[Array, 't D']:
    """Returns softmax(logits) @ table in float32, without storing the softmax.

    Args:
      logits: [t, V] float32.
      product: a function of weights [t, n] and rows [n, D] of the table that returns [t, D]
        float32.
      table: [V, D]; the weights are cast to its dtype.
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)  # [t, 1]

    def add(totals: Pair, start: jax.Array | int, length: int) -> Pair:
        rows = jax.lax.dynamic_slice_in_dim(table, start, length)  # [n, D]
        weights = jnp.exp(jax.lax.dynamic_slice_in_dim(logits, start, length, axis=1) - largest)
        expected, total = totals
        expected += product(weights.astype(table.dtype), rows)  # [t, n] x [n, D] -> [t, D]
        return expected, total + jnp.sum(weights, axis=-1, keepdims=True)

    zeros = jnp.zeros((logits.shape[0], table.shape[1])), jnp.zeros_like(largest)
    expected, total = fold_parts(add, zeros, table.shape[0])
    return expected / total


def log_partition_and_entropy(
    logits: Float[Array, '*B V'], largest: Float[Array, '*B'] | None = None
) -> tuple[Float[Array, '*B'], Float[Array, '*B']]:
    """Returns log z and the entropy in nats of softmax(logits): [..., V] -> [...] float32 each.

    The entropy is log z' - sum(e^x x) / z' with x = logits - max and z' their partition function.
    These are only reductions, so no second array with a vocabulary axis is stored. The entropy is
    never negative. Logits of -inf have probability zero. `largest` is the maximum of the logits
    if it is known.
    """
    if largest is None:
        largest = jnp.max(logits, axis=-1)

    def sums(logits: jax.Array, largest: jax.Array) -> Pair:
        shifted = logits - largest[..., None]
        weights = jnp.exp(shifted)
        weighted = jnp.where(weights > 0, weights * shifted, 0.0)  # 0 * -inf is NaN
        return jnp.sum(weights, axis=-1), jnp.sum(weighted, axis=-1)

    def sums_by_parts(logits: jax.Array, largest: jax.Array) -> Pair:
        def add(totals: Pair, start: jax.Array | int, length: int) -> Pair:
            part = jax.lax.dynamic_slice_in_dim(logits, start, length, axis=-1)
            total: Pair = jax.tree.map(jnp.add, totals, sums(part, largest))
            return total

        return fold_parts(add, (jnp.zeros_like(largest),) * 2, logits.shape[-1])

    total, weighted = _by_platform(sums_by_parts, sums, logits, largest)
    return largest + jnp.log(total), jnp.log(total) - weighted / total


def most_likely_tokens(logits: Float[Array, '*B V']) -> Int[Array, '*B']:
    """Returns jnp.argmax over the last axis, the first one for ties: [..., V] -> [...] int32."""
    vocab_size = logits.shape[-1]
    size = max(n for n in range(1, math.isqrt(vocab_size) + 1) if vocab_size % n == 0)
    if size < SMALLEST_CHUNK:
        return _argmax(logits)
    by_chunks = functools.partial(_argmax_of_chunks, size=size)
    tokens: jax.Array = jax.lax.platform_dependent(logits, cpu=by_chunks, default=_argmax)
    return tokens


def largest_logits(*arrays: Float[Array, '*B V']) -> tuple[Largest, ...]:
    """Returns the maximum and the argmax token of each array [..., V]: [...] float32 and int32.

    The token is the first one for ties. TPUs read all arrays in one pass; if they are functions of
    the same logits, these are read once.
    """
    largest: tuple[Largest, ...] = jax.lax.platform_dependent(
        *arrays, tpu=_largest_in_one_pass, default=_largest_of_each
    )
    return largest


def _largest_of_each(*arrays: jax.Array) -> tuple[Largest, ...]:
    tokens = [most_likely_tokens(logits) for logits in arrays]
    return tuple(
        (jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0], token)
        for logits, token in zip(arrays, tokens, strict=True)
    )


def _largest_in_one_pass(*arrays: jax.Array) -> tuple[Largest, ...]:
    axis = arrays[0].ndim - 1
    index = jax.lax.broadcasted_iota(jnp.int32, arrays[0].shape, axis)  # [..., V], the tokens

    def larger(one: Sequence[jax.Array], other: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Returns the larger (value, token) pair for each array; NaN is the largest value."""
        result: tuple[jax.Array, ...] = ()
        for i in range(0, len(one), 2):
            (value, token), (best, best_token) = one[i : i + 2], other[i : i + 2]
            is_larger = (value > best) | jnp.isnan(value)
            is_first = is_larger | ((value == best) & (token < best_token))
            result += jnp.where(is_larger, value, best), jnp.where(is_first, token, best_token)
        return result

    operands = [part for logits in arrays for part in (logits, index)]
    initial = [jnp.float32(-jnp.inf), jnp.int32(0)] * len(arrays)
    largest = jax.lax.reduce(operands, initial, larger, (axis,))
    return tuple(zip(largest[::2], largest[1::2], strict=True))


def _argmax(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _argmax_of_chunks(logits: jax.Array, size: int) -> jax.Array:
    """Returns the argmax in two steps, over chunk maxima and in a chunk; only max is vectorized."""
    chunks = logits.reshape(*logits.shape[:-1], -1, size)  # [..., chunks, size]
    chunk = _argmax(jnp.max(chunks, axis=-1))
    chosen = jnp.take_along_axis(chunks, chunk[..., None, None], axis=-2)[..., 0, :]  # [..., size]
    return chunk * size + _argmax(chosen)


def _by_platform(
    by_parts: Callable[..., Total],
    whole: Callable[..., Total],
    logits: jax.Array,
    *others: jax.Array,
) -> Total:
    if logits.shape[-1] <= LARGE_VOCABULARY:
        return whole(logits, *others)
    result: Total = jax.lax.platform_dependent(logits, *others, cpu=by_parts, default=whole)
    return result
