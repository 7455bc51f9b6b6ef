"""`python -m bench.gpu_parity`: every kernel on this machine's GPU beside its reference, and cobra-mini's answers.

The cases are those of tests/emulated, run by the real driver with each image of kernels.xz that it takes. The result is
written after every part.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import click
import msgspec

from cobra_edge.bench.gpu import gpu_here, short_name
from cobra_edge.bench.machine import machine
from cobra_edge.bench.results import save_result
from cobra_edge.bench.tables import print_result
from cobra_edge.decode.cuda.calls import CudaError, call
from cobra_edge.decode.cuda.device import first_gpu
from cobra_edge.decode.cuda.library import Image, read_kernels
from cobra_edge.errors import MachineError
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of

from .gpu_answers import compare_answers
from .gpu_facts import gpu_facts
from .gpu_result import GpuParityResult, ImageParity, parity_table

ROOT = Path(__file__).parent.parent
# Kernels, then the whole decoder; not the tests of the emulator and of the fake driver themselves.
CASES = ("gemv", "gemm", "scan", "rows", "step_kernels", "sampling_kernels", "launches", "decoder")
VARIABLE = "COBRA_REAL_GPU"  # see tests/emulated/real_gpu.py
_SHOWN = 20


def load_image(image: Image) -> ImageParity:
    """Have the driver load an image, once."""
    first_gpu().enter()
    began = time.perf_counter()
    try:
        module = call(f"loading the kernels {image}", "cuModuleLoadData", image.data)
    except CudaError as error:
        return ImageParity(image=str(image), refused=error.name)
    seconds = time.perf_counter() - began
    call("giving a module back", "cuModuleUnload", module)
    return ImageParity(image=str(image), load_seconds=round(seconds, 3))


def run_cases(loaded: ImageParity, only: str | None, workers: int) -> ImageParity:
    """Run the cases with an image.

    Args:
        loaded: the image.
        only: pytest's -k, or None for all.
        workers: processes, where pytest-xdist is installed.

    Raises:
        MachineError: pytest ran nothing, what it said is told.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [f"tests/emulated/test_{name}.py" for name in CASES]
        # Warnings of other versions of libraries are no failures here.
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "filterwarnings=", f"--junit-xml={report}"]
        command += [*(["-n", str(workers)] if workers > 1 else []), *(["-k", only] if only else []), *files]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {VARIABLE: loaded.image}, capture_output=True, text=True)
        if not report.is_file():
            raise MachineError(f"the cases of kernels did not run: {(done.stdout + done.stderr)[-2000:]}")
        root = ElementTree.parse(report).getroot()
    cases = list(root.iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return msgspec.structs.replace(
        loaded,
        passed=len(cases) - len(failed) - skipped,
        failed=len(failed),
        skipped=skipped,
        failures=tuple(f"{c.get('classname')}::{c.get('name')}: {_reason(c)}" for c in failed[:_SHOWN]),
        seconds=round(time.perf_counter() - began, 1),
    )


def _reason(case: ElementTree.Element) -> str:
    found = case.find("failure")
    found = case.find("error") if found is None else found
    return "" if found is None else (found.get("message") or "")[:200]


def measured(
    bundles: tuple[Path, ...], only: str | None, workers: int, lines: int, new_tokens: int
) -> Iterator[GpuParityResult]:
    """Yield the result after every part: answers of each bundle, then each image loaded, and the cases with it."""
    gpu, result = first_gpu(), GpuParityResult(gpu=gpu_facts(), machine=machine())
    for directory in bundles:
        answers = (*result.answers, compare_answers(directory, lines, new_tokens))
        yield (result := msgspec.structs.replace(result, answers=answers))
    for image in read_kernels().candidates(gpu.capability, integrated=gpu.integrated):  # the one that decoders take first
        before, loaded = result.images, load_image(image)
        yield (result := msgspec.structs.replace(result, images=(*before, loaded)))
        if loaded.refused is None:
            tried = run_cases(loaded, only, workers)
            yield (result := msgspec.structs.replace(result, images=(*before, tried)))


@click.command(cls=Command, epilog="Example: python -m bench.gpu_parity build/gpu/mini-w4a16-g128")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@option("--only", group="measurement", metavar="EXPRESSION", help="Cases that match, as of pytest -k.  [default: all]")
@option("--workers", group="measurement", type=click.IntRange(1), default=1, help="Processes; more than 1 needs pytest-xdist.")
@option("--lines", group="measurement", type=click.IntRange(1), default=32, help="Held-out questions asked of each bundle.")
@option("--new-tokens", group="measurement", type=click.IntRange(1), default=32, help="Length of an answer, at most.")
@debug_option
def gpu_parity(bundles: tuple[Path, ...], only: str | None, workers: int, lines: int, new_tokens: int) -> None:
    """Compare every kernel with its reference on this machine's GPU, and the answers of cobra-mini's BUNDLES.

    Exits with 3 where something differs.
    """
    name = f"gpu-parity-{short_name(gpu_here().name)}"
    for result in measured(bundles, only, workers, lines, new_tokens):
        file = save_result(name, result)
    print_result([parity_table([result])], file)
    for image in result.images:
        for failure in image.failures:
            click.echo(f"{image.image}: {failure}", err=True)
    if not result.holds:
        raise MachineError(f"this GPU does not give what it should; see {file}")


main = main_of(gpu_parity)

if __name__ == "__main__":
    main()
