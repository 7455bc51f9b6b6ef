"""The vision graph in each precision: cost of writing and running it, size, distance from torch, engines.

Precisions alternate: in each round every one is run once, and a large float32 matmul is timed, whose rate is the peak of this
processor. Precisions that a processor does not support are written and verified, not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import torch
from msgspec.structs import replace

from ..errors import MachineError
from ..model.tower_flops import tower_flops
from .machine import Finished, measure
from .spread import spread
from .vision_result import EngineResult, VisionMeasures, VisionRow
from .vision_towers import Written, config_of
from .written_graph import BuiltEngine, Opened, noise_image, open_written

TIMED = ("fp32", "fp16", "int8")  # on a processor, onnxruntime has no bf16 matmul, and runs fp16 in float32
_MATMUL = 4096  # rows and columns of the large matmul
Step = Callable[[str], None]
Answer = TypeVar("Answer")


def measure_vision(
    shape: str, precisions: Sequence[str], engines: Sequence[str], target: str, rounds: int, folder: Path, on_step: Step
) -> VisionMeasures:
    """Measure one shape.

    Args:
        shape: a published shape, or cobra-mini.
        precisions: which graphs to write.
        engines: precisions for which an engine is built.
        target: that engines are built for.
        rounds: of latency.
        folder: for the graphs, a directory per precision.
        on_step: called with the current step.

    Raises:
        MachineError: a child process failed; its messages are on stderr.
    """
    rows: list[VisionRow] = []
    for precision in precisions:
        on_step(f"{precision}: write")
        row = _written(shape, precision, folder / precision)
        if precision in TIMED:
            on_step(f"{precision}: open and run")
            row = _with_cost(row, folder / precision)
        if precision in engines:
            on_step(f"{precision}: engine")
            row = replace(row, engine=_engine(folder / precision, target))
        rows.append(row)
    on_step("latency")
    latencies, rates = _alternate({p: folder / p for p in precisions if p in TIMED}, rounds)
    flops, peak = tower_flops(config_of(shape)), spread([round(rate / 1e9, 1) for rate in rates])
    return VisionMeasures(
        shape=shape,
        gflops=round(flops / 1e9, 1),
        matmul_gflops_per_second=peak,
        threads=torch.get_num_threads(),
        rounds=rounds,
        rows=tuple(_with_latency(row, latencies, rates, flops) for row in rows),
    )


def _with_latency(row: VisionRow, latencies: dict[str, list[float]], rates: Sequence[float], flops: int) -> VisionRow:
    """Return a row with its latency; as it is if its precision was not timed."""
    seconds = latencies.get(row.precision)
    if seconds is None:
        return row
    shares = [flops / s / rate for s, rate in zip(seconds, rates, strict=True)]
    fp32 = latencies.get("fp32")
    return replace(
        row,
        latency_ms=spread([1e3 * s for s in seconds]),
        share_of_matmul_rate=spread(shares),
        times_fp32=spread([a / b for a, b in zip(fp32, seconds, strict=True)]) if fp32 else None,
    )


def _written(shape: str, precision: str, directory: Path) -> VisionRow:
    done = measure(["cobra_edge.bench.vision_towers", shape, precision, str(directory)])
    graph = _answer(done, f"writing {shape} in {precision}", Written).graph
    files = {f.name: f.stat().st_size for f in sorted(directory.iterdir()) if f.name.startswith("vision.onnx")}
    return VisionRow(
        precision=precision,
        parity=graph.parity,
        wide=graph.wide,
        bytes=sum(files.values()),
        files=files,
        write_seconds=round(done.seconds, 1),
        write_peak_gib=round(done.peak_bytes / 2**30, 2),
    )


def _with_cost(row: VisionRow, directory: Path) -> VisionRow:
    """Return a row with the time to open its graph, and the peak memory of a process that runs it."""
    done = measure(["cobra_edge.bench.written_graph", "run", str(directory)])
    opened = _answer(done, f"running {directory.name}", Opened)
    return replace(row, open_seconds=round(opened.open_seconds, 2), run_peak_gib=round(done.peak_bytes / 2**30, 2))


def _engine(directory: Path, target: str) -> EngineResult:
    done = measure(["cobra_edge.bench.written_graph", "engine", str(directory), target])
    engine = _answer(done, f"building the engine of {directory.name}", BuiltEngine)
    return EngineResult(
        version=engine.version,
        capabilities=engine.capabilities,
        build_seconds=round(engine.seconds, 1),
        build_peak_gib=round(engine.peak_bytes / 2**30, 2),
        bytes=engine.bytes,
        kernels=engine.layers.kinds(),
    )


def _answer(done: Finished, what: str, kind: type[Answer]) -> Answer:
    if done.exit_code:
        raise MachineError(f"{what} failed with exit code {done.exit_code}; see its messages above")
    return msgspec.json.decode(done.stdout, type=kind)


def _alternate(directories: dict[str, Path], rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Return seconds of each round by precision, and FLOP/s of the large matmul in each round."""
    sessions = {p: open_written(directory) for p, directory in directories.items()}
    images = {p: noise_image(directory) for p, directory in directories.items()}
    seconds: dict[str, list[float]] = {p: [] for p in sessions}
    a, b = (np.random.default_rng(i).standard_normal((_MATMUL, _MATMUL), np.float32) for i in range(2))
    rates = []
    for number in range(rounds + 1):  # the first one warms up
        began = time.perf_counter()
        a @ b
        rates.append(2 * _MATMUL**3 / (time.perf_counter() - began))
        for precision, session in sessions.items():
            began = time.perf_counter()
            session.embed(images[precision])
            seconds[precision].append(time.perf_counter() - began)
        if number == 0:
            rates.clear()
            for runs in seconds.values():
                runs.clear()
    return seconds, rates
