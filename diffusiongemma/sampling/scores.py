"""Log-probabilities of response tokens, from the causal pass that drew or verified them."""

import flax.struct
import jax
import jax.numpy as jnp

from diffusiongemma.models.arrays import AnyArray


@flax.struct.dataclass
class TokenScores:
    """The log-probabilities of tokens in nats, at temperature 1.

    They are normalized over the ids below `SamplingConfig.vocab_size`. `top_k`, `top_p` and
    `Controls` have no effect on them.

    Attributes:
      chosen: [..., T] float32, log-probabilities of the tokens of the response.
      top_tokens: [..., T, k] int32, the most likely tokens in descending order.
      top: [..., T, k] float32, the log-probabilities of these.
    """

    chosen: AnyArray
    top_tokens: AnyArray
    top: AnyArray

    @classmethod
    def empty(cls, batch_size: int, length: int, k: int) -> 'TokenScores':
        """Returns zeros for [batch_size, length] tokens with k alternatives each."""
        return cls(
            chosen=jnp.zeros((batch_size, length), jnp.float32),
            top_tokens=jnp.zeros((batch_size, length, k), jnp.int32),
            top=jnp.zeros((batch_size, length, k), jnp.float32),
        )

    @classmethod
    def of(cls, logits: jax.Array, tokens: jax.Array, k: int) -> 'TokenScores':
        """Returns the scores of tokens [B, T] and of the k most likely tokens at their positions.

        The logits [B, T, V] are those that predict the tokens.
        """
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        top, top_tokens = jax.lax.top_k(log_probs, k)  # [B, T, k] each
        chosen = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
        return cls(chosen=chosen, top_tokens=top_tokens.astype(jnp.int32), top=top)
