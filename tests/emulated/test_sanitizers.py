"""Kernels under AddressSanitizer and UBSan, in a process of its own: their library has to be loaded before any other."""

import os
import subprocess
import sys
from pathlib import Path

KERNEL_TESTS = ("gemv", "step_kernels", "sampling_kernels", "gemm", "rows", "scan")
ROOT = Path(__file__).parent.parent.parent


def test_nothing_outside_is_touched_and_nothing_is_undefined() -> None:
    compiler = os.environ.get("CXX", "g++")
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # Python leaks on purpose, and fibers leave stacks as no sanitizer expects.
    options = "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=0"
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "COBRA_EMULATED_KIND": "sanitized",
    }
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in KERNEL_TESTS]
    # Without the other fixtures, which import torch: that alone takes ten seconds of a sanitizer.
    fixtures = ["--noconftest", "-p", "tests.emulated.conftest", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-x", *fixtures, "-k", "not full_size and not same_token", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
