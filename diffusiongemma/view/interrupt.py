"""Ctrl-C that is heard at once, even while XLA compiles."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar('T')

_END = object()
_running: list[threading.Thread] = []  # threads that may still work after a Ctrl-C


def interruptible(values: Iterator[T]) -> Iterator[T]:
    """Yields what `values` yields, each computed by another thread when it is asked for.

    A signal interrupts Python code alone: in the midst of a compilation it would wait for the end
    of it, and then go through code that swallows it. Here it meets the caller, which only waits.
    The other thread ends with the value that it computes; what follows waits for that.
    """
    asked: queue.SimpleQueue = queue.SimpleQueue()
    found: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        while asked.get():
            try:
                found.put((next(values, _END), None))
            except BaseException as error:
                found.put((_END, error))
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
            asked.put(True)
            value, error = found.get()
            if error is not None:
                raise error
            if value is _END:
                asked.put(False)
                thread.join()  # at once: it has nothing left to compute
                return
            yield value
    finally:
        asked.put(False)


def call_interruptibly(function: Callable[[], T]) -> T:
    """Returns `function()`, computed as `interruptible` does."""
    (value,) = interruptible(function() for _ in range(1))
    return value


def is_busy() -> bool:
    """Whether a thread still computes what a Ctrl-C has stopped."""
    _running[:] = [thread for thread in _running if thread.is_alive()]
    return bool(_running)
