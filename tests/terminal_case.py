"""A program on a pseudo-terminal, written to and read as a person would."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")

# A native decoder that takes a twentieth of a second a token, so that there is time to press Ctrl-C.
SLOW = """
import time
from cobra_edge.decode.cpu import CpuDecoder
real = CpuDecoder.step
CpuDecoder.step = lambda self, token, state: (time.sleep(0.05), real(self, token, state))[1]
"""


class OnTerminal:
    """A Python program whose three streams are a terminal; `heard` is all that it wrote, without colours."""

    def __init__(self, program: str, *arguments: str | Path, **environment: str) -> None:
        own, its = pty.openpty()
        command = [sys.executable, "-c", program, *map(str, arguments)]
        given = os.environ | {"TERM": "xterm", "COLUMNS": "200", "OMP_NUM_THREADS": "1"} | environment
        # A session of its own, so that the terminal is its terminal and Ctrl-C a signal to it.
        self.child = subprocess.Popen(
            [sys.executable, "-c", _LEAD, *command], stdin=its, stdout=its, stderr=its, env=given, start_new_session=True
        )
        os.close(its)
        self.terminal, self.heard, self._read = own, "", 0

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, *_error: object) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self.terminal)

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C as a person would: readline misses a signal that comes in the instant before it waits for a key."""
        time.sleep(0.2)
        self.type("\x03")

    def until(self, text: str, seconds: float = 20) -> str:
        """Return what was written up to and with the text; it is an error when it does not come."""
        deadline = time.monotonic() + seconds
        while (found := self.heard.find(text, self._read)) < 0:
            ready, _, _ = select.select([self.terminal], [], [], max(0.0, deadline - time.monotonic()))
            piece = b""
            if ready:
                try:
                    piece = os.read(self.terminal, 1 << 16)
                except OSError:  # the child has gone, and its end of the terminal with it
                    piece = b""
            if not piece:
                raise AssertionError(f"{text!r} did not come; what did: {self.heard!r}")
            self.heard = _COLOURS.sub("", self.heard + piece.decode(errors="replace"))
        before, self._read = self._read, found + len(text)
        return self.heard[before : self._read]

    def ended(self) -> int:
        """Return its exit code."""
        return self.child.wait(20)


# Makes stdin the controlling terminal, then becomes the program.
_LEAD = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
