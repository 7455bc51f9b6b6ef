"""Windows: the base package imports, says what is missing, and runs a bundle by the numpy decoder.

What Python lacks there is hidden from a process of this system. Nothing was run on Windows or macOS themselves.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import MINI, ROOT

WINDOWS = """
import os, signal, sys, warnings
for module in ("fcntl", "grp", "pwd", "readline", "resource", "termios"):
    sys.modules[module] = None
for owner, names in {
    os: "O_CLOEXEC O_DIRECTORY O_NOCTTY O_NOFOLLOW O_NONBLOCK fchmod fork geteuid killpg mkfifo posix_fadvise posix_fallocate"
    " pread sched_getaffinity set_blocking setsid sysconf",
    signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE pthread_sigmask setitimer",
}.items():
    for name in names.split():
        if hasattr(owner, name):
            delattr(owner, name)
warnings.filterwarnings("ignore", "only soft file lock")  # filelock's, which has another lock on Windows itself
from cobra_edge.decode.native import library
library.library_file = lambda: None
from cobra_edge.cli import main
main()
"""


@pytest.fixture
def windows(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    script = tmp_path / "windows.py"
    script.write_text(WINDOWS)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)

    return run


def test_a_bundle_answers_by_the_numpy_decoder_and_says_why(windows, mini_bundle):
    done = windows("run", mini_bundle("w4a16-g128"), "--image", MINI / "demo.png", "--prompt", "Is there a red circle?")
    assert (done.returncode, done.stdout.strip()) == (0, "No"), done.stderr
    said = " ".join(done.stderr.split())
    assert "the numpy decoder is used" in said and "this installation has no native library" in said


def test_doctor_says_what_is_missing(windows):
    done = windows("doctor")
    assert done.returncode == 0 and "no native decoder" in " ".join(done.stdout.split()), done.stderr


def test_an_output_is_refused_before_anything_is_written(windows, tmp_path):
    done = windows("export", "--target", "cpu", "--out", tmp_path / "bundle")
    assert done.returncode == 3 and "needs flock, which this system lacks" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["windows.py"]
