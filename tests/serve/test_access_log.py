"""`serve --json`: the start, every request and the end as JSON lines on stdout, and nothing else there."""

import io
import json
import os
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from cobra_edge.serve.access_log import EventLines
from cobra_edge.version import __version__

from .serve_case import PATIENCE, START_SECONDS, question


def events(text: str):
    return [json.loads(line) for line in text.splitlines()]


def test_a_servers_start_requests_and_end_are_lines(tiny_bundle):
    command = [sys.executable, "-m", "cobra_edge.serve", str(tiny_bundle), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        too_slow = threading.Timer(START_SECONDS, process.kill)
        too_slow.start()
        try:
            assert process.stdout is not None
            began = json.loads(process.stdout.readline())
            url = began["url"]
            asked = {"model": "mamba-tiny", "messages": [question("a secret")], "max_tokens": 1}
            for body in (asked, asked | {"stream": True}, asked | {"model": "b"}):
                httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE)
            httpx.get(f"{url}/chat/completions/no%0Awhere")
            process.send_signal(signal.SIGTERM)
            rest, logs = process.communicate(timeout=PATIENCE)
        finally:
            too_slow.cancel()
            process.kill()
    assert process.returncode == 0, logs
    assert (began["event"], began["model"], began["version"]) == ("listening", "mamba-tiny", __version__)
    *requests, end = events(rest)
    assert [(e["event"], e["method"], e["path"], e["status"]) for e in requests] == [
        ("request", "POST", "/v1/chat/completions", 200),
        ("request", "POST", "/v1/chat/completions", 200),
        ("request", "POST", "/v1/chat/completions", 404),
        ("request", "GET", "/chat/completions/no\nwhere", 404),
    ]
    assert all(e["client"] == "127.0.0.1" and e["duration_ms"] > 0 and e["time"].endswith("+00:00") for e in requests)
    assert (end["event"], end["requests"], end["dropped_lines"]) == ("stopped", 4, 0)
    assert "secret" not in rest


class Stuck(io.StringIO):
    """A reader that takes nothing until it is let go."""

    def __init__(self):
        super().__init__()
        self.writing, self.go = threading.Event(), threading.Event()

    def write(self, text):
        self.writing.set()
        assert self.go.wait(PATIENCE)
        return super().write(text)


def test_a_slow_reader_keeps_nobody_waiting_and_what_is_dropped_is_counted():
    stream = Stuck()
    lines = EventLines(stream, queue_lines=3)
    lines.write("first")
    assert stream.writing.wait(PATIENCE)
    for number in range(5):  # three have room
        lines.request(number=number)
    stream.go.set()
    lines.close()
    got = events(stream.getvalue())
    assert [e["event"] for e in got] == ["first", "request", "request", "request", "stopped"]
    assert (got[-1]["requests"], got[-1]["dropped_lines"]) == (5, 2)


def test_a_reader_that_left_ends_the_lines_and_not_the_server(caplog):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        lines = EventLines(stream)
        for _ in range(3):
            lines.write("request")
        lines.close()
    assert caplog.text.count("serving goes on") == 1


@pytest.mark.parametrize("option", ["--connections-per-address", "--requests-per-address"])
def test_a_share_suffices_for_a_browser(option, capsys):
    from cobra_edge.serve.command import command
    from cobra_edge.terminal.output import run_command

    assert run_command(command, ["nowhere", option, "3"]) == 2
    assert option in capsys.readouterr().err
