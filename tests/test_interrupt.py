"""Tests that Ctrl-C reaches the caller at once, even while the computing thread is busy."""

import os
import signal
import threading

import pytest

from diffusiongemma.view.interrupt import call_interruptibly, interruptible, is_busy


def press_ctrl_c_when(event):
    def press():
        event.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()


@pytest.fixture
def ctrl_c():
    """Installs Python's default handler instead of that of the test runner."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_values_come_one_by_one_as_they_are_asked_for():
    made = []

    def values():
        for n in range(3):
            made.append(n)
            yield n

    found = interruptible(values())
    assert (next(found), made) == (0, [0])
    assert list(found) == [1, 2]


def test_an_error_of_the_values_is_raised_where_they_are_read():
    def values():
        yield 1
        raise ValueError('no more')

    found = interruptible(values())
    assert next(found) == 1
    with pytest.raises(ValueError, match='no more'):
        next(found)
    assert call_interruptibly(lambda: 5) == 5
    assert not is_busy()


def test_ctrl_c_is_heard_while_a_value_is_computed_and_what_follows_waits_for_its_end(ctrl_c):
    computing, go_on, log = threading.Event(), threading.Event(), []

    def values():
        try:
            computing.set()
            go_on.wait()  # like a compilation, which cannot be interrupted
            log.append('computed')
            yield 1
            log.append('asked for more')
        finally:
            log.append('closed')

    press_ctrl_c_when(computing)
    with pytest.raises(KeyboardInterrupt):
        next(interruptible(values()))
    assert is_busy() and not log
    threading.Timer(0.2, go_on.set).start()
    assert call_interruptibly(lambda: list(log)) == ['computed', 'closed']
