"""A server as it is run: a process of its own, that clients reach over a socket, and that ends in good order."""

from __future__ import annotations

import base64
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from ..conftest import MINI

MODEL = "cobra-mini"
IMAGE = MINI / "demo.png"
_SERVE = "import runpy; runpy.run_module('cobra_edge.serve', run_name='__main__')"
START_SECONDS, PATIENCE = 120, 60  # seconds, of a machine with much else to do


def data_uri(image: bytes | Path = IMAGE) -> str:
    file = image.read_bytes() if isinstance(image, Path) else image
    return "data:image/png;base64," + base64.b64encode(file).decode()


def image_part(url: str | None = None) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url or data_uri()}}


def question(text: str, *parts: dict[str, object]) -> dict[str, object]:
    """Return a user's message: a text, and an image where one is given."""
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def client(url: str, key: str = "any", **options: object) -> openai.OpenAI:
    """Return OpenAI's client of a server, without retries."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60, **options)


def metric(url: str, line: str) -> float:
    """Return a metric of a server by its name and labels, as Prometheus writes them; 0 where there is none yet."""
    for each in httpx.get(f"{url}/metrics").text.splitlines():
        name, _, value = each.rpartition(" ")
        if name == line:
            return float(value)
    return 0.0


def until(condition: Callable[[], bool], what: str = "it") -> None:
    """Wait for a condition; it is an error when it does not come to be."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not come to be"
        time.sleep(0.02)


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    url: str
    process: subprocess.Popen[str]
    log: tempfile._TemporaryFileWrapper[str]

    def said(self) -> str:
        """Return what it wrote to stderr so far."""
        return _text(self.log)

    def resident_bytes(self) -> int:
        """Return its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))) << 10


@contextmanager
def served(bundle: Path, *options: str, changed: str = "") -> Iterator[Server]:
    """Serve a bundle from a process. When the context is left it must end by itself, or have ended, with exit code 0.

    Args:
        bundle: what is served.
        options: of the command.
        changed: Python that runs before it, such as `terminal_case.SLOW`.
    """
    program = ["-c", changed + _SERVE] if changed else ["-m", "cobra_edge.serve"]
    command = [sys.executable, *program, str(bundle), "--port", "0", *options]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        too_slow = threading.Timer(START_SECONDS, process.kill)
        too_slow.start()
        try:
            line = process.stdout.readline()
            too_slow.cancel()
            said = _text(log)
            assert line.startswith("listening on http://"), f"the server did not start: {line!r}\n{said}"
            yield Server(line.split()[-1], process, log)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            code = process.wait(PATIENCE)
            assert code == 0, f"exit code {code}:\n{_text(log)}"
        finally:
            too_slow.cancel()
            process.kill()


def _text(log: tempfile._TemporaryFileWrapper[str]) -> str:
    log.seek(0)
    return log.read()
