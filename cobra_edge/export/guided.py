"""Guided quantization within an export: gradients, bit allocation by their costs, sequential GPTQ; resumable."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ..errors import MachineError
from ..files.staging import held
from ..formats.packing import QuantizedTensor
from ..formats.recipe import Recipe
from ..quantize.bit_allocation import BitAllocation, allocate_by_costs
from ..quantize.guidance import GROUPS, SCHEMA_VERSION, Guidance, Header
from ..quantize.resume import Resume
from ..quantize.sensitivity import of_tensors
from ..suite.line_set import LineSet
from ..terminal.output import stages
from ..version import __version__
from .lines import affordable
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from ..quantize.calibration_data import EmbeddingCache
    from ..quantize.gradients import CalibrationPass

_SEED = 0  # of the random signs


@dataclass(frozen=True, eq=False)
class Guided:
    """A calibration set with the gradients of a model on it: the pass over its layers, what identifies it, and the guidance."""

    run: CalibrationPass
    header: Header
    guidance: Guidance


@contextmanager
def guided(
    checkpoint: Any, recipe: Recipe, data: LineSet | None, work: Path, cache: EmbeddingCache, watch: Stopwatch
) -> Iterator[Guided]:
    """Yield the gradients of a model on calibration lines.

    Finished layers are kept in `work`, which the caller removes when its result is safe: until then the same call resumes.

    Args:
        checkpoint: opened.
        recipe: with the rotations that gradients are taken in the basis of.
        data: calibration lines, with answers, of which the `affordable` are used; None for both embedded sets.
        work: hidden directory.
        cache: visual embeddings that other steps share.
        watch: receives the time of each step.

    Raises:
        InputError: as `stream_forward` and `collect_guidance`.
        MachineError: the disk has no space for the residual streams.
    """
    from ..decode.native_operations import best_operations, differentiable_operations
    from ..quantize.calibration_data import calibration_suite, data_sha256
    from ..quantize.gradients import CalibrationPass, collect_guidance, stream_forward
    from ..quantize.stream_files import StreamFiles
    from ..quantize.streams import spans_of

    config = checkpoint.config.mamba
    data = affordable(data or LineSet.embedded(more=True), checkpoint.config, gradients=True)
    suite = calibration_suite(checkpoint, data.lines, data.directory)
    spans = spans_of(suite, checkpoint.config.n_visual_tokens, whole=False)
    header = Header(
        schema_version=SCHEMA_VERSION,
        cobra_edge=__version__,
        model_id=checkpoint.config.model_id,
        model_sha256=checkpoint.sha256(),
        data_sha256=data_sha256(suite),
        rotations=recipe.rotations,
        lines=len(suite.lines),
        positions=spans[-1].start + spans[-1].length,
        answers=sum(span.answer for span in spans),
        groups=GROUPS,
        seed=_SEED,
    )
    work.parent.mkdir(parents=True, exist_ok=True)
    with held(work), stages() as on_progress:
        kept = Resume(work / "gradients", msgspec.json.encode(header))
        streams = StreamFiles(work / "gradients", (header.positions, config.d_model))
        _require_disk_space(streams.bytes_to_write(config.n_layer + 1), work)
        run = CalibrationPass(checkpoint, suite, spans, streams, best_operations(), on_progress)
        with watch.stage("calibration, forward"):
            stream_forward(run, data.directory, cache)
        with watch.stage("calibration, gradients"):
            found = collect_guidance(replace(run, operations=differentiable_operations()), header, kept)
        yield Guided(run, header, found)


@contextmanager
def guided_values(
    checkpoint: Any,
    recipe: Recipe,
    bits: float | None,
    data: LineSet | None,
    goal: Path,
    cache: EmbeddingCache,
    watch: Stopwatch,
) -> Iterator[tuple[Recipe, BitAllocation, Mapping[str, np.ndarray | QuantizedTensor]]]:
    """Yield the recipe with bits allocated, the allocation, and every matrix (out, in) as stored: codes, float16 or float32.

    Args:
        checkpoint, data, cache, watch: as for `guided`.
        recipe: with method "guided"; its storages are the allocation if `bits` is None.
        bits: budget of bits per weight.
        goal: directory of the bundle; what an interrupted export resumes from is beside it.

    Raises:
        InputError: as `guided` and `quantize_sequentially`, or a budget that is too small.
        MachineError: as `guided`.
    """
    from ..quantize.sequential import quantize_sequentially

    work = calibration_directory(goal)
    with guided(checkpoint, recipe, data, work, cache, watch) as found:
        allocation = allocate_by_costs(checkpoint.config.mamba, recipe, found.guidance.costs(), bits)
        if bits is not None:
            recipe = of_tensors(recipe, allocation.tensors)
        recipe = msgspec.structs.replace(recipe, statistics=hashlib.sha256(msgspec.json.encode(found.header)).hexdigest())
        quantized = Resume(work / "quantized", msgspec.json.encode((found.header, recipe)))
        with watch.stage("quantization"):
            values = quantize_sequentially(found.run, found.guidance, recipe, quantized)
        yield recipe, allocation, values


def calibration_directory(goal: Path) -> Path:
    """Return the hidden directory beside a result that an interrupted calibration resumes from."""
    return goal.absolute().parent / f".{goal.name}.calibration"


def _require_disk_space(needed: int, work: Path) -> None:
    free = shutil.disk_usage(work).free
    if needed > free:
        raise MachineError(
            f"{work.parent}: {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB needed for the residual streams of the "
            "calibration set; free some space, give --out on another disk, or calibrate on fewer images"
        )
