"""Stops a run early: on a loss that is not finite or explodes, and on preemption."""

import math
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils


class LossGuard:
    """A check that stops a run whose loss is not finite or explodes, and names the batch."""

    def __init__(self, max_increase: float) -> None:
        """Allows a loss of at most `max_increase` nats per token above the lowest one so far."""
        self._max_increase = max_increase
        self._lowest = math.inf

    def check(self, first_step: int, rows: Sequence[Mapping[str, float]]) -> None:
        """Checks the metrics of `first_step` and the following steps.

        Raises:
          FloatingPointError: if a metric is not finite, or the loss exploded.
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


def _stopped(cause: str, step: int) -> str:
    return (
        f'{cause} at step {step}, which took batch {step - 1} of the data (counted from 0). '
        'Training stopped; the last checkpoint is kept. Lower the learning rate or the clip norm '
        'and start again with the same workdir to go on from it.'
    )


class Preemption:
    """A context manager that detects SIGTERM to any process of the run.

    In its context, SIGTERM does not end the process; `reached` reports it after the current step.
    Several processes stop after the same step; in this case jax itself handles the signal.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before: Any = None  # the previous signal handler

    def __enter__(self) -> 'Preemption':
        if jax.process_count() == 1:
            try:
                self._before = signal.signal(signal.SIGTERM, self._request)
            except ValueError:  # only the main thread can handle signals
                self._before = None
        return self

    def __exit__(self, *unused: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _request(self, *unused: object) -> None:
        self._requested = True

    def reached(self, step: int) -> bool:
        """Returns whether to save and stop after `step`; the same in every process."""
        if jax.process_count() == 1:
            return self._requested
        return multihost_utils.reached_preemption_sync_point(step)
