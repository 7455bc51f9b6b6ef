"""The server that is measured: the real command, in a process of its own on a free port."""

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
_START_SECONDS = 300.0  # opening a bundle of full size for the first time hashes it
_STOP_SECONDS = 60.0  # more than the server's own --grace
_SHOWN_LINES = 5


@dataclass(frozen=True)
class Resident:
    """What a process keeps in memory, in MiB.

    Attributes:
        rss: all of its pages, mapped files included.
        anonymous: those that no file stands behind, which is where a leak would be.
    """

    rss: float
    anonymous: float


@dataclass(frozen=True)
class Server:
    """A server that is ready.

    Attributes:
        url: without a slash at its end.
        process: its own.
        start_seconds: from its start until it was ready.
    """

    url: str
    process: subprocess.Popen[str]
    start_seconds: float

    def model(self) -> str:
        """Return the name it answers to. Raises MachineError where it lists none."""
        listed = json.loads(self._read("/v1/models")).get("data")
        if not listed:
            raise MachineError(f"{self.url}/v1/models lists no model; is it this version's server?")
        return str(listed[0]["id"])

    def counted(self, name: str) -> float:
        """Return one of its metrics. Raises MachineError where it has none of that name."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self._read("/metrics"), re.MULTILINE)
        if found is None:
            raise MachineError(f"{self.url}/metrics has no {name}; is it this version's server?")
        return float(found[1])

    def _read(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=_START_SECONDS) as response:
            return str(response.read().decode())

    def resident(self) -> Resident:
        """Return what it keeps in memory now. Raises MachineError when it has gone."""
        try:
            rows = dict(row.split(":", 1) for row in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
            return Resident(*(int(rows[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")))
        except (OSError, KeyError) as error:
            raise MachineError(f"the server's memory cannot be read: {error!r}; has it ended?") from error

    def ask_to_end(self) -> None:
        """Send it SIGTERM."""
        self.process.terminate()

    def ended(self) -> int:
        """Wait for its end and return its exit code. Raises MachineError when it does not end."""
        try:
            return self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise MachineError(f"the server still runs {_STOP_SECONDS:.0f} s after SIGTERM") from error


@contextmanager
def served(bundle: Path, *options: str) -> Iterator[Server]:
    """Give a server of a bundle, ready, with these options; it ends with the block.

    Raises:
        MachineError: it ended, or was not ready in time.
    """
    # All clients are this machine's: one address stands for many.
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
    """Return the address it says it listens on."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline() if ready.select(_START_SECONDS) else ""
    if not line.startswith(_LISTENING):
        raise MachineError(f"the server said {line.strip()!r}, expected {_LISTENING!r} and an address; {_last(said, process)}")
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
    """Return its exit code and its last messages, for the end of an error."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)  # where its stdout ended, it is about to end too
    said.seek(0)
    lines = [line.strip() for line in said if line.strip()][-_SHOWN_LINES:]
    return f"exit code {process.poll()}, its last messages: {' / '.join(lines) or 'none'}"
