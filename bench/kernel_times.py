"""How long each kernel of a decoder takes on a GPU that is here, beside what its memory gives in the same run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch

from cobra_edge.bench.gpu import Gpu, GpuLimits, captured
from cobra_edge.bench.spread import Spread, spread
from cobra_edge.decode.cuda.kernels.launch import Launch
from cobra_edge.decode.cuda.kernels.matrix import GpuMatrix
from cobra_edge.decode.cuda.weights import GpuLayer, GpuWeights, hollow
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.formats.recipe import Recipe

from .kernel_cases import alike

ROUNDS = 9
_ROUND_SECONDS = 0.01  # a round repeats a graph until it lasts so long, so that beginning and end of it count for little
_MOST_REPEATS = 64
# What a kernel reads and writes beside its arguments, a state that it finds through an address: by its constants.
_ADDRESSED = {"_convolve_and_project": ("INNER", "TAPS"), "_recur": ("d_inner", "d_state")}
# A table of which only a row is read.
_TABLE_LOOK_UPS = ("look_up",)


def measure_kernels(
    parts: dict[str, list[Launch]], weights: GpuWeights, gpu: Gpu, told: Callable[[], None], rounds: int = ROUNDS
) -> list[Any]:
    """Time each distinct kernel of what was recorded on a GPU.

    Launches that differ only in the layer are captured together as one graph, so that each reads weights of its own that no
    cache has kept.

    Args:
        parts: recorded on the GPU.
        weights: of the decoder that was recorded; what else is an argument is filled with random values.
        gpu: where.
        told: called after each kernel and part.
        rounds: how often each is timed.

    Returns:
        A row a kernel and part: launches, microseconds a launch, milliseconds of the part, bytes, GB/s, share of the bandwidth.
    """
    limits, rows = GpuLimits(gpu), []
    kept = {t.untyped_storage().data_ptr() for t in _tensors(weights)}
    for part, launches in parts.items():
        _fill_others(launches, kept)
        for group in alike(launches):
            rows.append({"part": part} | _timed(group, limits, gpu, rounds))
            told()
    return rows


def _timed(group: Sequence[Launch], limits: GpuLimits, gpu: Gpu, rounds: int) -> dict[str, Any]:
    replay = captured(lambda: _run(group), gpu)
    taken = time_in_turns([replay], gpu, rounds)[0]
    each = taken.scaled(1 / len(group))
    bandwidth, n_bytes = limits.read_bandwidth(), moved_bytes(group[0])
    reached = None if n_bytes is None else n_bytes / each.median
    return {
        "kernel": group[0].kernel.__name__,
        "constants": dict(group[0].constants),
        "launches": len(group),
        "microseconds": each.scaled(1e6),
        "part_milliseconds": taken.median * 1e3,
        "moved_bytes": n_bytes,
        "gb_s": None if reached is None else reached / 1e9,
        "bandwidth_share": None if reached is None else reached / bandwidth,
        "read_gb_s": bandwidth / 1e9,
    }


def time_in_turns(works: Sequence[Callable[[], object]], gpu: Gpu, rounds: int = ROUNDS) -> list[Spread]:
    """Return the seconds that each piece of work takes: every round gives each its turn, every other one backwards.

    Args:
        works: replays of graphs; the GPU's own time is taken, by events.
        gpu: where.
        rounds: how often.
    """
    repeats = [_repeats(work, gpu) for work in works]
    taken: list[list[float]] = [[] for _ in works]
    for index in range(rounds):
        order = range(len(works)) if index % 2 == 0 else reversed(range(len(works)))
        for i in order:
            taken[i].append(_seconds(works[i], repeats[i], gpu))
    return [spread(seconds) for seconds in taken]


def _repeats(work: Callable[[], object], gpu: Gpu) -> int:
    _seconds(work, 1, gpu)  # the first run loads what the second finds
    once = max(_seconds(work, 1, gpu), 1e-7)
    return max(1, min(_MOST_REPEATS, math.ceil(_ROUND_SECONDS / once)))


def _seconds(work: Callable[[], object], repeats: int, gpu: Gpu) -> float:
    if gpu.device.type != "cuda":
        return gpu.seconds(lambda: [work() for _ in range(repeats)]) / repeats
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    began.record()
    for _ in range(repeats):
        work()
    ended.record()
    ended.synchronize()
    milliseconds: float = began.elapsed_time(ended)
    return milliseconds / 1e3 / repeats


def _run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.kernel[launch.grid](*launch.arguments, **launch.constants)


def moved_bytes(launch: Launch) -> int | None:
    """Return the bytes of a launch's tensors, each counted once, or twice where it is a state that is read and written.

    None for the look-up in a table, of which rows are read.
    """
    name = launch.kernel.__name__
    if any(word in name for word in _TABLE_LOOK_UPS):
        return None
    tensors = [a for a in launch.arguments if isinstance(a, torch.Tensor)]
    seen = {(t.data_ptr(), tuple(t.shape)): t.numel() * t.element_size() for t in tensors}
    state = 2 * 4 * math.prod(launch.constants[c] for c in _ADDRESSED[name]) if name in _ADDRESSED else 0
    return sum(seen.values()) + state


def random_gpu_weights(mamba: MambaConfig, recipe: Recipe, device: torch.device) -> GpuWeights:
    """Return weights of a shape and recipe, random where that can make a difference to the time; made on the GPU itself.

    Raises:
        InputError: the recipe does not fit the shape.
    """
    weights = GpuWeights.of(hollow(mamba, recipe), device)
    with torch.inference_mode():
        for matrix in _matrices(weights):
            spread = matrix.shape[1] ** -0.5  # of a matrix that leaves a vector's length as it is
            if matrix.scales is None:
                matrix.codes.normal_(std=spread)
            else:
                matrix.codes.random_(0, 256)
                matrix.scales.fill_(spread * 12**0.5 / 2**matrix.bits)
        for layer in weights.layers:
            layer.A.copy_(-torch.arange(1.0, mamba.d_state + 1, device=device).expand_as(layer.A))
    return weights


def _values(weights: GpuWeights) -> Iterator[Any]:
    owners: tuple[GpuWeights | GpuLayer, ...] = (weights, *weights.layers)
    for owner in owners:
        yield from (getattr(owner, field.name) for field in fields(owner))


def _matrices(weights: GpuWeights) -> Iterator[GpuMatrix]:
    return (value for value in _values(weights) if isinstance(value, GpuMatrix))


def _tensors(weights: GpuWeights) -> Iterator[torch.Tensor]:
    for matrix in _matrices(weights):
        yield from (matrix.codes,) if matrix.scales is None else (matrix.codes, matrix.scales)
    yield from (value for value in _values(weights) if isinstance(value, torch.Tensor))


def _fill_others(launches: Sequence[Launch], kept: set[int]) -> None:
    """Give every buffer that holds no weights random values: zeros can be faster than what real ones hold."""
    for launch in launches:
        for tensor in launch.arguments:
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                continue
            if tensor.untyped_storage().data_ptr() not in kept:
                tensor.normal_()
