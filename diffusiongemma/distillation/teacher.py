"""Teacher distributions of the next token: from logits, or from k most likely tokens in a file.

Both forms are pytrees whose leaves share their leading axes, and both compute their KL to a
student.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusiongemma.models.arrays import Array, Params


@runtime_checkable
class TeacherDistribution(Protocol):
    """p_T, a distribution over the next token at each position [...]."""

    def kl(self, logits: Float[Array, '*B V']) -> Float[Array, '*B']:
        """Returns KL(p_T || softmax(logits)) in nats: [..., V] -> [...] float32."""
        ...


@dataclasses.dataclass(frozen=True)
class TeacherStates:
    """p_T at positions [...] in a compact form, which is expanded for a few positions at a time.

    Attributes:
      values: a tree with leaves [..., x]: hidden states, or stored distributions.
      read: a function from the values at some positions to the distributions there. Its optional
        second argument replaces `params`.
      hidden: [B, L, D], final hidden states of the encode pass over the rows, without gradient.
      params: the parameters that `read` uses by default; empty if it uses none.
    """

    values: Any
    read: Callable[..., TeacherDistribution]
    hidden: Float[Array, 'B L D']
    params: Params = dataclasses.field(default_factory=dict)


@flax.struct.dataclass
class FullDistribution:
    """p_T as the logits of a teacher pass.

    Attributes:
      logits: [..., V], the logits of the teacher.
    """

    logits: Float[Array, '*B V']

    def kl(self, logits: Float[Array, '*B V']) -> Float[Array, '*B']:
        """Returns the KL, see `TeacherDistribution`."""
        target = jax.nn.log_softmax(self.logits.astype(jnp.float32), axis=-1)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return jnp.sum(jnp.exp(target) * (target - log_probs), axis=-1)


@flax.struct.dataclass
class TopKDistribution:
    """p_T as the probabilities of the k most likely tokens and of all others together.

    Attributes:
      ids: [..., k] int32, the tokens, the most likely one first.
      log_probs: [..., k] float16, their log-probabilities in nats.
      log_rest: [...] float16, log of the total probability of all other tokens; -inf if k = V.
    """

    ids: Int[Array, '*B k']
    log_probs: Float[Array, '*B k']
    log_rest: Float[Array, '*B']

    @classmethod
    def of(cls, logits: Float[Array, '*B V'], k: int) -> 'TopKDistribution':
        """Returns the distribution of logits [..., V], with k <= V."""
        all_log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        log_probs, ids = jax.lax.top_k(all_log_probs, k)  # [..., k]
        log_rest = _log_sum_of_others(all_log_probs, ids)
        return cls(ids, log_probs.astype(jnp.float16), log_rest.astype(jnp.float16))

    def kl(self, logits: Float[Array, '*B V']) -> Float[Array, '*B']:
        """Returns the KL over k + 1 outcomes: each of the k tokens, and "any other".

        Merging outcomes never increases a KL (log-sum inequality: Cover and Thomas, Elements of
        Information Theory, theorem 2.7.1), so this is a lower bound of the full KL, and equal to it
        for k >= V - 1. For all other tokens the student only learns their total probability.
        """
        # Both distributions have k + 1 outcomes: [..., k + 1].
        target = jnp.concatenate([self.log_probs, self.log_rest[..., None]], axis=-1)
        # Normalized again, because probabilities that are rounded to float16 do not sum to 1.
        target = jax.nn.log_softmax(target.astype(jnp.float32), axis=-1)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        top = jnp.take_along_axis(log_probs, self.ids, axis=-1)  # [..., k]
        if self.ids.shape[-1] < logits.shape[-1]:
            log_rest = _log_sum_of_others(log_probs, self.ids)
        else:  # no other tokens: the target probability is 0, and log 0 has no gradient
            log_rest = jnp.zeros(top.shape[:-1])
        log_probs = jnp.concatenate([top, log_rest[..., None]], axis=-1)  # [..., k + 1]
        terms = jnp.exp(target) * (target - log_probs)  # NaN where the target is 0
        return jnp.sum(jnp.where(jnp.isneginf(target), 0.0, terms), axis=-1)


def _log_sum_of_others(
    log_probs: Float[Array, '*B V'], ids: Int[Array, '*B k']
) -> Float[Array, '*B']:
    """Returns the log of the total probability [...] of the tokens that are not in ids [..., k].

    It sums over these tokens, because 1 - (sum of the k) would be dominated by rounding errors if
    the k tokens are nearly certain.
    """
    others = jnp.put_along_axis(log_probs, ids, -jnp.inf, axis=-1, inplace=False)
    return jax.nn.logsumexp(others, axis=-1)
