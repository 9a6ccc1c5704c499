"""One random stream per row: a row's tokens do not depend on its neighbors."""

import jax
import jax.numpy as jnp


def row_keys(rng: jax.Array, batch_size: int) -> jax.Array:
    """One key per row, [B] typed keys.

    Args:
      rng: one key, of which row r gets `fold_in(rng, r)`, or [B] keys that are used as they are.
        Raw uint32 keys (`jax.random.PRNGKey`) are accepted too.
      batch_size: B.
    """
    rng = typed_key(rng)
    if rng.ndim == 1:
        return rng
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, jnp.arange(batch_size))


def typed_key(rng: jax.Array) -> jax.Array:
    """`rng` as a typed key array, whichever of JAX's two forms it has."""
    if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        return rng
    return jax.random.wrap_key_data(rng)


def fold_in_rows(keys: jax.Array, data: int | jax.Array) -> jax.Array:
    """Folds a number, the same or one per row [B], into the rows' keys: [B] keys -> [B] keys."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(data, keys.shape))


def split_rows(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits every row's key in two: [B] keys -> two times [B] keys."""
    pairs = jax.vmap(jax.random.split)(keys)  # [B, 2]
    return pairs[:, 0], pairs[:, 1]


def uniform_tokens(keys: jax.Array, length: int, vocab_size: int) -> jax.Array:
    """Tokens drawn uniformly from the vocabulary: [B] keys -> [B, length] int32."""
    return jax.vmap(lambda key: jax.random.randint(key, (length,), 0, vocab_size))(keys)
