"""Compilation of candidates in several processes, before they are timed; Triton finds them in its cache."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import torch

from cobra_edge.bench.shapes import shape_named
from cobra_edge.decode.cuda.kernels.compiling import compile_launches
from cobra_edge.decode.cuda.kernels.launch import recording
from cobra_edge.decode.cuda.kernels.tiles import trying
from cobra_edge.decode.cuda.weights import GpuWeights, hollow
from cobra_edge.errors import CobraEdgeError
from cobra_edge.formats.recipe import uniform_recipe
from cobra_edge.formats.scheme import scheme_named

from .tile_cases import Cases, Grid


@dataclass(frozen=True)
class Task:
    """One candidate of one case for one kind of GPU."""

    shape: str
    scheme: str
    kernel: str
    max_tokens: int
    sizes: dict[str, int]
    capability: str


def tasks_of(shape: str, schemes: Sequence[str], grids: Sequence[Grid], capability: str) -> list[Task]:
    """Return what there is to compile."""
    return [
        Task(shape, scheme, grid.kernel, grid.max_tokens, sizes, capability)
        for scheme in dict.fromkeys(schemes)
        for grid in grids
        for sizes in grid.candidates()
    ]


def compile_candidates(tasks: Sequence[Task], jobs: int | None, told: Callable[[], None]) -> None:
    """Compile all of them, with this many processes (None for one per processor); those that fail are skipped."""
    with ProcessPoolExecutor(jobs or os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(compile_candidate, task) for task in tasks]):
            done.result()
            told()


def compile_candidate(task: Task) -> int:
    """Compile what one layer launches with a candidate; returns how many kernels, 0 where they cannot be compiled."""
    mamba = msgspec.structs.replace(shape_named(task.shape).mamba, n_layer=1)
    recipe, _ = uniform_recipe(mamba, scheme_named(task.scheme))
    case = Cases(GpuWeights.of(hollow(mamba, recipe), torch.device("meta"))).of(task.kernel, task.max_tokens)
    with suppress(CobraEdgeError, AssertionError), trying(task.kernel, task.sizes):
        with torch.inference_mode(), recording() as launches:
            for call in case.calls():
                case.function(*call.for_kernel(), **call.keywords)
        return len(compile_launches(launches, task.capability))
    return 0
