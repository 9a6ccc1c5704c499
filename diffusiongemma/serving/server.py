"""Runs a service until a signal, and then shuts down gracefully."""

import signal
import socket
import time
from types import FrameType

import uvicorn

from diffusiongemma.serving.app import make_app
from diffusiongemma.serving.service import Service

# For this many ticks of 0.1 s after the last answer the server stays up, so that clients that send
# another request receive status 503 instead of a connection error.
_LINGER_TICKS = 5
_KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections in their pools


class Server(uvicorn.Server):
    """A server that, after a signal, answers open requests and rejects new ones with status 503.

    A second signal stops it immediately; open requests then receive an error.
    """

    def __init__(self, service: Service, grace_seconds: float = 60.0) -> None:
        """Creates the server without opening a socket.

        Args:
          service: the service that answers requests.
          grace_seconds: the time that open requests may take after the first signal, in seconds.
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
        """Starts the graceful shutdown; thread-safe."""
        self._service.draining = True
        self._deadline = time.monotonic() + self._grace_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles SIGTERM and SIGINT."""
        del sig, frame
        if self._deadline is None:
            self.end()
        else:
            self._deadline = 0.0

    async def on_tick(self, counter: int) -> bool:
        """Returns whether the server loop must end; uvicorn calls it ten times per second."""
        if self._deadline is not None and not self.should_exit:
            if time.monotonic() >= self._deadline:
                self._service.worker.stop_soon()
                self.should_exit = True
            self._idle_ticks = 0 if self._service.open_calls else self._idle_ticks + 1
            if self._idle_ticks > _LINGER_TICKS:
                self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that clients can connect to.

    Args:
      host: the host name or IP address.
      port: the port; 0 for any free one.

    Raises:
      ValueError: if the address is not available.
    """
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f'Cannot listen on {host}:{port}: {error}. Choose another --port or --host.'
        ) from None


def serve(service: Service, sock: socket.socket, grace_seconds: float = 60.0) -> None:
    """Serves until SIGTERM or SIGINT, and then stops the service."""
    server = Server(service, grace_seconds)
    # These handlers also cover the time before uvicorn has installed its own.
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, server.handle_exit)
    try:
        server.run(sockets=[sock])
    finally:
        service.worker.stop()
