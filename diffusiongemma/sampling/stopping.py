"""Stopping rules, which end a canvas before its last denoise step."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from diffusiongemma.models.arrays import Array


@runtime_checkable
class StoppingRule(Protocol):
    """A rule that decides from the latest predictions whether a canvas is done."""

    @property
    def history_length(self) -> int:
        """Returns W, the number of latest argmax canvases that the rule needs, at least 1."""
        ...

    def should_stop(
        self, argmax_history: Int[Array, 'B W C'], entropies: Float[Array, 'B C']
    ) -> Bool[Array, ' B']:
        """Returns which rows are done.

        Args:
          argmax_history: [B, W, C] int32, the argmax canvases of the latest W steps, the current
            one last; -1 for steps that do not exist yet.
          entropies: [B, C] float32, entropies of the current step's predictions in nats.

        Returns:
          [B] bool.
        """
        ...


@dataclasses.dataclass(frozen=True)
class StableAndConfident:
    """A rule that stops when the argmax canvas no longer changes and predictions are certain.

    Attributes:
      stability_threshold: the number of previous steps whose argmax canvas must equal the current
        one, so the earliest stop is after this many steps plus one. 0 drops the condition.
      confidence_threshold: the mean entropy of the canvas must be below this value in nats. 0
        never stops early; infinity drops the condition.
    """

    stability_threshold: int = 1
    confidence_threshold: float = 0.005

    def __post_init__(self) -> None:
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

    def should_stop(
        self, argmax_history: Int[Array, 'B W C'], entropies: Float[Array, 'B C']
    ) -> Bool[Array, ' B']:
        """Returns which rows are done, [B] bool, see `StoppingRule`."""
        current = argmax_history[:, -1:]
        stable = jnp.all(argmax_history == current, axis=(1, 2))
        confident = jnp.mean(entropies, axis=-1) < self.confidence_threshold
        return stable & confident


@dataclasses.dataclass(frozen=True)
class TokenStability:
    """A rule that stops when the argmax canvas has not changed for some steps.

    Attributes:
      num_steps: the number of previous steps whose argmax canvas must equal the current one, >= 1.
    """

    num_steps: int = 2

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f'num_steps must be >= 1 previous step, got {self.num_steps}.')

    @property
    def history_length(self) -> int:
        return self.num_steps + 1

    def should_stop(
        self, argmax_history: Int[Array, 'B W C'], entropies: Float[Array, 'B C']
    ) -> Bool[Array, ' B']:
        """Returns which rows are done, [B] bool, see `StoppingRule`."""
        del entropies
        history = argmax_history[:, -self.history_length :]
        return jnp.all(history == history[:, -1:], axis=(1, 2))


@dataclasses.dataclass(frozen=True)
class MeanEntropy:
    """A rule that stops when the predictions are certain on average.

    Attributes:
      threshold: the mean entropy of the canvas must be below this value in nats.
    """

    threshold: float = 0.005
    history_length = 1

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f'threshold must be >= 0 nats, got {self.threshold}.')

    def should_stop(
        self, argmax_history: Int[Array, 'B W C'], entropies: Float[Array, 'B C']
    ) -> Bool[Array, ' B']:
        """Returns which rows are done, [B] bool, see `StoppingRule`."""
        del argmax_history
        return jnp.mean(entropies, axis=-1) < self.threshold


@dataclasses.dataclass(frozen=True)
class Never:
    """A rule that never stops early: every denoise step of the config is taken."""

    history_length = 1

    def should_stop(
        self, argmax_history: Int[Array, 'B W C'], entropies: Float[Array, 'B C']
    ) -> Bool[Array, ' B']:
        """Returns False for every row, [B] bool."""
        del argmax_history
        return jnp.zeros(entropies.shape[0], bool)


@dataclasses.dataclass(frozen=True)
class AllOf:
    """A rule that stops when all of several rules would stop.

    Attributes:
      rules: at least one stopping rule.
    """

    rules: tuple[StoppingRule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, 'rules', tuple(self.rules))
        if not self.rules:
            raise ValueError('AllOf needs at least one rule; Never() is the rule that never stops.')

    @property
    def history_length(self) -> int:
        return max(rule.history_length for rule in self.rules)

    def should_stop(
        self, argmax_history: Int[Array, 'B W C'], entropies: Float[Array, 'B C']
    ) -> Bool[Array, ' B']:
        """Returns which rows are done, [B] bool, see `StoppingRule`."""
        votes = [
            rule.should_stop(argmax_history[:, -rule.history_length :], entropies)
            for rule in self.rules
        ]
        return jnp.all(jnp.stack(votes), axis=0)
