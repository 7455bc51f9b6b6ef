"""What goes wrong around a server: nothing hangs, nothing promised is lost, and the next request is answered."""

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import threading
import time
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

import cobra_edge
from cobra_edge.decode.sampling import Sampling

from ..conftest import MINI
from ..terminal_case import SLOW
from .serve_case import PATIENCE, metric, served, until

MODEL, IMAGE = "cobra-mini", MINI / "demo.png"
LONG = "What is in the image?"  # the answer that takes longest
ENDLESS = {"model": "mamba-tiny", "text": "Describe everything.", "max_tokens": 100_000}


def body(text=LONG, image=None, model=MODEL, **fields):
    parts = [{"type": "text", "text": text}]
    if image is not None:
        url = "data:image/png;base64," + base64.b64encode(image).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"model": model, "messages": [{"role": "user", "content": parts}], **fields}


def post(url, **options):
    return httpx.post(f"{url}/v1/chat/completions", timeout=PATIENCE, **options)


def answered(url, **fields):
    """Ask about the demo image, see the answer given, and return its response."""
    response = post(url, json=body(image=IMAGE.read_bytes(), **fields))
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, status, code):
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


@pytest.fixture(scope="module")
def bundle(mini_bundle):
    return mini_bundle("w4a16-g128")


@pytest.fixture(scope="module")
def same(bundle):
    """Return the session's own answer."""
    return cobra_edge.load(bundle).ask(IMAGE, LONG).read()


@pytest.fixture(scope="module")
def server(bundle):
    with served(bundle) as server:
        yield server


@pytest.fixture(scope="module")
def endless(tiny_bundle):
    """Return a question whose answer, of random weights, goes on for ten seconds and more where the decoder is slowed."""
    session = cobra_edge.load(tiny_bundle)
    text = ENDLESS["text"]
    for seed in range(50):
        answer = session.ask(None, text, max_new_tokens=400, sampling=Sampling(1.0, seed=seed))
        answer.read()
        if len(answer.tokens) == 400:
            return ENDLESS | {"temperature": 1.0, "seed": seed}
    pytest.fail("every answer of the random model is short")


@pytest.fixture(scope="module")
def slow(tiny_bundle):
    """Return the URL of a server whose answers take their time."""
    with served(tiny_bundle, changed=SLOW) as server:
        yield server.url


@pytest.fixture
def url(server, same):
    """Return the URL of a server that must answer after the test as before."""
    yield server.url
    assert answered(server.url)["choices"][0]["message"]["content"] == same


def raw(url):
    at = urlsplit(url)
    return socket.create_connection((at.hostname, at.port), timeout=PATIENCE)


def head(content_length, *more):
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return ("\r\n".join([*lines, f"Content-Length: {content_length}", *more]) + "\r\n\r\n").encode()


def ask_raw(url, **fields):
    """Send a question over a socket of its own, and return the socket."""
    sent = json.dumps(body(**fields)).encode()
    connection = raw(url)
    connection.sendall(head(len(sent)) + sent)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_when_a_client_goes_away_the_decoding_stops(slow, endless, stream):
    url = slow
    gone, written = (
        metric(url, 'cobra_edge_requests_total{status="499"}'),
        metric(url, 'cobra_edge_tokens_total{kind="written"}'),
    )
    connection = ask_raw(url, **endless, stream=stream)
    if stream:
        assert connection.recv(64)
    else:
        until(lambda: metric(url, "cobra_edge_active") == 1, "the answer")
    connection.close()
    until(lambda: metric(url, 'cobra_edge_requests_total{status="499"}') == gone + 1, "the departure")
    until(lambda: metric(url, "cobra_edge_active") == 0, "the end of the decoding")
    assert metric(url, 'cobra_edge_tokens_total{kind="written"}') == written


def test_when_a_client_resets_its_connection_the_decoding_stops(slow, endless):
    url = slow
    connection = ask_raw(url, **endless, stream=True)
    assert connection.recv(64)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    until(lambda: metric(url, "cobra_edge_active") == 0, "the end of the decoding")


def bomb(side):
    """Return a small PNG file of side × side white pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(b"\0" + b"\xff" * (side // 8)) for _ in range(side)) + rows.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def test_an_image_bomb_is_refused_by_its_head(server, url):
    before = server.resident_bytes()
    image = bomb(30_000)
    assert len(image) < 1 << 20
    message = refused(post(url, json=body(image=image)), 413, "image_too_large")
    assert "32,000,000 pixels" in message
    assert server.resident_bytes() - before < 64 << 20


def test_an_image_whose_head_lies_is_refused_when_it_is_decoded(url):
    whole = IMAGE.read_bytes()
    refused(post(url, json=body(image=whole[: len(whole) // 2])), 400, "invalid_image")
    refused(post(url, json=body(image=b"\x89PNG\r\n\x1a\n" + os.urandom(100))), 400, "invalid_image")


def test_a_body_of_a_gigabyte_is_refused_and_not_kept(server, url):
    before = server.resident_bytes()
    with raw(url) as connection:
        connection.sendall(head(1 << 30))
        assert b"413" in connection.recv(200).split(b"\r\n")[0]
    with raw(url) as connection, contextlib.suppress(ConnectionError):
        lines = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(lines + b"Transfer-Encoding: chunked\r\n\r\n")
        part = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        for _ in range(1 << 10):
            connection.sendall(part)
        pytest.fail("a gigabyte was taken")
    assert server.resident_bytes() - before < 96 << 20


def test_heads_that_come_a_byte_at_a_time_keep_nobody_waiting(bundle, same):
    sooner = (
        "import functools, cobra_edge.serve.build, cobra_edge.serve.command, sys; c = sys.modules['cobra_edge.serve.command']\n"
    )
    sooner += "c.Limits = functools.partial(c.Limits, header_seconds=1.0)\n"
    with served(bundle, changed=sooner) as server, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(raw(server.url)) for _ in range(32)]
        for connection in slow:
            connection.sendall(b"POST /v1/chat/comp")
        assert answered(server.url)["choices"][0]["message"]["content"] == same
        until(lambda: all(closed(connection) for connection in slow), "the end of slow heads")


def closed(connection):
    connection.setblocking(False)
    try:
        return not connection.recv(4096) or closed(connection)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b'{"model": "cobra-mini", "messages": [{"role": "user", "content": "\xff\xfe"}]}', "invalid_json"),
        (b'{"model": "cobra-mini", "messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_value"),
        (b'{"model": "cobra-mini\\ud800", "messages": [{"role": "user", "content": "a"}]}', "invalid_value"),
        (b"\x00\x01\x02", "invalid_json"),
        (b"{", "invalid_json"),
        (b"", "invalid_json"),
        (b"[]", "invalid_value"),
        (b"[" * 100_000, "invalid_json"),
        (
            b'{"model": "cobra-mini", "messages": [{"role": "user", "content": "a"}], "seed": 1' + b"0" * 5000 + b"}",
            "invalid_json",
        ),
        (b'{"model": "cobra-mini", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "invalid_value"),
        (b'{"model": "cobra-mini", "messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', "invalid_value"),
    ],
    ids=[
        "utf-8",
        "unpaired surrogate",
        "in a name",
        "bytes",
        "cut",
        "empty",
        "a list",
        "deep",
        "a long number",
        "NaN",
        "infinity",
    ],
)
def test_what_is_no_request_is_refused(url, sent, code):
    response = post(url, content=sent, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
    refused(response, 400, code)


def odd_png():
    """Return an image that pillow warns of: animated, of no frames."""
    plain, said = IMAGE.read_bytes(), b"acTL" + bytes(8)
    chunk = struct.pack(">I", 8) + said + struct.pack(">I", zlib.crc32(said))
    return plain[:33] + chunk + plain[33:]


def test_nothing_a_client_sends_is_logged(bundle):
    with served(bundle) as server:
        with raw(server.url) as connection:
            connection.sendall(b"\x16\x03\x01 GET\r\n\r\n")  # as one who speaks TLS to us
            assert connection.recv(4096).startswith(b"HTTP/1.1 400")
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
        assert httpx.get(f"{server.url}/healthz", headers=upgrade).status_code == 200
        assert post(server.url, json=body(image=odd_png())).status_code == 200
        assert httpx.get(f"{server.url}/no%1Bwhere").status_code == 404
        assert server.said() == ""


def cached_files(directory: Path):
    return sorted(directory.rglob("*.safetensors"))


def test_what_was_seen_survives_a_restart_and_a_damaged_file_is_read_again(bundle, tmp_path):
    kept = ("--state-dir", str(tmp_path / "states"))
    with served(bundle, *kept) as server:
        first = answered(server.url)
    (file,) = cached_files(tmp_path / "states")
    with served(bundle, *kept) as server:
        second = answered(server.url)
        assert metric(server.url, 'cobra_edge_state_cache_hits_total{where="disk"}') == 1
    assert second["cobra_edge"]["remembered"] == "image" and second["usage"]["prompt_tokens_details"]["cached_tokens"] == 64
    whole = file.read_bytes()
    data = bytearray(whole)
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with served(bundle, *kept) as server:
        third = answered(server.url)
        assert metric(server.url, "cobra_edge_state_cache_refused_files_total") == 1
    assert third["cobra_edge"]["remembered"] == "nothing"
    assert [file] == cached_files(tmp_path / "states") and file.read_bytes() == whole
    texts = {each["choices"][0]["message"]["content"] for each in (first, second, third)}
    assert len(texts) == 1


def test_states_of_another_decoder_are_not_taken_for_ones_own(bundle, tmp_path):
    kept = ("--state-dir", str(tmp_path / "states"))
    for options in ((), ("--activations", "int8"), ("--decoder-kernels", "numpy")):
        with served(bundle, *kept, *options) as server:
            assert answered(server.url, max_tokens=2)["cobra_edge"]["remembered"] == "nothing"


def test_a_bundle_that_is_removed_is_served_on(bundle, same, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    with served(copy) as server:
        shutil.rmtree(copy)
        for _ in range(2):
            assert answered(server.url)["choices"][0]["message"]["content"] == same
        assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_a_deadline_is_enforced(slow, endless):
    url, slow = slow, body(**endless)
    response = post(url, json=slow, headers={"X-Deadline-Seconds": "0.05"})
    assert "0.05 s" in refused(response, 504, "deadline_exceeded")
    with httpx.stream(
        "POST",
        f"{url}/v1/chat/completions",
        json=slow | {"stream": True},
        headers={"X-Deadline-Seconds": "3"},
        timeout=PATIENCE,
    ) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert stream.status_code == 200 and json.loads(events[-1])["error"]["code"] == "deadline_exceeded"
    assert "[DONE]" not in events
    until(lambda: metric(url, "cobra_edge_active") == 0, "the end of the decoding")
    for nonsense in ("soon", "-1", "0", "nan", "inf"):
        refused(post(url, json=body(), headers={"X-Deadline-Seconds": nonsense}), 400, "invalid_value")


class Load:
    """Clients that ask without a pause until they are stopped; what each answer was."""

    def __init__(self, url, clients):
        self.url, self.outcomes, self.stopped = url, [], threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(clients)]
        for thread in self.threads:
            thread.start()

    def _ask(self, index):
        image = IMAGE.read_bytes() + bytes([index])
        while not self.stopped.is_set():
            try:
                if index % 2:
                    response = post(self.url, json=body(image=image))
                    code = response.status_code
                    whole = response.json()["choices"][0]["finish_reason"] == "stop" if code == 200 else True
                else:
                    with httpx.stream(
                        "POST", f"{self.url}/v1/chat/completions", json=body(image=image, stream=True), timeout=PATIENCE
                    ) as stream:
                        lines = [line for line in stream.iter_lines() if line]
                    code = stream.status_code
                    whole = lines[-1] == "data: [DONE]" if code == 200 else True
            except httpx.ConnectError:
                code, whole = "closed", True  # nobody listens any more
            except httpx.HTTPError as error:
                code, whole = type(error).__name__, False
            self.outcomes.append((code, whole))
            if code in ("closed", 503):
                return

    def join(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_a_signal_under_load_finishes_what_is_answered_and_refuses_the_rest(bundle):
    with served(bundle, "--active", "2", "--waiting", "8", "--requests-per-address", "10") as server:
        load = Load(server.url, 8)
        until(lambda: len(load.outcomes) >= 16, "some answers")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0
        load.join()
    codes = [code for code, _ in load.outcomes]
    assert set(codes) <= {200, 503, "closed", "ReadError", "RemoteProtocolError"}
    assert codes.count(200) >= 16
    # A connection that the kernel took but the server never saw was promised nothing; what was begun is whole.
    cut = [code for code, whole in load.outcomes if not whole]
    assert set(cut) <= {"ReadError", "RemoteProtocolError"} and len(cut) <= 8
    assert all(whole for code, whole in load.outcomes if code == 200)


def test_a_signal_that_comes_twice_at_once_is_one(tiny_bundle, endless):
    with served(tiny_bundle, "--grace", "100", changed=SLOW) as server:
        connection = ask_raw(server.url, **endless | {"max_tokens": 40}, stream=True)
        assert connection.recv(64)
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        got = b""
        while piece := connection.recv(65536):
            got += piece
        connection.close()
        assert b"[DONE]" in got
        assert server.process.wait(PATIENCE) == 0


def ready(url):
    """Return whether a server accepts connections."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz").status_code == 200
    return False


def test_a_second_signal_breaks_off_and_says_so(tiny_bundle, endless):
    with served(tiny_bundle, "--grace", "100", changed=SLOW) as server:
        connection = ask_raw(server.url, **endless, stream=True)
        assert connection.recv(64)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not ready(server.url), "the first signal's work")
        time.sleep(0.3)  # a second one that comes at once is the first
        server.process.send_signal(signal.SIGTERM)
        got = b""
        while piece := connection.recv(65536):
            got += piece
        connection.close()
        assert b"shutting_down" in got and b"[DONE]" not in got
        assert server.process.wait(PATIENCE) == 0


def test_requests_beyond_capacity_get_429_with_retry_after(tiny_bundle, endless):
    few = ("--active", "1", "--waiting", "1")
    with served(tiny_bundle, *few, changed=SLOW) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(ask_raw(server.url, **endless))
        until(
            lambda: metric(server.url, "cobra_edge_active") + metric(server.url, "cobra_edge_queue_depth") == 2, "a full house"
        )
        response = post(server.url, json=body())
        assert "retry in" in refused(response, 429, "queue_full")
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        assert metric(server.url, 'cobra_edge_requests_total{status="429"}') == 1
        stack.close()
        until(lambda: metric(server.url, "cobra_edge_active") == 0, "an empty house")
        assert post(server.url, json=body(model="mamba-tiny", max_tokens=3)).status_code == 200
