"""Computes tokens and statistics from logits: all reductions over the vocabulary axis."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key

from diffusiongemma.models.arrays import Array
from diffusiongemma.models.vocabulary import (
    largest_logits,
    log_partition_and_entropy,
    most_likely_tokens,
)

NumberOrRows = float | Float[Array, ''] | Float[Array, ' B']  # one number, or one for each row


@flax.struct.dataclass
class Prediction:
    """The predictions of one denoise pass at each position.

    Attributes:
      candidates: [..., C] int32, a token drawn from the shaped distribution.
      argmax: [..., C] int32, the most likely token.
      log_z: [..., C] float32, the logarithm of the shaped distribution's partition function.
      entropies: [..., C] float32, entropy of the shaped distribution in nats.
      confidences: [..., C] float32, probability of the candidate.
      margins: [..., C] float32, the argmax token's probability minus that of the second token.
    """

    candidates: Int[Array, '*B C']
    argmax: Int[Array, '*B C']
    log_z: Float[Array, '*B C']
    entropies: Float[Array, '*B C']
    confidences: Float[Array, '*B C']
    margins: Float[Array, '*B C']


def read_logits(
    shaped: Float[Array, '*B C V'],
    candidates: Int[Array, '*B C'],
    argmax: Int[Array, '*B C'],
    largest: Float[Array, '*B C'] | None = None,
) -> Prediction:
    """Returns the statistics of shaped logits; XLA removes those that are not used.

    Args:
      shaped: [..., C, V] float32, logits divided by the temperature.
      candidates: [..., C] int32, the drawn tokens.
      argmax: [..., C] int32, the most likely tokens.
      largest: [..., C] float32, the maximum of the logits if it is known.
    """
    log_z, entropies = log_partition_and_entropy(shaped, largest)  # [..., C] each
    most_likely = jnp.exp(_logits_of(shaped, argmax) - log_z)
    is_best = jnp.arange(shaped.shape[-1]) == argmax[..., None]  # [..., C, V]
    second = jnp.exp(jnp.max(jnp.where(is_best, -jnp.inf, shaped), axis=-1) - log_z)
    return Prediction(
        candidates=candidates,
        argmax=argmax,
        log_z=log_z,
        entropies=entropies,
        confidences=jnp.exp(_logits_of(shaped, candidates) - log_z),
        margins=most_likely - second,
    )


def adjust(
    logits: Float[Array, 'B *T V'],
    temperature: NumberOrRows,
    top_k: int | None,
    top_p: NumberOrRows | None,
) -> Float[Array, 'B *T V']:
    """Returns the logits [B, ..., V] of the distribution that tokens are drawn from.

    Args:
      logits: [B, ..., V] float32.
      temperature: a number >= 0, or [B]; rows at 0 are not scaled.
      top_k, top_p: see `keep_top`.
    """
    if always_greedy(temperature):
        return logits
    temperature = jnp.asarray(temperature, jnp.float32)
    scaled = logits / per_row(jnp.where(temperature == 0, 1.0, temperature), logits)
    return keep_top(scaled, top_k, top_p)


def draw(
    adjusted: Float[Array, 'B *T V'], temperature: NumberOrRows, keys: Key[Array, ' B']
) -> Int[Array, ' B *T']:
    """Returns draws from softmax(adjusted), or the argmax in rows at temperature 0.

    Args:
      adjusted: [B, ..., V] float32, see `adjust`.
      temperature: a number >= 0, or [B].
      keys: [B] keys.

    Returns:
      [B, ...] int32.
    """
    if always_greedy(temperature):
        return most_likely_tokens(adjusted)
    greedy = per_row(jnp.asarray(temperature) == 0, adjusted[..., 0])  # broadcasts to [B, ...]
    return jnp.where(greedy, most_likely_tokens(adjusted), draw_tokens(adjusted, keys))


def argmax_and_draw(
    logits: Float[Array, 'B *T V'],
    adjusted: Float[Array, 'B *T V'],
    temperature: NumberOrRows,
    keys: Key[Array, ' B'],
) -> tuple[Float[Array, ' B *T'], Int[Array, ' B *T'], Int[Array, ' B *T']]:
    """Returns the maximum of the logits, its token, and the draws of `draw`.

    Args:
      logits: [B, ..., V] float32.
      adjusted: [B, ..., V] float32, the logits without those that `keep_top` removes.
      temperature: a number >= 0, or [B].
      keys: [B] keys.

    Returns:
      [B, ...] float32, and twice [B, ...] int32.
    """
    if always_greedy(temperature):
        ((largest, argmax),) = largest_logits(logits)
        return largest, argmax, argmax
    noisy = adjusted + _row_noise(adjusted, keys)
    (largest, argmax), (_, drawn) = largest_logits(logits, noisy)
    greedy = per_row(jnp.asarray(temperature) == 0, argmax)
    return largest, argmax, jnp.where(greedy, argmax, drawn)


def pick(
    adjusted: Float[Array, 'B *T V'],
    temperature: NumberOrRows,
    noise: Float[Array, 'B *T V'] | None,
) -> Int[Array, ' B *T']:
    """Returns argmax(adjusted + noise), which is a draw from softmax(adjusted) for Gumbel noise.

    Args:
      adjusted: [B, ..., V] float32, see `adjust`.
      temperature: a number >= 0, or [B]; rows at 0 take the argmax without noise.
      noise: [B, ..., V] float32, see `gumbel_noise`; None if every row is greedy.

    Returns:
      [B, ...] int32.
    """
    if noise is None or always_greedy(temperature):
        return most_likely_tokens(adjusted)
    greedy = per_row(jnp.broadcast_to(jnp.asarray(temperature) == 0, adjusted.shape[:1]), adjusted)
    return most_likely_tokens(adjusted + jnp.where(greedy, 0.0, noise))


def draw_tokens(logits: Float[Array, 'B *T V'], keys: Key[Array, ' B']) -> Int[Array, ' B *T']:
    """Returns draws from softmax(logits), one key per row: [B, ..., V] -> [B, ...] int32."""
    return most_likely_tokens(logits + _row_noise(logits, keys))


def _row_noise(logits: Float[Array, 'B *T V'], keys: Key[Array, ' B']) -> Float[Array, 'B *T V']:
    """Returns standard Gumbel noise for logits [B, ..., V], with one key for each row."""
    return jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)


def gumbel_noise(keys: Key[Array, 'B T'], vocab_size: int) -> Float[Array, 'B T {vocab_size}']:
    """Returns standard Gumbel noise for each position: keys [B, T] -> [B, T, V] float32.

    For the same key it equals the noise of `draw` for one row of logits [V].
    """
    return jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,))))(keys)


def always_greedy(temperature: NumberOrRows) -> bool:
    """Returns whether the temperature is known to be 0 at compile time."""
    return isinstance(temperature, (int, float)) and temperature == 0


def per_row(values: jax.Array, like: jax.Array) -> jax.Array:
    """Returns [B] values with trailing axes so that they broadcast to `like`; scalars unchanged."""
    return values.reshape(-1, *[1] * (like.ndim - 1)) if values.ndim else values


def keep_top(
    logits: Float[Array, 'B *T V'], top_k: int | None, top_p: NumberOrRows | None
) -> Float[Array, 'B *T V']:
    """Returns logits with -inf for all but the most probable tokens: [B, ..., V] -> [B, ..., V].

    Args:
      logits: [B, ..., V] float32, already divided by the temperature.
      top_k: keeps the k most likely tokens (more if there are ties); None keeps all.
      top_p: then keeps the smallest set of most likely tokens with a total probability of at least
        p (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751), one p or one per row [B];
        1 and None keep all.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, top_k)[0][..., -1:]  # [B, ..., 1]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)  # NaN is kept, to be detected later
    if top_p is not None and not (isinstance(top_p, (int, float)) and top_p >= 1):
        # The float sum of all probabilities may exceed 1: a limit of 1 must not cut its tail.
        limit = jnp.where(jnp.asarray(top_p) >= 1, jnp.inf, top_p)
        descending = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # [B, ..., V], of all more likely tokens
        count = jnp.sum(before < per_row(limit, logits), axis=-1, keepdims=True)  # >= 1
        lowest = jnp.take_along_axis(descending, count - 1, axis=-1)  # [B, ..., 1]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits


def entropy(logits: Float[Array, '*B V']) -> Float[Array, '*B']:
    """Returns the entropy of softmax(logits) in nats, >= 0: [..., V] float32 -> [...] float32."""
    return log_partition_and_entropy(logits)[1]


def _logits_of(logits: Float[Array, '*B V'], tokens: Int[Array, '*B']) -> Float[Array, '*B']:
    """Returns the logits [...] of tokens [...] from logits [..., V]."""
    return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
