"""Measures the speed of a run and the utilization of the devices."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from diffusiongemma.accounting.devices import figures_of
from diffusiongemma.accounting.flops import Flops
from diffusiongemma.parallel import processes

PROFILE_DIR = 'profile'  # in a workdir: xprof traces
# The first steps include compilation and transfers, so they are not traced.
_STEPS_BEFORE_TRACE = 2


class Throughput:
    """A measurement of the steps between two reports.

    Model FLOPs are those of the matmuls of a step, without recomputation by rematerialization. MFU
    is their fraction of the published bf16 peak of the devices; it is left out if the peak is not
    known, as on a CPU.
    """

    def __init__(self, count: Callable[..., Flops]) -> None:
        """Starts to measure; `count` returns the FLOPs of a step from its arguments."""
        self._count = count
        self._flops = math.nan  # until the first step
        self._start = time.perf_counter()
        self._waited = 0.0
        self._tokens = self._steps = 0
        figures = figures_of(jax.devices()[0].device_kind)
        self._peak = figures and figures.peak_flops * jax.device_count()

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Returns a context manager that measures the waiting time for a batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, *arguments: Any) -> None:
        """Counts a step before it starts; the last of its arguments is the batch."""
        if math.isnan(self._flops):
            self._flops = self._count(*arguments).model
        self._tokens += arguments[-1]['tokens'].size
        self._steps += 1

    def measure(self) -> dict[str, float]:
        """Returns the measurements of the steps since the last call, which must be finished.

        Returns:
          'tokens_per_second' of all devices, 'data_wait_share' of the time of this process,
          'model_tflops_per_step', and 'mfu' if the peak is known.
        """
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        measured = {
            'tokens_per_second': self._tokens / elapsed,
            'data_wait_share': self._waited / elapsed,
            'model_tflops_per_step': self._flops / 1e12,
        }
        if self._peak:
            measured['mfu'] = self._flops * self._steps / elapsed / self._peak
        self._start, self._waited, self._tokens, self._steps = now, 0.0, 0, 0
        return measured


class Trace:
    """An xprof trace of a few steps, written by process 0; open it with TensorBoard or xprof."""

    def __init__(self, directory: Path, first_step: int, num_steps: int) -> None:
        """Prepares to trace `num_steps` (0 for none) of a run that starts after `first_step`."""
        self._directory = directory
        self._first = first_step + 1 + _STEPS_BEFORE_TRACE
        self._end = self._first + num_steps
        self._enabled = num_steps > 0 and processes.is_writer()
        self._running = False

    def __enter__(self) -> 'Trace':
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Returns a context manager for a step; the trace ends after its last step."""
        if self._enabled and step == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif self._running and step == self._end:
            self._stop()
        with jax.profiler.StepTraceAnnotation('train', step_num=step):
            yield

    def _stop(self) -> None:
        if self._running:
            self._running = False
            # Wait for all dispatched computations.
            jax.effects_barrier()
            jax.block_until_ready(jax.live_arrays())
            jax.profiler.stop_trace()
