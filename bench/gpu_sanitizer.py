"""`python -m bench.gpu_sanitizer`: cobra-mini's decoder under NVIDIA's compute-sanitizer, one tool after the other."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import msgspec

from cobra_edge.bench.gpu import gpu_here, short_name
from cobra_edge.bench.machine import machine
from cobra_edge.bench.results import save_result
from cobra_edge.bench.tables import print_result
from cobra_edge.errors import MachineError
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of

from .gpu_facts import gpu_facts
from .gpu_result import GpuSanitizerResult, SanitizerRun, sanitizer_table

TOOLS = ("memcheck", "racecheck", "synccheck")
_SANITIZER = "compute-sanitizer"
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")


def sanitized(tool: str, bundle: Path, seconds: float) -> SanitizerRun:
    """Answer one question under a tool, in so many seconds at most."""
    answers = [sys.executable, "-m", "bench.gpu_answers", str(bundle), "--lines", "1", "--new-tokens", "3"]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        # A group of its own: the sanitizer's child would outlive it.
        child = subprocess.Popen(
            [_SANITIZER, "--tool", tool, *answers], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = child.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            ended = False
        out.seek(0)
        said = out.read().decode(errors="replace")
    found = _SUMMARY.findall(said)
    errors = int(found[-1]) if found and (ended or int(found[-1])) else None
    return SanitizerRun(tool=tool, errors=errors, seconds=round(time.perf_counter() - began, 1), said=said[-1500:])


def sanitizer_version() -> str | None:
    """Return what compute-sanitizer says of its version; None where it is not installed."""
    if shutil.which(_SANITIZER) is None:
        return None
    said = subprocess.run([_SANITIZER, "--version"], capture_output=True, text=True).stdout
    return next((line.strip() for line in said.splitlines() if "ersion" in line), said.strip()[:80])


@click.command(cls=Command, epilog="Example: python -m bench.gpu_sanitizer build/gpu/mini-w4a16-g128")
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--seconds", group="measurement", type=click.IntRange(1), default=25, help="For each tool, at most.")
@debug_option
def gpu_sanitizer(bundle: Path, seconds: int) -> None:
    """Answer a question with cobra-mini's BUNDLE under memcheck, racecheck and synccheck; exits with 3 for errors."""
    name = f"gpu-sanitizer-{short_name(gpu_here().name)}"
    result = GpuSanitizerResult(gpu=gpu_facts(), machine=machine(), version=sanitizer_version())
    file = save_result(name, result)
    for tool in TOOLS if result.version is not None else ():
        result = msgspec.structs.replace(result, runs=(*result.runs, sanitized(tool, bundle, seconds)))
        file = save_result(name, result)
    print_result([sanitizer_table([result])], file)
    if any(run.errors for run in result.runs):
        raise MachineError(f"compute-sanitizer found errors; see {file}")


main = main_of(gpu_sanitizer)

if __name__ == "__main__":
    main()
