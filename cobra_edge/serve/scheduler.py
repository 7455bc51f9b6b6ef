"""Scheduler: one decoder thread, which owns the session, serves many clients in time slices (round robin).

A fair queue orders the waiting requests; `Admission` limits their number. The thread passes the result of each slice to a
callback of the request.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from ..errors import CobraEdgeError, DeviceLostError
from ..inference.forms import FormError
from .errors import ApiError
from .fair_queue import FairQueue
from .generation import Finished, GenerationRequest, Slice

log = logging.getLogger(__name__)

Event = str | Finished | ApiError
Work = Callable[[GenerationRequest], Generator[Slice, None, None]]
_RETRY_SECONDS = 5  # in which a server may have been restarted


def shutting_down() -> ApiError:
    """Return the error of requests after the shutdown signal."""
    return ApiError(
        503, "the server is shutting down; retry later", "shutting_down", headers={"Retry-After": str(_RETRY_SECONDS)}
    )


@dataclass(eq=False)
class Ticket:
    """A queued or running request.

    Attributes:
        owner: whose turn it uses, see `FairQueue`.
        request: what to generate.
        on_event: called with each event, in the scheduler's thread; `Finished` or an `ApiError` is the last. Must not block.
        cancelled: the client is gone.
    """

    owner: tuple[str, ...]
    request: GenerationRequest
    on_event: Callable[[Event], None]
    cancelled: bool = False
    _work: Generator[Slice, None, None] | None = field(default=None, repr=False)

    @property
    def encodes_image_next(self) -> bool:
        """Whether its next slice may run the vision graph, which can take seconds; a token takes milliseconds."""
        return self._work is None and self.request.pixels is not None


class Scheduler:
    """Runs requests in time slices, in its own thread.

    Attributes:
        lost: why the device cannot be used any more; requests are refused from then on.
        on_lost: called once then, in the thread.
    """

    def __init__(self, work: Work, active: int) -> None:
        """Start the thread.

        Args:
            work: generator of the slices of a request; runs in the thread only.
            active: maximum of running requests; each has its own decoder state.
        """
        self._work, self._limit = work, active
        self._changed = threading.Condition()
        self._waiting: FairQueue[Ticket] = FairQueue()
        self._active: list[Ticket] = []
        self._open = True
        self.lost: DeviceLostError | None = None
        self.on_lost: Callable[[], object] = lambda: None
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Queued requests. Takes the lock: counting iterates over the queue."""
        with self._changed:
            return len(self._waiting)

    @property
    def active(self) -> int:
        """Running requests."""
        with self._changed:
            return len(self._active)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def open(self) -> bool:
        """Whether requests are accepted."""
        with self._changed:
            return self._open

    def submit(self, ticket: Ticket) -> None:
        """Queue a request. Raises ApiError 503 while the server shuts down."""
        with self._changed:
            if not self._open:
                raise shutting_down()
            self._waiting.put(ticket.owner, ticket)
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Cancel a request: decoding stops after the current slice. No effect on one that has ended."""
        with self._changed:
            ticket.cancelled = True
            self._waiting.remove(ticket.owner, ticket)
            self._changed.notify()

    def drain(self) -> None:
        """Accept no more requests, send 503 to queued ones, and finish running ones."""
        with self._changed:
            self._open = False
            queued = self._waiting.clear()
            self._changed.notify()
        for ticket in queued:
            _notify(ticket, shutting_down())

    def abort(self) -> None:
        """Drain, and send 503 to running requests too; decoding stops after the current slice."""
        self.drain()
        with self._changed:
            for ticket in self._active:
                ticket.cancelled = True
                _notify(ticket, shutting_down())

    def stop(self, timeout_seconds: float) -> bool:
        """Abort and end the thread. False where the current slice takes longer than the timeout."""
        self.abort()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._open and not self._active and not self._waiting:
                    self._changed.wait()
                while self._waiting and len(self._active) < self._limit:
                    self._active.append(self._waiting.take())
                if not self._open and not self._active:
                    return
                turns = _round(self._active)
            for ticket in turns:
                if self._take_turn(ticket):
                    with self._changed:
                        self._active.remove(ticket)

    def _take_turn(self, ticket: Ticket) -> bool:
        """Run one slice of a request; returns whether it was the last."""
        if ticket._work is None:
            ticket._work = self._work(ticket.request)
        try:
            if ticket.cancelled:
                ticket._work.close()
                return True
            event = next(ticket._work)
        except Exception as error:
            _notify(ticket, _api_error_of(error))
            if isinstance(error, DeviceLostError) and self.lost is None:
                self.lost = error
                self.abort()
                self.on_lost()
            return True
        if event is not None:
            _notify(ticket, event)
        return isinstance(event, Finished)


def _round(active: Sequence[Ticket]) -> list[Ticket]:
    """Return the requests of one round: at most one that encodes an image, so the others wait for one image at most."""
    encoding = next((ticket for ticket in active if ticket.encodes_image_next), None)
    return [ticket for ticket in active if ticket is encoding or not ticket.encodes_image_next]


def _api_error_of(error: Exception) -> ApiError:
    """Return the error that is sent to the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MemoryError):
        log.error("out of memory while generating; lower --active or --state-cache-mib")
        return ApiError(503, "the server is out of memory; retry later", "out_of_memory", headers={"Retry-After": "5"})
    if isinstance(error, FormError):
        return ApiError(400, str(error), "unsupported_value")
    if isinstance(error, CobraEdgeError):
        log.error("%s", error)
        return ApiError(500, str(error), "decoder_failed")
    log.error("unexpected %s while generating", type(error).__name__, exc_info=error)
    return ApiError(500, f"unexpected {type(error).__name__}; see the server's log", "server_error")


def _notify(ticket: Ticket, event: Event) -> None:
    if ticket.cancelled and not isinstance(event, ApiError):
        return
    try:
        ticket.on_event(event)
    except Exception:  # the client is gone, perhaps with its event loop
        log.info("a result could not be delivered; its client is gone")
