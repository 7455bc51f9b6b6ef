"""Who is answered when: fair turns, cancelling, draining, and slots at the admission."""

import asyncio
import queue
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect

from cobra_edge.errors import DeviceLostError, InputError
from cobra_edge.serve.answer_stream import cancel_on_disconnect, stream_answer, with_deadline
from cobra_edge.serve.errors import ApiError
from cobra_edge.serve.fair_queue import FairQueue
from cobra_edge.serve.generation import Finished
from cobra_edge.serve.limits import Limits
from cobra_edge.serve.middleware.admission import Admission, AdmissionMiddleware
from cobra_edge.serve.scheduler import Scheduler, Ticket
from cobra_edge.serve.server import run_server

END = Finished("stop", 0, 1, 0, 1, "nothing", 0.0, None, None)
PATIENCE = 20  # seconds, of a machine with much else to do


def job(*slices, gate=None, **fields):
    """Return a question that comes to these slices; each waits until the gate is open."""
    fields = {"pixels": None, "arrived": time.perf_counter()} | fields
    return SimpleNamespace(slices=[*slices, END], gate=gate, closed=threading.Event(), **fields)


def work(question):
    try:
        for each in question.slices:
            if question.gate is not None:
                assert question.gate.acquire(timeout=PATIENCE)
            if isinstance(each, Exception):
                raise each
            yield each
    finally:
        question.closed.set()


@pytest.fixture
def scheduler():
    made = Scheduler(work, 2)
    yield made
    assert made.stop(PATIENCE)


class Ear:
    """Hears a ticket's events."""

    def __init__(self):
        self.events = queue.Queue()

    def __call__(self, event):
        self.events.put(event)

    def next(self):
        return self.events.get(timeout=PATIENCE)

    def all(self):
        got = [self.next()]
        while not isinstance(got[-1], Finished | ApiError):
            got.append(self.next())
        return got


def submit(scheduler, question, owner=("me",)):
    ear = Ear()
    ticket = Ticket(owner, question, ear)
    scheduler.submit(ticket)
    return ticket, ear


def together(scheduler, *questions):
    """Submit questions that the thread sees at once: else it may be inside a slice of the first when the others come."""
    with scheduler._changed:
        return [submit(scheduler, question, owner=(str(i),))[1] for i, question in enumerate(questions)]


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.005)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers()), max_size=20))
def test_owners_take_turns_and_each_ones_items_keep_their_order(items):
    waiting = FairQueue()
    for index, (owner, _) in enumerate(items):
        waiting.put((owner,), (owner, index))
    assert len(waiting) == len(items)
    taken = [waiting.take() for _ in items]
    assert sorted(taken, key=lambda t: t[1]) == [(owner, i) for i, (owner, _) in enumerate(items)]
    for owner in "abc":
        assert [t for t in taken if t[0] == owner] == sorted((t for t in taken if t[0] == owner), key=lambda t: t[1])
    # between two items of one owner, everybody else who still waits has had one
    for at, (owner, _) in enumerate(taken):
        following = next((i for i in range(at + 1, len(taken)) if taken[i][0] == owner), None)
        if following is not None:
            waits = {t[0] for t in taken[following + 1 :]} - {owner}
            assert waits <= {t[0] for t in taken[at + 1 : following]}


def test_names_that_one_owner_invents_share_its_turns():
    waiting = FairQueue()
    for name in "abc":
        waiting.put(("greedy", name), name)
    waiting.put(("greedy", "a"), "a again")
    for name in ("x", "y"):
        waiting.put(("modest", ""), name)
    assert len(waiting) == 6 and not waiting.remove(("greedy",), "c")
    assert [waiting.take() for _ in range(4)] == ["a", "x", "b", "y"]
    assert waiting.remove(("greedy", "c"), "c") and not waiting.remove(("greedy", "c"), "c")
    assert waiting.clear() == ["a again"] and len(waiting) == 0
    with pytest.raises(KeyError):
        waiting.take()


def test_a_queue_forgets_what_is_taken_out():
    waiting = FairQueue()
    for name in "ab":
        waiting.put(("me",), name)
    assert waiting.remove(("me",), "a") and not waiting.remove(("me",), "a") and not waiting.remove(("you",), "b")
    assert waiting.take() == "b" and len(waiting) == 0
    with pytest.raises(KeyError):
        waiting.take()


def test_events_come_in_order_without_empty_slices(scheduler):
    _, ear = submit(scheduler, job("a", None, "b"))
    assert ear.all() == ["a", "b", END]


def test_active_answers_take_turns_and_others_wait(scheduler):
    gates = [threading.Semaphore(0) for _ in range(3)]
    ears = together(scheduler, *(job(f"{i}a", f"{i}b", gate=gates[i]) for i in range(3)))
    until(lambda: scheduler.active == 2)
    assert scheduler.waiting == 1
    gates[0].release()
    assert ears[0].next() == "0a"
    gates[0].release()  # it is the other's turn now: this one comes after it
    gates[1].release()
    assert ears[1].next() == "1a" and ears[0].next() == "0b"
    for gate in gates:
        gate.release(3)
    assert [ear.all()[-1] for ear in ears] == [END] * 3


def test_between_two_images_everybody_else_has_a_turn():
    """The vision graph takes seconds where a token takes milliseconds: a running request waits for one image at most."""
    scheduler, order = Scheduler(work, 4), []
    with scheduler._changed:
        for name, pixels in (("text", None), ("image 1", 1), ("image 2", 2), ("image 3", 3)):
            question = job(*"abcd", pixels=pixels)
            scheduler.submit(Ticket((name,), question, lambda event, name=name: order.append((name, event))))
    until(lambda: sum(event == END for _, event in order) == 4)
    seen = [at for at, (name, event) in enumerate(order) if name.startswith("image") and event == "a"]
    for before, after in zip(seen, seen[1:], strict=False):
        assert "text" in {name for name, _ in order[before:after]}
    assert scheduler.stop(PATIENCE)


def test_who_waits_is_counted_under_the_lock(scheduler, monkeypatch):
    """Counting walks over the queue, which the decoder's thread changes: a figure for /metrics must not meet it half-way."""
    length, counted = FairQueue.__len__, []

    class Watched:
        """The scheduler's lock, which knows who holds it."""

        def __init__(self, lock):
            self.lock, self.owners = lock, []

        def __enter__(self):
            self.lock.__enter__()
            self.owners.append(threading.get_ident())

        def __exit__(self, *error):
            self.owners.pop()
            return self.lock.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.lock, name)

    watched = Watched(scheduler._changed)
    monkeypatch.setattr(scheduler, "_changed", watched)
    monkeypatch.setattr(
        FairQueue, "__len__", lambda queue: counted.append(threading.get_ident() in watched.owners) or length(queue)
    )
    assert (scheduler.waiting, scheduler.active, scheduler.open) == (0, 0, True)
    assert counted == [True]


def test_one_who_asks_much_does_not_keep_others_waiting(scheduler):
    gate, order = threading.Semaphore(0), []
    together(scheduler, job(gate=gate), job(gate=gate))
    until(lambda: scheduler.active == 2)
    for index, owner in enumerate(["greedy"] * 5 + ["modest"]):
        scheduler.submit(Ticket((owner,), job(), lambda event, index=index: order.append(index)))
    gate.release(2)
    until(lambda: len(order) == 6)
    assert order.index(5) <= 2  # two are answered at a time


def test_cancelling_stops_the_work_and_says_nothing_more(scheduler):
    gate = threading.Semaphore(0)
    question = job("a", "b", gate=gate)
    ticket, ear = submit(scheduler, question)
    gate.release()
    assert ear.next() == "a"
    scheduler.cancel(ticket)
    gate.release()  # the slice under way
    assert question.closed.wait(PATIENCE)
    until(lambda: scheduler.active == 0)
    assert ear.events.empty()
    assert submit(scheduler, job("c"))[1].all() == ["c", END]


def test_cancelling_one_that_waits_frees_its_place(scheduler):
    gate = threading.Semaphore(0)
    together(scheduler, job(gate=gate), job(gate=gate))
    until(lambda: scheduler.active == 2)
    question = job("never")
    ticket, ear = submit(scheduler, question)
    scheduler.cancel(ticket)
    assert scheduler.waiting == 0
    gate.release(2)
    until(lambda: scheduler.active == 0)
    assert ear.events.empty() and not question.closed.is_set()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ApiError(400, "no image", "invalid_image"), 400, "invalid_image"),
        (InputError("the decoder produced logits that are not finite"), 500, "decoder_failed"),
        (MemoryError(), 503, "out_of_memory"),
        (ZeroDivisionError("secret"), 500, "server_error"),
    ],
)
def test_an_error_ends_one_request_only(scheduler, error, status, code, caplog):
    *_, last = submit(scheduler, job("a", error))[1].all()
    assert (last.status, last.code) == (status, code) and "secret" not in last.message
    assert submit(scheduler, job("b"))[1].all() == ["b", END]


def test_draining_refuses_what_waits_and_finishes_what_is_under_way(scheduler):
    gate = threading.Semaphore(0)
    under_way = together(scheduler, job("a", gate=gate), job("a", gate=gate))
    until(lambda: scheduler.active == 2)
    _, late = submit(scheduler, job("never"))
    scheduler.drain()
    error = late.next()
    assert (error.status, error.code) == (503, "shutting_down") and int(error.headers["Retry-After"]) > 0
    with pytest.raises(ApiError, match="shutting down"):
        submit(scheduler, job())
    assert not scheduler.open
    gate.release(4)
    assert [ear.all() for ear in under_way] == [["a", END]] * 2
    until(lambda: not scheduler.alive)


def test_breaking_off_refuses_what_is_under_way(scheduler):
    gate = threading.Semaphore(0)
    question = job("a", "b", gate=gate)
    _, ear = submit(scheduler, question)
    gate.release()
    assert ear.next() == "a"
    scheduler.abort()
    assert ear.next().code == "shutting_down"
    gate.release()
    assert question.closed.wait(PATIENCE)


def test_a_failing_callback_affects_no_other_request(scheduler):
    def deaf(event):
        raise RuntimeError("Event loop is closed")

    scheduler.submit(Ticket(("me",), job("a"), deaf))
    assert submit(scheduler, job("b"))[1].all() == ["b", END]


def test_places_are_given_back_and_the_wait_follows_how_long_answers_take(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    admission = Admission(2)
    first, _ = admission.enter("me"), admission.enter("me")
    with pytest.raises(ApiError, match="2 requests are running or queued") as full:
        admission.enter("me")
    assert (full.value.status, full.value.code) == (429, "queue_full")
    assert full.value.headers["Retry-After"] == "1"
    clock[0] += 300
    admission.leave("me", first, answered=True)
    admission.enter("me")
    with pytest.raises(ApiError) as full:
        admission.enter("me")
    assert 10 < int(full.value.headers["Retry-After"]) <= 60


@pytest.mark.parametrize(("status", "counts"), [(200, True), (401, False), (504, False)])
def test_only_answers_say_how_long_one_takes(monkeypatch, status, counts):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    async def app(scope, receive, send):
        clock[0] += 300
        await send({"type": "http.response.start", "status": status})
        await send({"type": "http.response.body"})

    async def send(message):
        pass

    admission = Admission(2)
    before = admission.mean_seconds
    asyncio.run(AdmissionMiddleware(app, admission)({"type": "http", "method": "POST"}, None, send))
    assert (admission.in_use, admission.mean_seconds > before) == (0, counts)


def listening(scheduler, question, deadline=PATIENCE):
    async def collect():
        return [piece async for piece in stream_answer(scheduler, ("me",), question, deadline)]

    return asyncio.run(collect())


def test_work_before_an_answer_has_the_same_deadline():
    async def never():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def three():
        return 3

    ended = []
    assert asyncio.run(with_deadline(PATIENCE, time.perf_counter(), three())) == 3
    with pytest.raises(ApiError, match=r"no answer within 0.1 s") as late:
        asyncio.run(with_deadline(0.1, time.perf_counter(), never()))
    assert (late.value.code, ended) == ("deadline_exceeded", [True])


def test_an_answer_comes_to_the_event_loop(scheduler):
    *pieces, end = listening(scheduler, job("a", None, "b", None))
    assert ("".join(pieces), end) == ("ab", END)
    with pytest.raises(ApiError, match="no image"):
        listening(scheduler, job(ApiError(400, "no image", "invalid_image")))


def test_a_deadline_ends_the_listening_and_the_work(scheduler):
    gate = threading.Semaphore(0)
    question = job("a", gate=gate)
    with pytest.raises(ApiError, match=r"no answer within 0.2 s") as late:
        listening(scheduler, question, 0.2)
    assert (late.value.status, late.value.code) == (504, "deadline_exceeded")
    gate.release(2)
    assert question.closed.wait(PATIENCE)


def test_an_expired_deadline_wins_over_a_fast_answer():
    """A decoder that answers at once, such as one that remembers everything, does not win against a clock that has run out."""
    asked = []

    class Instant:
        def submit(self, ticket):
            asked.append(ticket)
            ticket.on_event("a")
            ticket.on_event(END)

        def cancel(self, ticket):
            pass

    late = job()
    late.arrived -= 1
    with pytest.raises(ApiError, match=r"no answer within 0.5 s"):
        listening(Instant(), late, 0.5)
    assert not asked
    assert listening(Instant(), job(), PATIENCE) == ["a", END]


def test_a_disconnect_cancels_the_work(scheduler):
    gate = threading.Semaphore(0)
    question = job("a", "b", "c", gate=gate)

    async def leave_after_the_first_piece():
        gone = asyncio.Event()

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def read():
            async for _ in stream_answer(scheduler, ("me",), question, PATIENCE):
                gone.set()

        gate.release()
        with pytest.raises(ClientDisconnect):
            await cancel_on_disconnect(receive, read())

    asyncio.run(leave_after_the_first_piece())
    gate.release()
    assert question.closed.wait(PATIENCE)
    until(lambda: scheduler.active == 0)


def test_a_departure_is_noticed_however_fast_pieces_come():
    """Every piece is there at once, and nothing that is done with them ever waits."""
    made = SimpleNamespace(cancelled=[])

    class Instant:
        def submit(self, ticket):
            for _ in range(1000):
                ticket.on_event("a")
            self.ticket = ticket

        def cancel(self, ticket):
            made.cancelled.append(ticket)

    scheduler = Instant()

    async def leave():
        async def receive():
            return {"type": "http.disconnect"}

        async def read():
            async for _ in stream_answer(scheduler, ("me",), job(), PATIENCE):
                scheduler.ticket.on_event("a")  # and another one comes before it is gone

        with pytest.raises(ClientDisconnect):
            await asyncio.wait_for(cancel_on_disconnect(receive, read()), PATIENCE)

    asyncio.run(leave())
    assert made.cancelled == [scheduler.ticket]


def test_work_that_ends_first_is_returned_and_its_errors_are_raised():
    async def never():
        await asyncio.Event().wait()

    async def three():
        return 3

    async def fails():
        raise ApiError(400, "no", "invalid_value")

    assert asyncio.run(cancel_on_disconnect(never, three())) == 3
    with pytest.raises(ApiError, match="no"):
        asyncio.run(cancel_on_disconnect(never, fails()))


def test_a_lost_device_refuses_every_request():
    """The request that met it gets the reason, those that run or wait 503, later ones too; the thread ends."""
    lost, gate = threading.Event(), threading.Semaphore(0)
    made = Scheduler(work, 2)
    made.on_lost = lost.set
    _, running = submit(made, job("a", gate=gate))
    _, broken = submit(made, job(DeviceLostError("the GPU is gone"), gate=gate))
    _, waiting = submit(made, job("b", gate=gate))
    gate.release(100)
    assert (broken.all()[-1].status, running.all()[-1].status, waiting.all()[-1].status) == (500, 503, 503)
    assert lost.wait(PATIENCE) and str(made.lost) == "the GPU is gone"
    with pytest.raises(ApiError, match="shutting down"):
        submit(made, job("c"))
    assert made.stop(PATIENCE)


def test_a_server_whose_device_is_lost_ends_with_the_reason():
    made, listener = Scheduler(work, 1), socket.create_server(("127.0.0.1", 0))

    async def app(scope, receive, send):
        raise AssertionError("nobody asks")

    def on_ready():
        submit(made, job(DeviceLostError("the GPU is gone")))

    with listener, pytest.raises(DeviceLostError, match="the GPU is gone"):
        asyncio.run(run_server(app, made, listener, Limits(), 1.0, on_ready))
