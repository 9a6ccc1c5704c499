"""The thread that owns an engine; other threads send it work and hear of events."""

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any

from absl import logging

from diffusiongemma.sampling.engine import Engine, Failed
from diffusiongemma.sampling.events import End, Event


class Refused:
    """The only event of a request that the engine refused; `error` says why."""

    def __init__(self, error: ValueError) -> None:
        self.error = error


News = Event | Refused


class Ticket:
    """A request in the hands of a worker."""

    def __init__(self, tell: Callable[[News], None]) -> None:
        self._tell = tell
        self.id: int | None = None  # the engine's number
        self.over = False

    def tell(self, news: News) -> None:
        """Passes news on, unless the last were told before."""
        if not self.over:
            self.over = isinstance(news, End | Refused)
            self._tell(news)


class Worker:
    """Steps an engine while there is work, and does one piece of other work between steps.

    All methods but `run` may be called from any thread; `tell` functions are called in its own.

    Attributes:
      load: requests without a slot, and requests in slots, after the latest step.
    """

    def __init__(self, engine: Engine) -> None:
        """Starts no thread before `start`."""
        self.engine, self.load = engine, (0, 0)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by the engine's number
        self._thread = threading.Thread(target=self.run, name='engine', daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop_soon(self) -> None:
        """Ends the thread after its step; requests that are not answered hear of a failure."""
        self._inbox.put(None)

    def stop(self) -> None:
        """Ends the thread and waits for its end."""
        self.stop_soon()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, tell: Callable[[News], None], **request: Any) -> Ticket:
        """Submits a request with the arguments of `Engine.submit`."""
        ticket = Ticket(tell)
        self._inbox.put(lambda: self._submit(ticket, request))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Drops what a ticket is for; without effect where that is over."""
        self._inbox.put(lambda: self._cancel(ticket))

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Runs a function between two steps."""
        future: concurrent.futures.Future = concurrent.futures.Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # whatever it may raise is for whoever waits
                    future.set_exception(error)

        self._inbox.put(work)
        return future

    def run(self) -> None:
        """The thread's loop."""
        while self._do_what_came():
            self._measure()
            try:
                self._step()
            except Exception as error:  # a defect must not leave clients without an answer
                logging.exception('a step of the engine failed')
                self._fail_all(error)
        while not self._inbox.empty():  # what came too late is told so too
            if (work := self._inbox.get()) is not None:
                work()
        self._fail_all(RuntimeError('The server stopped before the request was answered.'))

    def _do_what_came(self) -> bool:
        """Does what is in the inbox, and waits for something where there is nothing else to do."""
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
        self._measure()  # before anyone hears of the end of a request
        for event in events:
            ticket = self._tickets.get(event.id)
            if isinstance(event, End):
                self._tickets.pop(event.id, None)
            if ticket is not None:
                ticket.tell(event)

    def _measure(self) -> None:
        self.load = (self.engine.waiting, self.engine.running)

    def _submit(self, ticket: Ticket, request: dict[str, Any]) -> None:
        try:
            ticket.id = self.engine.submit(**request)
        except ValueError as error:
            ticket.tell(Refused(error))
        except Exception as error:
            logging.exception('a request could not be submitted')
            ticket.tell(Failed(-1, error))
        else:
            self._tickets[ticket.id] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        ticket.over = True
        if ticket.id is not None and self._tickets.pop(ticket.id, None) is not None:
            self.engine.cancel(ticket.id)

    def _fail_all(self, error: Exception) -> None:
        for id, ticket in list(self._tickets.items()):
            self.engine.cancel(id)
            ticket.tell(Failed(id, error))
        self._tickets = {}
