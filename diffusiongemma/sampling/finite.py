"""Logits that are NaN or infinite: compiled programs note the pass, the host raises the error."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Codes of `failed_pass`: 0 is no failure, n the n-th name.
PASSES = ('prefill', 'denoise', 'commit', 'verify', 'autoregressive')


def are_finite(values: jax.Array) -> jax.Array:
    """Returns which rows have finite values only: [B, ...] -> [B] bool."""
    return jnp.all(jnp.isfinite(values).reshape(values.shape[0], -1), axis=-1)


def chosen_are_finite(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns where the logit of the chosen token is finite; reads one logit of each position.

    NaN and positive infinity win every argmax, so that logits which hold one are found.

    Args:
      logits: [..., V] float32, those that the tokens were chosen by.
      tokens: [...] int32.

    Returns:
      [...] bool.
    """
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.isfinite(chosen)


def first_failure(failed_pass: jax.Array, name: str, failed: jax.Array) -> jax.Array:
    """Returns the code of each row's first failure.

    Args:
      failed_pass: [B] int32, codes so far.
      name: of the pass that was taken, one of `PASSES`.
      failed: [B] bool, rows in which its logits are not finite.
    """
    code = PASSES.index(name) + 1
    return jnp.where((failed_pass == 0) & failed, code, failed_pass)


def check_finite(failed_pass: Any) -> None:
    """Raises FloatingPointError when some row failed; does nothing inside another jit.

    Args:
      failed_pass: [B] int32, see `SamplerOutput`. Of an array that other processes hold too, the
        rows of this process are looked at.
    """
    if isinstance(failed_pass, jax.core.Tracer):
        return
    for first, codes in _local_rows(failed_pass):
        rows = np.flatnonzero(codes)
        if rows.size:
            others = f' (and {rows.size - 1} more)' if rows.size > 1 else ''
            raise not_finite(codes[rows[0]], f'row {first + rows[0]}{others}')


def not_finite(code: int, where: str) -> FloatingPointError:
    """Returns the error of a failed pass, by its code, that names `where`."""
    return FloatingPointError(
        f'the logits of the {PASSES[code - 1]} pass are NaN or infinite in {where}. Look for NaN '
        'and infinity in the weights, and for a cast that overflowed; convert the checkpoint again '
        'from its source.'
    )


def _local_rows(array: Any) -> list[tuple[int, np.ndarray]]:
    """Returns the parts of an array [B] that this process holds, with their first rows."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return [(0, np.asarray(array))]
    return [
        (shard.index[0].start or 0, np.asarray(shard.data)) for shard in array.addressable_shards
    ]
