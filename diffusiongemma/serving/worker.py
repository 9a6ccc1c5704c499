"""A worker thread that owns an engine; other threads send it work and receive events."""

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from absl import logging

from diffusiongemma.sampling.engine import Engine, Failed
from diffusiongemma.sampling.events import End, Event

T = TypeVar('T')


class Refused:
    """The only event of a request that `Engine.submit` rejected.

    Attributes:
      error: the exception, whose message is for the client.
    """

    def __init__(self, error: ValueError) -> None:
        self.error = error


WorkerEvent = Event | Refused


class Ticket:
    """A handle of a request that was sent to a worker.

    Attributes:
      id: the number of the request in the engine; None before its submission.
      ended: whether the last event was delivered, or the request was cancelled.
    """

    def __init__(self, callback: Callable[[WorkerEvent], None]) -> None:
        self._callback = callback
        self.id: int | None = None
        self.ended = False

    def deliver(self, event: WorkerEvent) -> None:
        """Passes an event to the callback, unless the request has ended."""
        if not self.ended:
            self.ended = isinstance(event, End | Refused)
            self._callback(event)


class Worker:
    """A thread that steps an engine while it has requests, and runs other work between steps.

    All methods except for `run` are thread-safe; callbacks run in the thread of the worker.

    Attributes:
      engine: the engine, which only this thread may use.
      load: the number of requests without a slot and in slots, after the latest step.
    """

    def __init__(self, engine: Engine) -> None:
        """Creates the worker; `start` starts its thread."""
        self.engine, self.load = engine, (0, 0)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by the number of the request in the engine
        self._thread = threading.Thread(target=self.run, name='engine', daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop_soon(self) -> None:
        """Stops the thread after its current step; unanswered requests fail."""
        self._inbox.put(None)

    def stop(self) -> None:
        """Stops the thread and waits until it has ended."""
        self.stop_soon()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, callback: Callable[[WorkerEvent], None], **request: Any) -> Ticket:
        """Submits a request with the arguments of `Engine.submit`; `callback` gets its events."""
        ticket = Ticket(callback)
        self._inbox.put(lambda: self._submit(ticket, request))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Cancels the request of a ticket, unless it has ended."""
        self._inbox.put(lambda: self._cancel(ticket))

    def call(self, function: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Returns the future of a function that the thread of the worker runs between two steps."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # any error is raised where the future is awaited
                    future.set_exception(error)

        self._inbox.put(work)
        return future

    def run(self) -> None:
        """Runs the loop of the thread."""
        while self._process_inbox():
            self._measure()
            try:
                self._step()
            except Exception as error:  # a defect must not leave clients without an answer
                logging.exception('a step of the engine failed')
                self._fail_all(error)
        while not self._inbox.empty():  # requests that arrived after the stop also fail
            if (work := self._inbox.get()) is not None:
                work()
        self._fail_all(RuntimeError('The server stopped before the request was answered.'))

    def _process_inbox(self) -> bool:
        """Runs the work in the inbox, and waits for work if the engine is idle.

        Returns:
          False if the thread must stop.
        """
        while True:
            idle = not (self.engine.waiting or self.engine.running)
            try:
                work = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if work is None:
                return False
            work()

    def _step(self) -> None:
        events = self.engine.step() if self.engine.waiting or self.engine.running else ()
        self._measure()  # before the last event of a request is delivered
        for event in events:
            ticket = self._tickets.get(event.id)
            if isinstance(event, End):
                self._tickets.pop(event.id, None)
            if ticket is not None:
                ticket.deliver(event)

    def _measure(self) -> None:
        self.load = (self.engine.waiting, self.engine.running)

    def _submit(self, ticket: Ticket, request: dict[str, Any]) -> None:
        try:
            ticket.id = self.engine.submit(**request)
        except ValueError as error:
            ticket.deliver(Refused(error))
        except Exception as error:
            logging.exception('a request could not be submitted')
            ticket.deliver(Failed(-1, error))
        else:
            self._tickets[ticket.id] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        ticket.ended = True
        if ticket.id is not None and self._tickets.pop(ticket.id, None) is not None:
            self.engine.cancel(ticket.id)

    def _fail_all(self, error: Exception) -> None:
        for id, ticket in list(self._tickets.items()):
            self.engine.cancel(id)
            ticket.deliver(Failed(id, error))
        self._tickets = {}
