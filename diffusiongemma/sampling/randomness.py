"""Random keys with one stream per row, so the tokens of a row do not depend on other rows."""

import jax
import jax.numpy as jnp
import numpy as np


def row_keys(rng: jax.Array, batch_size: int) -> jax.Array:
    """Returns one typed key per row, [B].

    Args:
      rng: one key, of which row r gets `fold_in(rng, r)`, or [B] keys that are used unchanged.
        Raw uint32 keys (`jax.random.PRNGKey`) are also accepted.
      batch_size: the number of rows B.
    """
    rng = typed_key(rng)
    if rng.ndim == 1:
        return rng
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, jnp.arange(batch_size))


def typed_key(rng: jax.Array) -> jax.Array:
    """Returns `rng` as a typed key array; it may be typed or raw uint32, else ValueError."""
    if not isinstance(rng, (jax.Array, np.ndarray)):
        raise ValueError(f'rng must be a key such as jax.random.key(0), got {rng!r}.')
    if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        return rng
    key: jax.Array = jax.random.wrap_key_data(rng)
    return key


def fold_in_rows(keys: jax.Array, data: int | jax.Array) -> jax.Array:
    """Folds a number, the same or one per row [B], into the rows' keys: [B] keys -> [B] keys."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(data, keys.shape))


def split_rows(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits the key of every row into two: [B] keys -> two arrays of [B] keys."""
    pairs = jax.vmap(jax.random.split)(keys)  # [B, 2]
    return pairs[:, 0], pairs[:, 1]


def uniform_tokens(keys: jax.Array, length: int, vocab_size: int) -> jax.Array:
    """Returns tokens drawn uniformly from the vocabulary: [B] keys -> [B, length] int32."""
    return jax.vmap(lambda key: jax.random.randint(key, (length,), 0, vocab_size))(keys)
