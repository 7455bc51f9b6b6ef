"""The result of `bench vision`, and its tables."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from .machine import Machine
from .spread import Spread
from .tables import NO_VALUE, Table


class EngineResult(msgspec.Struct, frozen=True, kw_only=True):
    """A TensorRT for RTX engine: version of the library, compute capabilities, cost of the build, size, kernels by kind."""

    version: str
    capabilities: tuple[str, ...]
    build_seconds: float
    build_peak_gib: float
    bytes: int
    kernels: dict[str, int]


class VisionRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A vision graph; without latency if the CPU does not support its precision.

    Attributes:
        precision: of the graph.
        parity: relative RMS from torch, by encoder and for the projector.
        wide: matmuls that int8 leaves in float, by name, with the error that int8 would have there.
        bytes, files: size on disk, in total and by file.
        write_seconds, write_peak_gib: cost of writing it.
        open_seconds, run_peak_gib: cost of opening and running it.
        engine: built from it.
        latency_ms: per image.
        share_of_matmul_rate: its rate over that of a large float32 matmul.
        times_fp32: speedup over fp32.
    """

    precision: str
    parity: dict[str, float]
    wide: dict[str, float]
    bytes: int
    files: dict[str, int]
    write_seconds: float
    write_peak_gib: float
    open_seconds: float | None = None
    run_peak_gib: float | None = None
    engine: EngineResult | None = None
    latency_ms: Spread | None = None
    share_of_matmul_rate: Spread | None = None
    times_fp32: Spread | None = None


class VisionMeasures(msgspec.Struct, frozen=True, kw_only=True):
    """The vision graph of one shape.

    Attributes:
        gflops: per image.
        matmul_gflops_per_second: of a large float32 matmul, in the same rounds.
        threads: of the CPU.
        rounds: of latency.
        rows: by precision.
    """

    shape: str
    gflops: float
    matmul_gflops_per_second: Spread
    threads: int
    rounds: int
    rows: tuple[VisionRow, ...]


class VisionResult(VisionMeasures, frozen=True, kw_only=True):
    """`bench vision`."""

    bench: str = "vision"
    machine: Machine


def vision_tables(result: VisionResult) -> Iterator[Table]:
    """Yield the graphs, then the engines if there are any."""
    yield vision_table(result)
    engines = engine_table(result)
    if engines.rows:
        yield engines


def vision_table(result: VisionResult) -> Table:
    """Return size, parity, cost and latency of each precision."""
    title = (
        f"{result.shape}, {result.gflops:,.1f} GFLOP per image, {result.machine.processor}, {result.threads} threads; "
        f"a large float32 matmul: {result.matmul_gflops_per_second.cell('.0f')} GFLOP/s; median (low–high) of {result.rounds} "
        "alternating rounds."
    )
    columns = ["vision graph", "MB", "relative RMS from torch: encoders", "projector", "left in float", "write time, min"]
    columns += ["peak memory of writing, GiB", "latency, ms", "speedup over fp32", "share of the matmul rate"]
    return Table([*columns, "peak memory of running, GiB"], [_cells(row) for row in result.rows], title)


def _cells(row: VisionRow) -> list[str]:
    *encoders, projector = row.parity.values()
    cells = [row.precision, f"{row.bytes / 1e6:,.1f}", ", ".join(f"{e:.1e}" for e in encoders), f"{projector:.1e}"]
    cells += [str(len(row.wide)) if row.precision == "int8" else NO_VALUE]
    cells += [f"{row.write_seconds / 60:.1f}", f"{row.write_peak_gib:.1f}"]
    if row.latency_ms is None or row.share_of_matmul_rate is None:
        return [*cells, "not on a CPU", *[NO_VALUE] * 3]
    cells += [row.latency_ms.cell(",.1f"), f"{row.times_fp32.median:.2f}" if row.times_fp32 else NO_VALUE]
    return [*cells, row.share_of_matmul_rate.cell(".0%"), f"{row.run_peak_gib:.2f}"]


def engine_table(result: VisionResult) -> Table:
    """Return the engines that were built."""
    rows = []
    for row in result.rows:
        if (e := row.engine) is None:
            continue
        kernels = sum(count for kind, count in e.kernels.items() if kind not in ("signal", "wait"))
        cells = [row.precision, f"TensorRT for RTX {e.version}", ", ".join(e.capabilities), f"{e.build_seconds:.0f}"]
        rows.append([*cells, f"{e.build_peak_gib:.1f}", f"{e.bytes / 1e6:,.1f}", str(kernels)])
    return Table(["engine", "library", "compute capability", "build time, s", "peak memory, GiB", "MB", "kernels"], rows)
