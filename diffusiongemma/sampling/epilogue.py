"""From logits to tokens: everything that is read off the vocabulary axis, in one place."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Prediction:
    """What one denoise pass says about each position.

    Attributes:
      candidates: [B, C] int32, a token drawn from the shaped distribution.
      argmax: [B, C] int32, the most likely token.
      entropies: [B, C] float32, entropy of the shaped distribution in nats.
    """

    candidates: jax.Array
    argmax: jax.Array
    entropies: jax.Array


def read_logits(
    logits: jax.Array, temperature: float | jax.Array, keys: jax.Array | None
) -> Prediction:
    """Candidate, argmax and entropy of softmax(logits / temperature).

    Args:
      logits: [B, C, V] float32.
      temperature: scalar > 0.
      keys: [B] keys for the candidates, or None to take the argmax as candidate.
    """
    shaped = logits / temperature
    argmax = jnp.argmax(shaped, axis=-1).astype(jnp.int32)
    candidates = argmax if keys is None else draw_tokens(shaped, keys)
    return Prediction(candidates=candidates, argmax=argmax, entropies=entropy(shaped))


def draw_tokens(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Draws from softmax(logits), each row with its own key: [B, ..., V] -> [B, ...] int32."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy of softmax(logits) in nats: [..., V] float32 -> [...] float32, never negative.

    log z - sum(e^x x) / z with x = logits - max: reductions only, so that no second array
    with a vocabulary axis has to be stored. Logits of -inf count as probability zero.
    """
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    weighted = jnp.sum(jnp.where(weights > 0, weights * shifted, 0.0), axis=-1)
    return jnp.log(total) - weighted / total
