"""When a canvas is done before its last denoise step."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class StoppingRule(Protocol):
    """Decides from the latest predictions of a canvas whether to denoise it further."""

    @property
    def history_length(self) -> int:
        """W, how many of the latest argmax canvases the rule looks at, at least 1."""
        ...

    def should_stop(self, argmax_history: jax.Array, entropies: jax.Array) -> jax.Array:
        """Returns which rows are done.

        Args:
          argmax_history: [B, W, C] int32, the argmax canvases of the latest W steps, the
            current step's last; -1 where there was no step yet.
          entropies: [B, C] float32, entropies of the current step's predictions in nats.

        Returns:
          [B] bool.
        """
        ...


@dataclasses.dataclass(frozen=True)
class StableAndConfident:
    """Stops when the argmax canvas no longer changes and its predictions are certain.

    Attributes:
      stability_threshold: number of previous steps whose argmax canvas must equal the current
        one, so that the earliest stop is after this many steps plus one. 0 drops the condition.
      confidence_threshold: the mean entropy of the canvas must lie below it (nats). 0 never
        stops early, infinity drops the condition.
    """

    stability_threshold: int = 1
    confidence_threshold: float = 0.005

    def __post_init__(self):
        if self.stability_threshold < 0:
            raise ValueError(
                f'stability_threshold must be >= 0 steps, got {self.stability_threshold}; '
                'use 0 to stop on confidence alone.'
            )
        if not self.confidence_threshold >= 0:
            raise ValueError(
                f'confidence_threshold must be >= 0 nats, got {self.confidence_threshold}; '
                'use 0 to run all denoise steps.'
            )

    @property
    def history_length(self) -> int:
        return self.stability_threshold + 1

    def should_stop(self, argmax_history: jax.Array, entropies: jax.Array) -> jax.Array:
        """[B, W, C] argmax canvases, [B, C] entropies -> [B] bool."""
        current = argmax_history[:, -1:]
        stable = jnp.all(argmax_history == current, axis=(1, 2))
        confident = jnp.mean(entropies, axis=-1) < self.confidence_threshold
        return stable & confident
