"""Runs a service until it is told to end, and ends it without dropping what was begun."""

import signal
import socket
import time
from types import FrameType

import uvicorn

from diffusiongemma.serving.app import make_app
from diffusiongemma.serving.service import Service

# Clients that were just answered and ask again are told to go elsewhere, not cut off.
_LINGER_TICKS = 5
_KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection in their pools


class Server(uvicorn.Server):
    """Answers what is open when it is told to end, and refuses the rest with 503.

    A second signal ends it at once: what is open then hears that the server stopped.
    """

    def __init__(self, service: Service, grace_seconds: float = 60.0) -> None:
        """Opens no socket.

        Args:
          service: answers.
          grace_seconds: how long open requests may take after the first signal.
        """
        config = uvicorn.Config(
            make_app(service),
            lifespan='off',
            access_log=False,
            log_level='warning',
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._service, self._grace_seconds = service, grace_seconds
        self._deadline: float | None = None
        self._idle_ticks = 0

    def end(self) -> None:
        """Begins to end; for any thread."""
        self._service.draining = True
        self._deadline = time.monotonic() + self._grace_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM and SIGINT."""
        del sig, frame
        if self._deadline is None:
            self.end()
        else:
            self._deadline = 0.0

    async def on_tick(self, counter: int) -> bool:
        """Whether the loop of the server is over; called ten times a second."""
        if self._deadline is not None and not self.should_exit:
            if time.monotonic() >= self._deadline:
                self._service.worker.stop_soon()
                self.should_exit = True
            self._idle_ticks = 0 if self._service.open_calls else self._idle_ticks + 1
            if self._idle_ticks > _LINGER_TICKS:
                self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to; port 0 for any free one.

    Raises:
      ValueError: the address cannot be had.
    """
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f'{host}:{port} cannot be listened on: {error}. Choose another --port or --host.'
        ) from None


def serve(service: Service, sock: socket.socket, grace_seconds: float = 60.0) -> None:
    """Serves until SIGTERM or SIGINT, and ends the service."""
    server = Server(service, grace_seconds)
    # A signal before uvicorn listens for them, while it starts, is not lost either.
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, server.handle_exit)
    try:
        server.run(sockets=[sock])
    finally:
        service.worker.stop()
