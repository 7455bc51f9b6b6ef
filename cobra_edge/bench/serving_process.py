"""The server to measure: the real command as a child process on a free port."""

from __future__ import annotations

import json
import re
import selectors
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import MachineError

_LISTENING = "listening on http://"
_START_SECONDS = 300.0  # the first opening of a full-size bundle hashes it
_STOP_SECONDS = 60.0  # more than the server's own --grace
_SHOWN_LINES = 5


@dataclass(frozen=True)
class Resident:
    """Resident memory of a process in MiB.

    Attributes:
        rss: all pages, mapped files included.
        anonymous: pages not backed by a file, where a leak would be.
    """

    rss: float
    anonymous: float


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: without a trailing slash.
        process: of the server.
        start_seconds: from start to ready.
    """

    url: str
    process: subprocess.Popen[str]
    start_seconds: float

    def model(self) -> str:
        """Return the name of its model. Raises MachineError if it lists none."""
        listed = json.loads(self._read("/v1/models")).get("data")
        if not listed:
            raise MachineError(f"{self.url}/v1/models lists no model; is the server of this version?")
        return str(listed[0]["id"])

    def counted(self, name: str) -> float:
        """Return a metric. Raises MachineError if there is none of that name."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self._read("/metrics"), re.MULTILINE)
        if found is None:
            raise MachineError(f"{self.url}/metrics has no {name}; is the server of this version?")
        return float(found[1])

    def _read(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=_START_SECONDS) as response:
            return str(response.read().decode())

    def resident(self) -> Resident:
        """Return its resident memory. Raises MachineError if it has exited."""
        try:
            rows = dict(row.split(":", 1) for row in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
            return Resident(*(int(rows[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")))
        except (OSError, KeyError) as error:
            raise MachineError(f"cannot read the server's memory: {error!r}; has it exited?") from error

    def ask_to_end(self) -> None:
        """Send SIGTERM."""
        self.process.terminate()

    def ended(self) -> int:
        """Wait for its exit and return the exit code. Raises MachineError if it does not exit in time."""
        try:
            return self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise MachineError(f"the server is still running {_STOP_SECONDS:.0f} s after SIGTERM") from error


@contextmanager
def served(bundle: Path, *options: str) -> Iterator[Server]:
    """Yield a running server of a bundle, started with these options; it is stopped at the end of the block.

    Raises:
        MachineError: it exited, or was not ready in time.
    """
    # All clients share one address.
    shares = ["--requests-per-address", "65536", "--connections-per-address", "256"]
    command = [sys.executable, "-m", "cobra_edge.serve", str(bundle), "--port", "0", *shares, *options]
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            url = _listening(process, said)
            _wait_until_ready(url, process, said)
            yield Server(url, process, time.perf_counter() - began)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _listening(process: subprocess.Popen[str], said: IO[str]) -> str:
    """Return the URL it is listening on."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline() if ready.select(_START_SECONDS) else ""
    if not line.startswith(_LISTENING):
        raise MachineError(
            f"the server printed {line.strip()!r}, expected {_LISTENING!r} and an address; {_last(said, process)}"
        )
    return line.split()[-1].rstrip("/")


def _wait_until_ready(url: str, process: subprocess.Popen[str], said: IO[str]) -> None:
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=_START_SECONDS):
                return
        except (urllib.error.URLError, ConnectionError):  # 503 while it opens the bundle
            time.sleep(0.02)
    raise MachineError(f"the server is not ready; {_last(said, process)}")


def _last(said: IO[str], process: subprocess.Popen[str]) -> str:
    """Return its exit code and last messages, for an error message."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)  # if stdout is closed, it is about to exit
    said.seek(0)
    lines = [line.strip() for line in said if line.strip()][-_SHOWN_LINES:]
    return f"exit code {process.poll()}, last messages: {' / '.join(lines) or 'none'}"
