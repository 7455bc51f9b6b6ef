"""Malicious and slow clients, over real sockets, against the protocol and the middleware."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from cobra_edge.serve.connections import limited_protocol
from cobra_edge.serve.limits import Limits
from cobra_edge.serve.middleware.stack import with_middleware

from .serve_case import until

LIMITS = Limits(body_bytes=1 << 20, header_seconds=0.3, body_seconds=0.3, send_seconds=0.3, connections=8)
ANSWERED = b"HTTP/1.1 200 OK\r\n"
PATIENCE = 10.0  # seconds, for a machine that is busy


class Server:
    """uvicorn in a thread, on a free port; `ended` is set when the generator of an endless answer is closed."""

    def __init__(self, limits: Limits) -> None:
        self.ended = threading.Event()
        self.began = threading.Event()
        routes = [Route("/length", self.length, methods=["POST"]), Route("/endless", self.endless), Route("/", self.home)]
        app = with_middleware(Starlette(routes=routes), limits)
        config = uvicorn.Config(app, http=limited_protocol(limits), ws="none", log_config=None, lifespan="off")
        self.server = uvicorn.Server(config)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)

    async def home(self, request: Request) -> JSONResponse:
        return JSONResponse({"home": True})

    async def length(self, request: Request) -> JSONResponse:
        return JSONResponse({"length": len(await request.body())})

    async def endless(self, request: Request) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                while True:
                    self.began.set()
                    yield b"x" * 65536
                    await anyio.sleep(0)  # uvicorn's send to a client that left waits for nothing
            finally:
                self.ended.set()

        return StreamingResponse(pieces())

    def connect(self, address: str = "127.0.0.1") -> socket.socket:
        """Connect from an address of this machine."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE, source_address=(address, 0))


@contextmanager
def serving(limits: Limits) -> Iterator[Server]:
    server = Server(limits)
    server.thread.start()
    try:
        deadline = time.monotonic() + PATIENCE
        while not server.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield server
    finally:
        server.server.should_exit = True
        server.thread.join(PATIENCE)
        server.socket.close()
        assert not server.thread.is_alive()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(LIMITS) as server:
        yield server


def to_the_end(client: socket.socket) -> bytes:
    """Read until the server closes, gently or not."""
    data = b""
    try:
        while part := client.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def error_of(response: bytes, status: int) -> dict[str, Any]:
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), response
    assert b"connection: close" in head.lower()
    assert b"content-type: application/json" in head.lower()
    assert b"x-content-type-options: nosniff" in head.lower()
    return json.loads(body)["error"]


def post(path: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers, "", ""]).encode() + body


def test_a_head_that_drips_is_closed_in_time_and_others_are_served_meanwhile(server: Server):
    begun = time.monotonic()
    dripping = server.connect()
    dripping.sendall(b"GET / HTTP/1.1\r\n")
    served = 0
    while not select.select([dripping], [], [], 0.02)[0]:
        dripping.sendall(b"X-%d: 1\r\n" % served)
        served += httpx.get(server.url).json()["home"]
        assert time.monotonic() < begun + PATIENCE, "the connection was never closed"
    assert served and time.monotonic() - begun >= LIMITS.header_seconds
    assert error_of(to_the_end(dripping), 408)["code"] == "header_timeout"
    dripping.close()


def test_a_connection_that_says_nothing_is_closed_in_time(server: Server):
    with server.connect() as silent:
        assert to_the_end(silent) == b""


def test_a_later_head_on_the_same_connection_has_the_same_clock(server: Server):
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT")
        begun = time.monotonic()
        response = to_the_end(client)
        # uvicorn's own clock between requests would take five seconds
        assert time.monotonic() - begun < 4
    first, _, second = response.partition(b'{"home":true}')
    assert first.startswith(ANSWERED)
    assert error_of(second, 408)["code"] == "header_timeout"


def test_requests_one_after_the_other_and_all_at_once_on_one_connection(server: Server):
    with server.connect() as client:
        client.sendall(post("/length", "Content-Length: 3", body=b"abc"))
        while b'{"length":3}' not in client.recv(65536):
            pass
        time.sleep(LIMITS.header_seconds * 1.5)  # idle between requests is not late
        last = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        client.sendall(post("/length", "Content-Length: 2", body=b"ab") * 2 + last)
        response = to_the_end(client)
    assert response.count(ANSWERED) == 3
    assert response.count(b'{"length":2}') == 2 and response.endswith(b'{"home":true}')


def test_a_head_in_two_pieces_in_time_is_served():
    with serving(replace(LIMITS, header_seconds=PATIENCE)) as server, server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHo")
        time.sleep(0.1)
        client.sendall(b"st: x\r\nConnection: close\r\n\r\n")
        assert to_the_end(client).startswith(ANSWERED)


def test_half_a_body_is_given_up(server: Server):
    with server.connect() as client:
        client.sendall(post("/length", "Content-Length: 10", body=b"12345"))
        begun = time.monotonic()
        assert error_of(to_the_end(client), 408)["code"] == "body_timeout"
        assert time.monotonic() - begun >= LIMITS.body_seconds * 0.9


def test_a_gigabyte_that_is_declared_is_refused_before_a_byte_of_it(server: Server):
    with server.connect() as client:
        client.sendall(post("/length", f"Content-Length: {1 << 30}"))
        assert error_of(to_the_end(client), 413)["code"] == "body_too_large"


def test_expect_100_continue(server: Server):
    with server.connect() as client:
        client.sendall(post("/length", f"Content-Length: {1 << 30}", "Expect: 100-continue"))
        assert to_the_end(client).startswith(b"HTTP/1.1 413 ")


def test_a_gigabyte_in_chunks_is_cut_off_and_never_held(server: Server):
    piece = bytes(1 << 18)
    chunk = b"%x\r\n" % len(piece) + piece + b"\r\n"
    tracemalloc.start()
    try:
        with server.connect() as client:
            client.sendall(post("/length", "Transfer-Encoding: chunked"))
            sent = 0
            try:
                for _ in range((1 << 30) // len(piece)):
                    client.sendall(chunk)
                    sent += len(piece)
            except (ConnectionResetError, BrokenPipeError):
                pass
            response = to_the_end(client)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sent < 64 << 20  # the limit, and what the buffers of two sockets hold
    assert peak < 8 * LIMITS.body_bytes
    if response:  # the system may drop it for the bytes that were still on their way
        assert error_of(response, 413)["code"] == "body_too_large"


def test_an_ordinary_client_that_sends_too_much_learns_why(server: Server):
    response = httpx.post(f"{server.url}/length", json={"image": "x" * (8 << 20)})
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(("path", "kind", "status"), [("/length", "text/plain", 415), ("/length", "application/json", 413)])
def test_who_reads_only_after_sending_all_learns_why(server: Server, path: str, kind: str, status: int):
    """Such as Python's own client, and many proxies: a reset would take the answer away."""
    for _ in range(5):
        connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        connection.request("POST", path, bytes(12 << 20), {"Content-Type": kind})
        assert connection.getresponse().status == status
        connection.close()


def test_a_refusal_waits_for_no_more_than_a_moment(server: Server):
    with server.connect() as client:
        client.sendall(post("/length", "Content-Length: 1000").replace(b"application/json", b"text/plain"))
        assert error_of(to_the_end(client), 415)["code"] == "unsupported_media_type"


def test_beyond_the_limit_connections_are_refused_until_others_go():
    with serving(replace(LIMITS, header_seconds=PATIENCE)) as server:
        idle = [server.connect() for _ in range(LIMITS.connections)]
        with server.connect() as one_more:
            response = to_the_end(one_more)
        assert error_of(response, 503)["code"] == "too_many_connections"
        assert b"\r\nRetry-After: 1\r\n" in response
        idle.pop().close()
        deadline = time.monotonic() + PATIENCE
        while httpx.get(server.url).status_code != 200:
            assert time.monotonic() < deadline
        for connection in idle:
            connection.close()


def home(client: socket.socket) -> bool:
    """Ask on a connection that stays open; whether it was answered."""
    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    got = b""
    while not got.endswith(b'{"home":true}') and (part := client.recv(65536)):
        got += part
    return got.startswith(ANSWERED)


GREEDY, MODEST = "127.0.0.2", "127.0.0.3"
WITHOUT_CLOCKS = replace(LIMITS, header_seconds=PATIENCE, body_seconds=PATIENCE, connections=24, connections_per_address=20)


def test_an_address_has_a_share_of_the_connections():
    with serving(replace(WITHOUT_CLOCKS, connections_per_address=8)) as server, contextlib.ExitStack() as stack:
        for _ in range(8):
            assert home(stack.enter_context(server.connect(GREEDY)))
        with server.connect(GREEDY) as one_more:
            assert error_of(to_the_end(one_more), 429)["code"] == "too_many_connections"
        assert home(stack.enter_context(server.connect(MODEST)))


@pytest.mark.parametrize(
    "held",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HT",
        post("/length", "Content-Length: 10", body=b"12345"),
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345",
    ],
    ids=["silent", "idle", "half a head", "half a body", "half a body of GET"],
)
def test_where_all_are_taken_the_address_that_has_most_makes_room(held: bytes):
    with serving(WITHOUT_CLOCKS) as server, contextlib.ExitStack() as stack:
        greedy = [stack.enter_context(server.connect(GREEDY)) for _ in range(20)]
        for client in greedy:
            client.sendall(held)
        for number in range(6):
            assert home(stack.enter_context(server.connect(f"127.0.0.{number + 10}")))
        until(lambda: len(server.server.server_state.connections) <= WITHOUT_CLOCKS.connections)
        assert sum(is_open(client) for client in greedy) == 18


def test_a_connection_on_which_something_is_answered_is_nobodys_room():
    limits = replace(WITHOUT_CLOCKS, connections=9, send_seconds=PATIENCE)
    with serving(limits) as server, contextlib.ExitStack() as stack:
        greedy = [stack.enter_context(server.connect(GREEDY)) for _ in range(9)]
        for client in greedy:
            client.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(1)
        with server.connect(MODEST) as late:
            assert error_of(to_the_end(late), 503)["code"] == "too_many_connections"
        assert all(client.recv(1) for client in greedy)


def test_who_has_no_more_than_a_browser_needs_makes_no_room():
    with serving(replace(WITHOUT_CLOCKS, connections=8)) as server, contextlib.ExitStack() as stack:
        browser = [stack.enter_context(server.connect(GREEDY)) for _ in range(8)]
        assert all(home(client) for client in browser)
        with server.connect(MODEST) as late:
            assert error_of(to_the_end(late), 503)["code"] == "too_many_connections"
        assert all(home(client) for client in browser)


def is_open(client: socket.socket) -> bool:
    """Whether the server has not closed a connection; what it sent is thrown away."""
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return True
    except ConnectionResetError:
        pass
    return False


def test_what_is_not_http_is_refused_in_the_same_shape(server: Server):
    with server.connect() as client:
        client.sendall(b"\x16\x03\x01 not http\r\n\r\n")
        assert error_of(to_the_end(client), 400)["code"] == "invalid_http"


def test_a_head_without_end_is_refused(server: Server):
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 17))
        assert error_of(to_the_end(client), 400)["code"] == "invalid_http"


def test_chunks_that_are_not_chunks_are_refused(server: Server):
    with server.connect() as client:
        client.sendall(post("/length", "Transfer-Encoding: chunked", body=b"not a length\r\n"))
        assert error_of(to_the_end(client), 400)["code"] == "invalid_http"


def test_who_takes_nothing_of_an_answer_is_dropped_and_the_answer_given_up(server: Server):
    with server.connect() as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        assert server.began.wait(PATIENCE)
        assert server.ended.wait(PATIENCE)
        assert not to_the_end(client).endswith(b"0\r\n\r\n")  # closed, and not as an answer ends


def test_who_takes_an_answer_slowly_is_served(server: Server):
    with server.connect() as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        end = time.monotonic() + 4 * LIMITS.send_seconds
        while time.monotonic() < end:
            assert client.recv(1 << 20)
            time.sleep(LIMITS.send_seconds / 100)
        assert not server.ended.is_set()
    assert server.ended.wait(PATIENCE)  # and it ends when they leave
