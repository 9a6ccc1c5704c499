"""The noise level and the softmax temperature of each denoise step."""

import dataclasses
from typing import TypeVar

import jax

Number = TypeVar('Number', float, jax.Array)


@dataclasses.dataclass(frozen=True)
class TemperatureSchedule:
    """A temperature schedule in the noise level t: t_min + (t_max - t_min) * t ** exponent.

    Attributes:
      t_min: the temperature at noise level 0, > 0.
      t_max: the temperature at noise level 1, >= t_min.
      num_steps: T, the number of steps from pure noise to a clean canvas.
      exponent: > 0; 1 is linear, larger values cool earlier, smaller ones later. A parameter of
        the same name in Google's code has the opposite meaning: it scales by
        1 - (1 - t) ** exponent, so larger values cool later. Only 1 means the same in both.
    """

    t_min: float = 0.4
    t_max: float = 0.8
    num_steps: int = 48
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.t_min <= self.t_max:
            raise ValueError(
                f'temperatures need 0 < t_min <= t_max, got t_min={self.t_min} and '
                f't_max={self.t_max}. For greedy decoding set temperature=0 instead.'
            )
        if self.num_steps < 1:
            raise ValueError(f'a schedule needs at least one step, got {self.num_steps}.')
        if not 0 < self.exponent < float('inf'):
            raise ValueError(f'the exponent must be finite and > 0, got {self.exponent}.')

    def noise_level(self, step: Number) -> Number:
        """Returns t = 1 - n/T before step n = 0 .. T-1 (and 0 after the last one, n = T)."""
        return 1.0 - step / self.num_steps

    def temperature(self, noise_level: Number) -> Number:
        """Returns the divisor of the logits at a noise level in [0, 1]."""
        share: Number = noise_level**self.exponent
        return self.t_min + (self.t_max - self.t_min) * share
