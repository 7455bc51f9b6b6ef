"""The server process: socket, signals, graceful shutdown."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from ..errors import InputError, MachineError
from .connections import limited_protocol
from .limits import Limits
from .scheduler import Scheduler

log = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 15
_BACKLOG = 256
_REPEAT_SECONDS = 0.2  # a signal repeated so soon is the same one, sent to the process group and passed on by the parent
_ACCEPT_SECONDS = 0.5  # after the signal, in which connections in the backlog are accepted, to get 503
_FLUSH_SECONDS = 5.0  # to send the last responses after the grace period


@dataclass(frozen=True)
class Address:
    """The address that a server listens on; port 0 is any free port."""

    host: str
    port: int

    def bind(self) -> socket.socket:
        """Return a listener socket.

        Raises:
            InputError: no such host.
            MachineError: the port is in use, or the address is not of this machine.
        """
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, protocol)
        except (OSError, UnicodeError) as error:  # UnicodeError for an invalid name
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"host {self.host!r}: {reason}; give an address of this machine") from error
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            reason = f"cannot listen on {self.host} port {self.port}: {error.strerror}"
            raise MachineError(f"{reason}; give another --port, or an address of this machine as --host") from error
        return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of a server."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: `run_server` has its own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run_server(
    app: ASGIApp,
    scheduler: Scheduler,
    listener: socket.socket,
    limits: Limits,
    grace_seconds: float,
    on_ready: Callable[[], None],
    on_shutdown: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal comes or the device is lost; return after the shutdown.

    The first SIGTERM, SIGINT or SIGHUP sends 503 to waiting requests and finishes running ones, for at most `grace_seconds`; a
    second one aborts those too.

    Args:
        app: with its middleware.
        scheduler: drained by the signal.
        listener: listening socket.
        limits: of connections.
        grace_seconds: for running requests.
        on_ready: called when connections are accepted.
        on_shutdown: called at the first signal, to reject requests that do not run yet.

    Raises:
        DeviceLostError: the device failed; a service manager can start the server again.
    """
    server = _Server(_config(app, limits, grace_seconds))
    shutdown = _Shutdown(server, scheduler, grace_seconds, on_shutdown)
    loop = asyncio.get_running_loop()
    scheduler.on_lost = lambda: loop.call_soon_threadsafe(shutdown.begin)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, shutdown.handle_signal)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        on_ready()
    await serving
    shutdown.cancel_aborts()
    if not await asyncio.to_thread(scheduler.stop, _FLUSH_SECONDS):
        log.warning("the decoder thread is still running; exiting without it")
    if scheduler.lost is not None:
        raise scheduler.lost


def _config(app: ASGIApp, limits: Limits, grace_seconds: float) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=limited_protocol(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=None if log.isEnabledFor(logging.INFO) else logging.ERROR,  # it warns of each malformed request
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(grace_seconds + 2 * _FLUSH_SECONDS),
    )


class _Shutdown:
    """Reacts to signals: drains at the first, aborts at the second. Not thread-safe: use it on the event loop."""

    def __init__(
        self, server: uvicorn.Server, scheduler: Scheduler, grace_seconds: float, on_shutdown: Callable[[], None]
    ) -> None:
        self._server, self._scheduler, self._grace_seconds = server, scheduler, grace_seconds
        self._on_shutdown = on_shutdown
        self._aborts = set[asyncio.Task[None]]()
        self._last_seconds = -math.inf

    def handle_signal(self) -> None:
        """Begin the shutdown, or hasten it."""
        loop = asyncio.get_running_loop()
        last, self._last_seconds = self._last_seconds, loop.time()
        if self._last_seconds - last < _REPEAT_SECONDS:
            return
        if not self._scheduler.open:
            log.warning("second signal: running requests are aborted")
            self._aborts.add(asyncio.create_task(self._abort_after(0)))
            return
        self.begin()

    def begin(self) -> None:
        """Begin the shutdown: refuse what does not run yet, and let running requests end."""
        loop = asyncio.get_running_loop()
        log.info("shutting down: %d requests running, %d queued", self._scheduler.active, self._scheduler.waiting)
        self._scheduler.drain()
        self._on_shutdown()
        # Not at once: connections in the kernel's backlog are to get 503, not a reset.
        loop.call_later(_ACCEPT_SECONDS, setattr, self._server, "should_exit", True)
        self._aborts.add(asyncio.create_task(self._abort_after(self._grace_seconds)))

    async def _abort_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._scheduler.abort()

    def cancel_aborts(self) -> None:
        """Cancel pending aborts, after the server has stopped."""
        for abort in self._aborts:
            abort.cancel()
