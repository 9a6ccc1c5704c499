"""What stops a run early: a loss that went wrong, and a machine that is taken away."""

import math
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils


class LossGuard:
    """Stops a run whose loss is not finite or explodes, and says at which batch."""

    def __init__(self, max_increase: float) -> None:
        """A loss may lie `max_increase` nats per token above the lowest one that was seen."""
        self._max_increase = max_increase
        self._lowest = math.inf

    def check(self, first_step: int, rows: Sequence[Mapping[str, float]]) -> None:
        """Looks at the metrics of `first_step` and the steps behind it.

        Raises:
          FloatingPointError: a metric is not finite, or the loss exploded.
        """
        for step, metrics in enumerate(rows, first_step):
            bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
            if bad:
                raise FloatingPointError(_stopped(f'{", ".join(bad)} is not finite', step))
            if metrics['loss'] > self._lowest + self._max_increase:
                raise FloatingPointError(
                    _stopped(
                        f'the loss exploded to {metrics["loss"]:.4g} from {self._lowest:.4g} '
                        f'(train.max_loss_increase={self._max_increase:g})',
                        step,
                    )
                )
            self._lowest = min(self._lowest, metrics['loss'])


def _stopped(what: str, step: int) -> str:
    return (
        f'{what} at step {step}, which took batch {step - 1} of the data (counted from 0). '
        'Training stopped; the last checkpoint is kept. Lower the learning rate or the clip norm '
        'and start again with the same workdir to go on from it.'
    )


class Preempted(Exception):
    """A run was told to stop; its state is saved."""


class Preemption:
    """Whether this run was told to stop, by SIGTERM to any of its processes.

    Within `with`, SIGTERM no longer ends the process: `reached` says so after the step that runs.
    Several processes stop after the same step; there jax itself catches the signal.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None  # what SIGTERM did before

    def __enter__(self) -> 'Preemption':
        if jax.process_count() == 1:
            try:
                self._before = signal.signal(signal.SIGTERM, self._ask)
            except ValueError:  # not in the main thread, which alone gets signals
                self._before = None
        return self

    def __exit__(self, *unused) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *unused) -> None:
        self._asked = True

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`; the same in every process."""
        if jax.process_count() == 1:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)
