"""The process: sockets, signals, and an end in good order."""

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
_SAME_SECONDS = 0.2  # within which a second signal is the first: whoever runs us may pass on what our group gets anyway
_DOOR_SECONDS = 0.5  # in which those who are at the door already are told that it closes
_LAST_WORDS_SECONDS = 5.0  # for refusals to be sent, after what was being answered had its time


@dataclass(frozen=True)
class Address:
    """Where a server listens; port 0 is any that is free."""

    host: str
    port: int

    def bind(self) -> socket.socket:
        """Return a listening socket.

        Raises:
            InputError: no such host.
            MachineError: the port is taken, or the address is none of this machine's.
        """
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            listening = socket.socket(family, kind, protocol)
        except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"host {self.host!r}: {reason}; give an address of this machine") from error
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError as error:
            listening.close()
            reason = f"cannot listen on {self.host} port {self.port}: {error.strerror}"
            raise MachineError(f"{reason}; give another --port, or an address of this machine as --host") from error
        return listening


def url_of(listening: socket.socket) -> str:
    """Return where a browser finds a server."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Uvicorn, whose signals are taken by `run_server`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run_server(
    app: ASGIApp,
    scheduler: Scheduler,
    listening: socket.socket,
    limits: Limits,
    grace_seconds: float,
    ready: Callable[[], None],
    refuse: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal comes; return when all is done.

    The first SIGTERM, SIGINT or SIGHUP refuses what waits and finishes what is being answered, as long as `grace_seconds`; a
    second one ends that too.

    Args:
        app: with its doors.
        scheduler: is told to come to an end.
        listening: socket.
        limits: of connections.
        grace_seconds: for answers under way.
        ready: called when clients are accepted.
        refuse: called when the first signal comes, to refuse what is not being answered yet.
    """
    server = _Server(
        uvicorn.Config(
            app,
            http=limited_protocol(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=None if log.isEnabledFor(logging.INFO) else logging.ERROR,  # it warns of each request that is none
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(grace_seconds + 2 * _LAST_WORDS_SECONDS),
        )
    )
    loop, endings, told = asyncio.get_running_loop(), set[asyncio.Task[None]](), -math.inf

    def leave() -> None:
        nonlocal told
        told, before = loop.time(), told
        if told - before < _SAME_SECONDS:
            return
        if not scheduler.open:
            log.warning("asked again to stop: what is being answered is broken off")
            endings.add(asyncio.create_task(_end(scheduler, 0)))
            return
        log.info("shutting down: %d answers under way, %d questions wait", scheduler.active, scheduler.waiting)
        scheduler.drain()
        refuse()
        # Not at once: whoever connected just before is in the kernel's queue, and is to be refused with words.
        loop.call_later(_DOOR_SECONDS, setattr, server, "should_exit", True)
        endings.add(asyncio.create_task(_end(scheduler, grace_seconds)))

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, leave)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        ready()
    await serving
    for ending in endings:
        ending.cancel()
    if not await asyncio.to_thread(scheduler.stop, _LAST_WORDS_SECONDS):
        log.warning("the decoder is still at work; leaving without it")


async def _end(scheduler: Scheduler, grace_seconds: float) -> None:
    """Refuse what is still being answered when its time is over."""
    await asyncio.sleep(grace_seconds)
    scheduler.break_off()
