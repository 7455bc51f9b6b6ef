"""`bench vision`: the vision graph in every precision: time to write and to run, memory, size, distance from torch, engines.

Latencies are taken in turns, one run of each precision a round, beside the rate of a large float32 matrix product in the same
round: what this processor can do at best. Precisions that a processor cannot multiply in are written and proven, not timed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from ..errors import MachineError
from ..formats.model_config import projector_shapes
from ..model.vision import VisionTower
from ..vision.engines.layer_summary import LayerSummary
from .machine import Finished, measure
from .spread import spread
from .vision_towers import config_of
from .written_graph import a_image, open_written

TIMED = ("fp32", "fp16", "int8")  # onnxruntime multiplies no bf16 on a processor, and takes fp16 in float32
_PRODUCT = 4096  # rows and columns of the large product
Step = Callable[[str], None]


def measure_vision(
    shape: str, precisions: Sequence[str], engines: Sequence[str], target: str, rounds: int, folder: Path, on_step: Step
) -> dict[str, Any]:
    """Measure one shape.

    Args:
        shape: a published one, or cobra-mini.
        precisions: which graphs to write.
        engines: of which of them an engine is built.
        target: for which GPU.
        rounds: of latency.
        folder: where the graphs go.
        on_step: told what is being done.

    Raises:
        MachineError: a step failed; its own message is above.
    """
    rows: list[dict[str, Any]] = []
    for precision in precisions:
        on_step(f"{precision}: write")
        row = _written(shape, precision, folder / precision)
        if precision in TIMED:
            on_step(f"{precision}: open and run alone")
            row |= _alone(folder / precision)
        if precision in engines:
            on_step(f"{precision}: engine")
            row["engine"] = _engine(folder / precision, target)
        rows.append(row)
    timed = [p for p in precisions if p in TIMED]
    on_step("latency in turns")
    latencies, products = _in_turns({p: folder / p for p in timed}, rounds)
    flops, best = tower_flops(shape), spread(products)
    for row in rows:
        if row["precision"] in latencies:
            seconds = latencies[row["precision"]]
            shares = [flops / s / p for s, p in zip(seconds, products, strict=True)]
            row |= {"latency_ms": spread([1e3 * s for s in seconds]), "share_of_matmul_rate": spread(shares)}
            if "fp32" in latencies:
                row["times_fp32"] = spread([a / b for a, b in zip(latencies["fp32"], seconds, strict=True)])
    return {
        "shape": shape,
        "gflops": round(flops / 1e9, 1),
        "matmul_gflops_per_second": {k: round(v / 1e9, 1) for k, v in best.items()},
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "rows": rows,
    }


def tower_flops(shape: str) -> int:
    """Return the floating-point operations of one image's matrix products, a product and a sum counted as two.

    Of each encoder: the patch embedding; then each block's matrices times all its tokens, and attention's two products of
    tokens with tokens. Of the projector: its matrices times the patches, and LDPv2's convolution times the tokens it leaves.
    """
    config = config_of(shape)
    assert config.vision is not None and config.projector is not None
    with torch.device("meta"):
        encoders = VisionTower(config.vision).encoders
    patches, total = config.vision.n_patches, 0
    for e, encoder in zip(config.vision.encoders, encoders, strict=True):
        tokens = patches + e.n_prefix
        matrices = sum(p.numel() for name, p in encoder.named_parameters() if ".blocks." in name and p.ndim == 2)
        total += patches * 3 * e.patch_size**2 * e.embed_dim
        total += tokens * matrices + (e.depth - 1) * 2 * tokens**2 * e.embed_dim
    for name, size in projector_shapes(config.projector, config.vision.feature_dim, config.mamba.d_model).items():
        if name.endswith(".weight"):
            total += math.prod(size) * (config.n_visual_tokens if ".peg." in name else patches)
    return 2 * total


def _written(shape: str, precision: str, directory: Path) -> dict[str, Any]:
    done = measure(["cobra_edge.bench.vision_towers", shape, precision, str(directory)])
    graph = _answer(done, f"writing {shape} in {precision}")["graph"]
    files = {f.name: f.stat().st_size for f in sorted(directory.iterdir()) if f.name.startswith("vision.onnx")}
    return {
        "precision": precision,
        "parity": graph["parity"],
        "wide": graph["wide"],
        "bytes": sum(files.values()),
        "files": files,
        "write_seconds": round(done.seconds, 1),
        "write_peak_gib": round(done.peak_bytes / 2**30, 2),
    }


def _alone(directory: Path) -> dict[str, Any]:
    done = measure(["cobra_edge.bench.written_graph", "look", str(directory)])
    opened = _answer(done, f"running {directory.name}")["open_seconds"]
    return {"open_seconds": round(opened, 2), "run_peak_gib": round(done.peak_bytes / 2**30, 2)}


def _engine(directory: Path, target: str) -> dict[str, Any]:
    found = _answer(
        measure(["cobra_edge.bench.written_graph", "engine", str(directory), target]), f"engine of {directory.name}"
    )
    name, key = next(iter(found["keys"].items()))
    return {
        "version": key["version"],
        "capabilities": key["capabilities"],
        "build_seconds": round(found["seconds"], 1),
        "build_peak_gib": round(found["peak_bytes"] / 2**30, 2),
        "bytes": found["bytes"][name],
        "kernels": msgspec.convert(found["layers"], LayerSummary).kinds(),
    }


def _answer(done: Finished, what: str) -> dict[str, Any]:
    if done.exit_code:
        raise MachineError(f"{what} ended with exit code {done.exit_code}; see its messages above")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _in_turns(directories: dict[str, Path], rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Return seconds of each round by precision, and the product rate of each round in operations a second."""
    sessions = {p: open_written(directory) for p, directory in directories.items()}
    images = {p: a_image(directory) for p, directory in directories.items()}
    seconds: dict[str, list[float]] = {p: [] for p in sessions}
    a, b = (np.random.default_rng(i).standard_normal((_PRODUCT, _PRODUCT), np.float32) for i in range(2))
    products = []
    for number in range(rounds + 1):  # the first warms up
        began = time.perf_counter()
        a @ b
        products.append(2 * _PRODUCT**3 / (time.perf_counter() - began))
        for precision, session in sessions.items():
            began = time.perf_counter()
            session.embed(images[precision])
            seconds[precision].append(time.perf_counter() - began)
        if number == 0:
            products.clear()
            for runs in seconds.values():
                runs.clear()
    return seconds, products
