"""One decoder, many clients: a thread that owns the session, and gives each answer a slice of it in turn.

Who waits is decided by a fair queue, and how many may by the `Admission` at the server's door. What a slice comes to is told to
whoever asked, from this thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from ..errors import CobraEdgeError
from .errors import Refusal
from .fair_queue import FairQueue
from .generation import Finished, Question, Slice

log = logging.getLogger(__name__)

Event = str | Finished | Refusal
Work = Callable[[Question], Generator[Slice, None, None]]
_RETRY_SECONDS = 5  # until a server that goes away may have been started again


def shutting_down() -> Refusal:
    """Return what is said to those who come too late."""
    return Refusal(503, "the server is shutting down; ask again", "shutting_down", headers={"Retry-After": str(_RETRY_SECONDS)})


@dataclass(eq=False)
class Ticket:
    """A question that waits or is being answered.

    Attributes:
        owner: whose turn it uses, as `FairQueue` has it.
        question: what is asked.
        heard: told each event, from the scheduler's thread; `Finished` or a `Refusal` is the last. Must not block.
        cancelled: nobody listens any more.
    """

    owner: tuple[str, ...]
    question: Question
    heard: Callable[[Event], None]
    cancelled: bool = False
    _work: Generator[Slice, None, None] | None = field(default=None, repr=False)

    @property
    def sees_next(self) -> bool:
        """Whether its next slice may run the vision graph, which can take seconds where a token takes milliseconds."""
        return self._work is None and self.question.pixels is not None


class Scheduler:
    """Answers questions in slices, in a thread of its own."""

    def __init__(self, work: Work, active: int) -> None:
        """Start the thread.

        Args:
            work: makes the slices of a question; runs in the thread only.
            active: questions that are answered in turns; each has a state of its own.
        """
        self._work, self._limit = work, active
        self._changed = threading.Condition()
        self._waiting: FairQueue[Ticket] = FairQueue()
        self._active: list[Ticket] = []
        self._open = True
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many wait for their turn. The queue is counted by walking over it, so not while another thread changes it."""
        with self._changed:
            return len(self._waiting)

    @property
    def active(self) -> int:
        """How many are being answered."""
        with self._changed:
            return len(self._active)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def open(self) -> bool:
        """Whether questions are taken."""
        with self._changed:
            return self._open

    def submit(self, ticket: Ticket) -> None:
        """Let a question wait for its turn. Raises Refusal while the server goes away."""
        with self._changed:
            if not self._open:
                raise shutting_down()
            self._waiting.put(ticket.owner, ticket)
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Forget a question: its decoding stops after the slice under way. One that has ended stays as it is."""
        with self._changed:
            ticket.cancelled = True
            self._waiting.remove(ticket.owner, ticket)
            self._changed.notify()

    def drain(self) -> None:
        """Take no more questions, refuse those that wait, and go on with those that are being answered."""
        with self._changed:
            self._open = False
            late = self._waiting.clear()
            self._changed.notify()
        for ticket in late:
            _tell(ticket, shutting_down())

    def break_off(self) -> None:
        """Refuse what is being answered, too; its decoding stops after the slice under way."""
        self.drain()
        with self._changed:
            for ticket in self._active:
                ticket.cancelled = True
                _tell(ticket, shutting_down())

    def stop(self, patience_seconds: float) -> bool:
        """End the thread, broken off where it is. False when the slice under way takes too long."""
        self.break_off()
        self._thread.join(patience_seconds)
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
                turns = _one_image(self._active)
            for ticket in turns:
                if self._take_turn(ticket):
                    with self._changed:
                        self._active.remove(ticket)

    def _take_turn(self, ticket: Ticket) -> bool:
        """Do one slice of a ticket's work; returns whether it was the last."""
        if ticket._work is None:
            ticket._work = self._work(ticket.question)
        try:
            if ticket.cancelled:
                ticket._work.close()
                return True
            event = next(ticket._work)
        except Exception as error:
            _tell(ticket, _refusal_of(error))
            return True
        if event is not None:
            _tell(ticket, event)
        return isinstance(event, Finished)


def _one_image(active: Sequence[Ticket]) -> list[Ticket]:
    """Return whose turn it is in one round: of those with an image to see only the first, so others wait for one at most."""
    seeing = next((ticket for ticket in active if ticket.sees_next), None)
    return [ticket for ticket in active if ticket is seeing or not ticket.sees_next]


def _refusal_of(error: Exception) -> Refusal:
    """Return what the client is told of an error."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, MemoryError):
        log.error("out of memory while answering; fewer --active, or a smaller --state-cache-mib")
        return Refusal(
            503, "the server has no memory left for this; ask again later", "out_of_memory", headers={"Retry-After": "5"}
        )
    if isinstance(error, CobraEdgeError):
        log.error("%s", error)
        return Refusal(500, str(error), "decoder_failed")
    log.error("unforeseen %s while answering", type(error).__name__, exc_info=error)
    return Refusal(500, f"unforeseen {type(error).__name__}; the server's log says more", "server_error")


def _tell(ticket: Ticket, event: Event) -> None:
    if ticket.cancelled and not isinstance(event, Refusal):
        return
    try:
        ticket.heard(event)
    except Exception:  # whoever asked is gone, and with it perhaps its event loop
        log.info("nobody listens to an answer any more")
