"""Weights of the draft positions in the loss of `drafting.py`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from diffusiongemma.errors import check_range
from diffusiongemma.models.arrays import Array
from diffusiongemma.sampling.rules import read_value

ACCEPTED_LENGTH, DECAY, EQUAL = 'accepted_length', 'decay', 'equal'


@runtime_checkable
class PositionWeights(Protocol):
    """A weighting of the positions of a draft; hashable."""

    def weights(
        self, probabilities: Float[Array, '*B K'], valid: Bool[Array, '*B K']
    ) -> Float[Array, '*B K']:
        """Returns weights [..., K] float32 without gradient, 0 at positions that are not valid.

        Args:
          probabilities: [..., K] float32 in [0, 1], the draft's probabilities of the text's tokens.
          valid: [..., K] bool, positions with a token of the text; they are the first of a draft.
        """
        ...


@dataclasses.dataclass(frozen=True)
class EqualWeights:
    """Equal weights, as in plain cross-entropy."""

    def weights(
        self, probabilities: Float[Array, '*B K'], valid: Bool[Array, '*B K']
    ) -> Float[Array, '*B K']:
        """Returns the weights, see `PositionWeights`."""
        del probabilities
        return valid.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class DecayWeights:
    """Weights exp(-(j - 1) / gamma) at positions j = 1, 2, ... (DFlash, arXiv:2602.06036)."""

    gamma: float = 4.0

    def __post_init__(self) -> None:
        if self.gamma <= 0:
            raise ValueError(f'gamma must be > 0 positions, got {self.gamma}.')

    def weights(
        self, probabilities: Float[Array, '*B K'], valid: Bool[Array, '*B K']
    ) -> Float[Array, '*B K']:
        """Returns the weights, see `PositionWeights`."""
        decay = jnp.exp(-jnp.arange(probabilities.shape[-1]) / self.gamma)  # [K]
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
        check_range('smoothing', self.smoothing, 0, 1)

    def weights(
        self, probabilities: Float[Array, '*B K'], valid: Bool[Array, '*B K']
    ) -> Float[Array, '*B K']:
        """Returns the weights, see `PositionWeights`."""
        smoothed = (1 - self.smoothing) * probabilities + self.smoothing
        smoothed = jnp.where(valid & (probabilities > 0), smoothed, 0.0)
        accepted = jnp.cumprod(jax.lax.stop_gradient(smoothed), axis=-1)  # [..., K]
        return jnp.flip(jnp.cumsum(jnp.flip(accepted, axis=-1), axis=-1), axis=-1)


def read_weights(weights: Any, smoothing: float, gamma: float) -> PositionWeights:
    """Returns the `PositionWeights` that `config.drafting.weights` asks for.

    Args:
      weights: 'accepted_length', 'decay' or 'equal'; the text of a custom class with its module,
        such as 'my_losses.Mine(2)'; or an object.
      smoothing: the smoothing of 'accepted_length'.
      gamma: the decay constant of 'decay', in positions.

    Raises:
      ValueError: if `weights` does not name or describe any `PositionWeights`.
    """
    named: dict[str, Callable[[], PositionWeights]] = {
        ACCEPTED_LENGTH: functools.partial(AcceptedLengthWeights, smoothing),
        DECAY: functools.partial(DecayWeights, gamma),
        EQUAL: EqualWeights,
    }
    if isinstance(weights, str) and weights in named:
        return named[weights]()
    if isinstance(weights, str) and '.' not in weights:
        raise ValueError(
            f'weights must be {ACCEPTED_LENGTH!r}, {DECAY!r} or {EQUAL!r}, or weights of '
            f"your own with their module, such as 'my_losses.Mine(2)', got {weights!r}."
        )
    custom: PositionWeights = read_value('weights', weights, 'weights', noun='weights')
    _check_shape(custom)
    return custom


def _check_shape(custom: PositionWeights) -> None:
    """Raises ValueError if weights of positions [B, K] have another shape; traces small ones."""
    shape = (2, 3)
    positions = jnp.zeros(shape), jnp.ones(shape, bool)
    found = jax.eval_shape(custom.weights, *positions)
    if jnp.shape(found) != shape:
        raise ValueError(
            f'{custom!r}.weights returned {jnp.shape(found)} for probabilities {shape}; it must '
            'return one weight per position.'
        )
