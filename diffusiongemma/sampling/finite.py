"""Detects NaN and infinite logits: compiled programs record the pass, the host raises an error."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Codes of `failed_pass`: 0 means no failure, n the n-th name.
PASSES = ('prefill', 'denoise', 'commit', 'verify', 'autoregressive')


def are_finite(values: jax.Array) -> jax.Array:
    """Returns which rows have only finite values: [B, ...] -> [B] bool."""
    return jnp.all(jnp.isfinite(values).reshape(values.shape[0], -1), axis=-1)


def chosen_are_finite(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns whether the logit of the chosen token is finite; reads one logit per position.

    This detects all NaN and positive infinity, because argmax selects them.

    Args:
      logits: [..., V] float32, the logits by which the tokens were chosen.
      tokens: [...] int32, the chosen tokens.

    Returns:
      [...] bool.
    """
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.isfinite(chosen)


def first_failure(failed_pass: jax.Array, name: str, failed: jax.Array) -> jax.Array:
    """Returns the code of each row's first failure.

    Args:
      failed_pass: [B] int32, the codes so far.
      name: the name of the current pass, one of `PASSES`.
      failed: [B] bool, whether its logits are not finite.
    """
    code = PASSES.index(name) + 1
    return jnp.where((failed_pass == 0) & failed, code, failed_pass)


def check_finite(failed_pass: Any) -> None:
    """Raises FloatingPointError if any row failed; does nothing in traced code.

    Args:
      failed_pass: [B] int32, see `SamplerOutput`. If it is sharded over several processes, only
        the rows of this process are checked.
    """
    if isinstance(failed_pass, jax.core.Tracer):
        return
    for first, codes in _local_rows(failed_pass):
        rows = np.flatnonzero(codes)
        if rows.size:
            others = f' (and {rows.size - 1} more)' if rows.size > 1 else ''
            raise not_finite(codes[rows[0]], f'row {first + rows[0]}{others}')


def not_finite(code: int, where: str) -> FloatingPointError:
    """Returns the error for the code of a failed pass; its message contains `where`."""
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
