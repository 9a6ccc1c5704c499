"""Which positions of a canvas keep their candidate token after a denoise step."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class AcceptanceRule(Protocol):
    """Chooses positions from the entropies of their predictions."""

    def accept(self, entropies: jax.Array) -> jax.Array:
        """Returns the accepted positions.

        Args:
          entropies: [..., C] float32, entropy in nats of the prediction at each position.

        Returns:
          [..., C] bool.
        """
        ...


@dataclasses.dataclass(frozen=True)
class EntropyBound:
    """Accepts the k most certain positions whose joint uncertainty is bounded.

    k is the largest number such that the sum of the k lowest entropies, less the largest of
    them, is at most the bound. That difference bounds the mutual information between the k
    tokens, which is what drawing them independently loses (entropy-bounded unmasking,
    Ben-Hamu et al. 2025, arXiv:2505.24857). One position is always accepted; of equally
    uncertain ones the first.

    Attributes:
      entropy_bound: nats, >= 0. Infinity accepts everything.
    """

    entropy_bound: float = 0.1

    def __post_init__(self):
        if not self.entropy_bound >= 0:
            raise ValueError(
                f'entropy_bound must be >= 0 nats, got {self.entropy_bound}; the released models '
                'use 0.1, higher values accept more tokens per step.'
            )

    def accept(self, entropies: jax.Array) -> jax.Array:
        """[..., C] float32 nats -> [..., C] bool."""
        order = jnp.argsort(entropies, axis=-1, stable=True)
        ascending = jnp.take_along_axis(entropies, order, axis=-1)
        # Position i of the order is the largest of its set: what counts is the sum before it.
        sums = jnp.cumsum(ascending[..., :-1], axis=-1)
        sums_before = jnp.concatenate([jnp.zeros_like(ascending[..., :1]), sums], axis=-1)
        rank = jnp.argsort(order, axis=-1)
        return jnp.take_along_axis(sums_before <= self.entropy_bound, rank, axis=-1)
