"""How the benchmarks take times."""

import time
from collections.abc import Callable

import jax
import numpy as np


def seconds(run: Callable, repetitions: int = 9) -> np.ndarray:
    """Times [repetitions] of `run()`, until its result is ready; one run before compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return np.array(times)


def spread(ratios: np.ndarray) -> str:
    """Median of ratios and their quartiles: '1.52x (1.49-1.60)'."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f'{middle:.2f}x ({low:.2f}-{high:.2f})'
