"""Weights of the draft positions in the loss of `drafting.py`."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

ACCEPTED_LENGTH, DECAY, EQUAL = 'accepted_length', 'decay', 'equal'


class PositionWeights(Protocol):
    """A weighting of the positions of a draft; hashable."""

    def weights(self, probabilities: jax.Array, valid: jax.Array) -> jax.Array:
        """Returns weights [..., K] float32 without gradient, 0 at positions that are not valid.

        Args:
          probabilities: [..., K] float32 in [0, 1], the draft's probabilities of the text's tokens.
          valid: [..., K] bool, positions with a token of the text; they are the first of a draft.
        """
        ...


@dataclasses.dataclass(frozen=True)
class EqualWeights:
    """Equal weights, as in plain cross-entropy."""

    def weights(self, probabilities: jax.Array, valid: jax.Array) -> jax.Array:
        """Returns the weights, see `PositionWeights`."""
        del probabilities
        return valid.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class DecayWeights:
    """Weights exp(-(j - 1) / gamma) at positions j = 1, 2, ... (DFlash, arXiv:2602.06036)."""

    gamma: float = 4.0

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ValueError(f'gamma must be > 0 places, got {self.gamma}.')

    def weights(self, probabilities: jax.Array, valid: jax.Array) -> jax.Array:
        """Returns the weights, see `PositionWeights`."""
        decay = jnp.exp(-jnp.arange(probabilities.shape[-1]) / self.gamma)
        return jnp.where(valid, decay, 0.0)


@dataclasses.dataclass(frozen=True)
class AcceptedLengthWeights:
    """Weights from the gradient of the expected accepted length (D-PACE, arXiv:2605.18810).

    The expected number of accepted tokens is A = sum_k prod_{i<=k} q_i, and dA / d log q_j =
    sum_{k>=j} prod_{i<=k} q_i. This is the weight of position j, with smoothed probabilities
    s_i = (1 - smoothing) q_i + smoothing, so that late positions are trained before early ones are
    certain. A token outside of the draft vocabulary has q_i = s_i = 0, so it and all later
    positions have weight 0.
    """

    smoothing: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f'smoothing must lie in [0, 1], got {self.smoothing}.')

    def weights(self, probabilities: jax.Array, valid: jax.Array) -> jax.Array:
        """Returns the weights, see `PositionWeights`."""
        smoothed = (1 - self.smoothing) * probabilities + self.smoothing
        smoothed = jnp.where(valid & (probabilities > 0), smoothed, 0.0)
        accepted = jnp.cumprod(jax.lax.stop_gradient(smoothed), axis=-1)  # [..., K]
        return jnp.flip(jnp.cumsum(jnp.flip(accepted, axis=-1), axis=-1), axis=-1)
