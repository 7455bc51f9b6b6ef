"""Requests that two programs read differently are refused, and nothing behind them on their connection is answered."""

from __future__ import annotations

import h11
import pytest

from cobra_edge.serve.limits import Limits
from cobra_edge.serve.strict_http import StrictConnection

from .test_connections import ANSWERED, error_of, post, serving, to_the_end

NEXT = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
CHUNKED = "Transfer-Encoding: chunked"
EMPTY = b"0\r\n\r\n"


@pytest.fixture(scope="module")
def server():
    with serving(Limits()) as server:
        yield server


def get(*lines: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(lines)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (post("/length", "Content-Length: 4", CHUNKED, body=EMPTY), "both Content-Length and Transfer-Encoding"),
        (post("/length", CHUNKED, "content-length: 5", body=EMPTY), "both Content-Length and Transfer-Encoding"),
        (post("/length", "Content-Length: 2", "Content-Length: 2", body=b"{}"), "more than one Content-Length"),
        (post("/length", "Content-Length: 2, 2", body=b"{}"), "more than one Content-Length"),
        (post("/length", "Content-Length: 2", "Content-Length: 3", body=b"{}x"), "is not valid HTTP/1.1"),
        (post("/length", CHUNKED, body=EMPTY).replace(b"HTTP/1.1", b"HTTP/1.0"), "Transfer-Encoding"),
        (post("/length", f"X: y\r\n {CHUNKED}", body=EMPTY), "continues on a second line"),
        (post("/length", "X: y\r\n\tz", "Content-Length: 2", body=b"{}"), "continues on a second line"),
        (b"GET / HTTP/1.1\nHost: x\n\n", "LF without CR"),
        (get(b"X: y\n", b"\r\n"), "LF without CR"),
        (get(b"\n"), "LF without CR"),
        (post("/length", CHUNKED, body=b"2\r\n{}\r\n0\r\nX: y\n\n"), "LF without CR"),
        (post("/length", CHUNKED, body=b"2\r\n{}\r\n0\r\n\n"), "LF without CR"),
        (post("/length", "Content-Length: +2", body=b"{}"), "is not valid HTTP/1.1"),
        (post("/length", "Content-Length : 2", body=b"{}"), "is not valid HTTP/1.1"),
        (post("/length", "Content-Length: 0x2", body=b"{}"), "is not valid HTTP/1.1"),
        (post("/length", "Content-Length: 1_0", body=b"{}"), "is not valid HTTP/1.1"),
        (post("/length", "Transfer-Encoding: xchunked", body=EMPTY), "is not valid HTTP/1.1"),
        (post("/length", "Transfer-Encoding: identity", body=EMPTY), "is not valid HTTP/1.1"),
        (post("/length", "Transfer-Encoding: gzip, chunked", body=EMPTY), "is not valid HTTP/1.1"),
        (post("/length", CHUNKED, "Transfer-Encoding: identity", body=EMPTY), "is not valid HTTP/1.1"),
        (post("/length", "Transfer-Encoding: \x0bchunked", body=EMPTY), "is not valid HTTP/1.1"),
        (post("/length", "Transfer-Encoding : chunked", body=EMPTY), "is not valid HTTP/1.1"),
        (post("/length", CHUNKED, body=b"2;a\n{}\r\n0\r\n\r\n"), "is not valid HTTP/1.1"),
        (post("/length", CHUNKED, body=b"2\n{}\r\n0\r\n\r\n"), "is not valid HTTP/1.1"),
        (post("/length", CHUNKED, body=b"2\r\n{}xx0\r\n\r\n"), "is not valid HTTP/1.1"),
        (post("/length", CHUNKED, body=b"2\r\n{}\n\n0\r\n\r\n"), "is not valid HTTP/1.1"),
        (post("/length", CHUNKED, body=b"-2\r\n{}\r\n0\r\n\r\n"), "is not valid HTTP/1.1"),
        (post("/length", CHUNKED, body=b"0x2\r\n{}\r\n0\r\n\r\n"), "is not valid HTTP/1.1"),
        (get(b"X: a\rContent-Length: 5\r\n\r\n"), "is not valid HTTP/1.1"),
        (get(b"X: a\x00b\r\n\r\n"), "is not valid HTTP/1.1"),
        (get(b"Host: y\r\n\r\n"), "is not valid HTTP/1.1"),
        (b"GET / HTTP/1.1\r\n\r\n", "is not valid HTTP/1.1"),
    ],
    ids=range(33),
)
def test_an_ambiguous_request_is_refused_and_its_connection_closed(server, sent: bytes, words: str):
    with server.connect() as client:
        client.sendall(sent + NEXT)
        got = to_the_end(client)
    error = error_of(got, 400)
    assert error["code"] == "invalid_http" and words in error["message"]
    assert got.count(b"HTTP/1.1 400 ") == 1  # nothing behind it was taken for a request


@pytest.mark.parametrize("cut", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (post("/length", "Content-Length: 2", body=b"{}"), b'{"length":2}'),
        (post("/length", CHUNKED, body=b"2\r\n{}\r\n0\r\n\r\n"), b'{"length":2}'),
        (post("/length", "TRANSFER-ENCODING: Chunked", body=b"2;a=b\r\n{}\r\n0\r\nX: y\r\n\r\n"), b'{"length":2}'),
        (get(b"X:\t y \t\r\n\r\n"), b'{"home":true}'),
    ],
)
def test_what_is_clear_is_answered_and_so_is_what_follows_however_it_is_cut(server, sent: bytes, answer: bytes, cut: int):
    sent += NEXT
    with server.connect() as client:
        for start in range(0, len(sent), cut):
            client.sendall(sent[start : start + cut])
        got = to_the_end(client)
    assert got.count(ANSWERED) == 2 and answer in got and got.endswith(b'{"home":true}')


def ends(parts: tuple[bytes, ...]) -> bool:
    """Return whether a request that arrives in these parts is taken; False if it is refused."""
    connection = StrictConnection(h11.SERVER)
    for part in parts:
        connection.receive_data(part)
        try:
            while (event := connection.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.EndOfMessage):
                    return True
        except h11.RemoteProtocolError:
            return False
    raise AssertionError("it goes on")


def test_a_line_that_is_cut_between_cr_and_lf_is_a_line():
    """TCP may cut a chunked body anywhere."""
    sent = post("/length", CHUNKED, body=b"2\r\n{}\r\n0\r\n\r\n")
    bare = sent[:-2] + b"\n"
    for cut in range(1, len(sent)):
        assert ends((sent[:cut], sent[cut:])), cut
        assert not ends((bare[:cut], bare[cut:] or b"\n")), cut
