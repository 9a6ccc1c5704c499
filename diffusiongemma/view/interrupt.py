"""Makes Ctrl-C take effect immediately, even while XLA compiles."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar('T')

_END = object()
_running: list[threading.Thread] = []  # threads that may still work after a Ctrl-C


def interruptible(values: Iterator[T]) -> Iterator[T]:
    """Yields the elements of `values`, each computed on demand by another thread.

    A signal only interrupts Python code: during a compilation it would be delayed until the end,
    and then raised in code that may suppress it. Here it interrupts the calling thread, which only
    waits. The worker thread then finishes its current element; later calls wait for it.
    """
    requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        while requests.get():
            try:
                results.put((next(values, _END), None))
            except BaseException as error:
                results.put((_END, error))
        close = getattr(values, 'close', None)
        if close is not None:
            close()

    while is_busy():
        _running[0].join(0.1)
    thread = threading.Thread(target=work, daemon=True)
    _running.append(thread)
    thread.start()
    try:
        while True:
            requests.put(True)
            value, error = results.get()
            if error is not None:
                raise error
            if value is _END:
                requests.put(False)
                thread.join()  # immediate: nothing is left to compute
                return
            yield value
    finally:
        requests.put(False)


def call_interruptibly(function: Callable[[], T]) -> T:
    """Returns `function()`, computed in another thread as in `interruptible`."""
    (value,) = interruptible(function() for _ in range(1))
    return value


def is_busy() -> bool:
    """Returns whether a thread still runs a computation that Ctrl-C has interrupted."""
    _running[:] = [thread for thread in _running if thread.is_alive()]
    return bool(_running)
