"""What bench/gpu.sh finds out about the CUDA kernels on a GPU: results and tables of parity, kernel times and sanitizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from cobra_edge.bench.decode_result import GpuFacts
from cobra_edge.bench.machine import Machine
from cobra_edge.bench.spread import Spread
from cobra_edge.bench.tables import NO_VALUE, NOT_MEASURED, Table, verdict

_CACHED = "All layers' x_proj, or dt_proj, and the head may fit the cache of a large GPU; then these GB/s are the cache's."


class ImageParity(msgspec.Struct, frozen=True, kw_only=True):
    """One image of kernels.xz on a GPU: how long the driver took to load it, and the cases of kernels and decoder with it.

    Attributes:
        image: such as "sm_90", or "compute_80" for PTX, which the driver translates.
        load_seconds: None where the driver refused it.
        refused: the driver's reason.
        passed, failed, skipped: tests; 0 where none has run.
        failures: the first names of those that failed.
        seconds: of all tests.
    """

    image: str
    load_seconds: float | None = None
    refused: str | None = None
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: tuple[str, ...] = ()
    seconds: float = 0.0


class AnswerParity(msgspec.Struct, frozen=True, kw_only=True):
    """cobra-mini's greedy answers on a GPU, beside the native decoder's.

    Attributes:
        scheme: of the bundle.
        lines: questions about images.
        tokens: of all answers.
        same: lines whose answers are the same, token for token.
        different: the first prompts whose answers differ.
    """

    scheme: str
    lines: int
    tokens: int
    same: int
    different: tuple[str, ...] = ()


class GpuParityResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.gpu_parity`."""

    bench: str = "gpu-parity"
    gpu: GpuFacts
    machine: Machine
    images: tuple[ImageParity, ...] = ()
    answers: tuple[AnswerParity, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether all that was compared is the same, and something was."""
        cases = all(i.refused is None and not i.failed and i.passed for i in self.images)
        return cases and bool(self.images) and all(a.same == a.lines for a in self.answers)


class KernelTime(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel in one place of the decoder, over all layers.

    Attributes:
        part: "token", or "prompt of 768".
        kernel: its name.
        role: the matrix that it multiplies with, or "".
        launches: in the part.
        microseconds: of a launch; all launches of the part were one CUDA graph.
        weight_bytes: weights and state that a launch moves; 0 where it has none.
        macs: multiply-accumulates of a launch with a matrix.
        gb_s, bandwidth_share: of those bytes; None without.
    """

    part: str
    kernel: str
    role: str
    launches: int
    microseconds: Spread
    weight_bytes: int
    macs: int
    gb_s: float | None = None
    bandwidth_share: float | None = None


class SchemeKernels(msgspec.Struct, frozen=True, kw_only=True):
    """A scheme's parts as whole graphs, in milliseconds, their kernels, and the bandwidth measured in the same rounds."""

    scheme: str
    read_gb_s: Spread
    parts_ms: dict[str, Spread]
    kernels: tuple[KernelTime, ...]


class GpuKernelsResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.gpu_kernels`."""

    bench: str = "gpu-kernels"
    shape: str
    rounds: int
    gpu: GpuFacts
    machine: Machine
    schemes: tuple[SchemeKernels, ...] = ()


class SanitizerRun(msgspec.Struct, frozen=True, kw_only=True):
    """One tool of compute-sanitizer: errors it counted (None where it came to no end), and the end of what it said."""

    tool: str
    errors: int | None
    seconds: float
    said: str = ""


class GpuSanitizerResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.gpu_sanitizer`; no runs where the tool is not installed."""

    bench: str = "gpu-sanitizer"
    gpu: GpuFacts
    machine: Machine
    version: str | None
    runs: tuple[SanitizerRun, ...] = ()


def parity_table(results: Sequence[GpuParityResult]) -> Table:
    """Return what ran on which GPU, and whether it gave what it should."""
    rows = []
    for result in results:
        for i in result.images:
            cases = f"{i.passed} of {i.passed + i.failed} cases pass, {verdict(not i.failed and i.passed > 0)}"
            rows.append([result.gpu.name, f"kernels {i.image}", i.refused or cases])
        for a in result.answers:
            answers = (
                f"{a.same} of {a.lines} answers ({a.tokens} tokens) are the native decoder's, {verdict(a.same == a.lines)}"
            )
            rows.append([result.gpu.name, f"cobra-mini {a.scheme}", answers])
    return Table(["GPU", "what", "found"], rows or [["a GPU", "kernels, cobra-mini", NOT_MEASURED]])


def kernels_tables(result: GpuKernelsResult) -> Iterator[Table]:
    """Yield a table for each scheme: every kernel's time and its share of the bandwidth measured in the same run."""
    for found in result.schemes:
        title = f"{result.shape} {found.scheme} on {result.gpu.name}; memory bandwidth in the same run "
        title += f"{found.read_gb_s.median:.0f} GB/s; median (low–high) of {result.rounds}; commit {result.machine.commit}."
        rows = [_kernel_cells(kernel) for kernel in found.kernels]
        for part, ms in found.parts_ms.items():
            rows.append([part, "all, one graph", NO_VALUE, NO_VALUE, ms.scaled(1e3).cell(".0f"), *[NO_VALUE] * 3])
        columns = ["part", "kernel", "matrix", "launches", "µs a launch", "GB/s", "share of the bandwidth", "TFLOP/s"]
        yield Table(columns, rows, title, [_CACHED])


def _kernel_cells(k: KernelTime) -> list[str]:
    share = NO_VALUE if k.bandwidth_share is None else f"{k.bandwidth_share:.0%}"
    rate = NO_VALUE if k.gb_s is None else f"{k.gb_s:.0f}"
    tera = f"{2 * k.macs / k.microseconds.median / 1e6:.1f}" if k.macs else NO_VALUE
    return [k.part, f"`{k.kernel}`", k.role or NO_VALUE, str(k.launches), k.microseconds.cell(".1f"), rate, share, tera]


def sanitizer_table(results: Sequence[GpuSanitizerResult]) -> Table:
    """Return the errors that each tool counted."""
    rows = []
    for result in results:
        if result.version is None:
            rows.append([result.gpu.name, "compute-sanitizer", "not installed there"])
        for run in result.runs:
            found = "came to no end" if run.errors is None else f"{run.errors} errors, {verdict(run.errors == 0)}"
            rows.append([result.gpu.name, run.tool, found])
    return Table(["GPU", "tool", "found"], rows or [["a GPU", "memcheck, racecheck, synccheck", NOT_MEASURED]])
