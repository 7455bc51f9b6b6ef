"""Guided quantization within an export: gradients, bit allocation by their costs, sequential GPTQ; resumable."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ..errors import MachineError
from ..files.staging import held
from ..formats.packing import QuantizedTensor
from ..formats.recipe import Recipe
from ..quantize.bit_allocation import BitAllocation, allocate_by_costs
from ..quantize.guidance import GROUPS, SCHEMA_VERSION, Header
from ..quantize.resume import Resume
from ..quantize.sensitivity import of_tensors
from ..suite.line_set import LineSet
from ..terminal.output import stages
from ..version import __version__
from .lines import affordable
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from ..quantize.calibration_data import EmbeddingCache

_SEED = 0  # of the random signs


@contextmanager
def guided_values(
    checkpoint: Any,
    recipe: Recipe,
    bits: float | None,
    data: LineSet | None,
    goal: Path,
    cache: EmbeddingCache,
    watch: Stopwatch,
) -> Iterator[tuple[Recipe, BitAllocation | None, Mapping[str, np.ndarray | QuantizedTensor]]]:
    """Yield the recipe with bits allocated, the allocation, and every matrix (out, in) as stored: codes, float16 or float32.

    Finished layers are kept in a hidden directory next to `goal`, which is removed at the end. If the process stops before, the
    same export resumes from there.

    Args:
        checkpoint: opened.
        recipe: with method "guided"; its storages count if `bits` is None.
        bits: budget of bits per weight.
        data: calibration lines, with answers, of which the `affordable` are used; None for both embedded sets.
        goal: directory of the bundle.
        cache: visual embeddings that other steps share.
        watch: receives the time of each step.

    Raises:
        InputError: as `stream_forward`, `collect_guidance` and `quantize_sequentially`, or a budget that is too small.
        MachineError: the disk has no space for the residual streams.
    """
    from ..decode.native_operations import best_operations, differentiable_operations
    from ..quantize.calibration_data import calibration_suite, data_sha256
    from ..quantize.gradients import CalibrationPass, collect_guidance, stream_forward
    from ..quantize.sequential import quantize_sequentially
    from ..quantize.stream_files import StreamFiles
    from ..quantize.streams import spans_of

    config = checkpoint.config.mamba
    data = affordable(data or LineSet.embedded(more=True), checkpoint.config)
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
    work = goal.absolute().parent / f".{goal.name}.calibration"
    work.parent.mkdir(parents=True, exist_ok=True)
    with held(work), stages() as on_progress:
        gradients = Resume(work / "gradients", msgspec.json.encode(header))
        streams = StreamFiles(work / "gradients", (header.positions, config.d_model))
        _require_disk_space(streams.bytes_to_write(config.n_layer + 1), work)
        run = CalibrationPass(checkpoint, suite, spans, streams, best_operations(), on_progress)
        with watch.stage("calibration, forward"):
            stream_forward(run, data.directory, cache)
        with watch.stage("calibration, gradients"):
            guidance = collect_guidance(replace(run, operations=differentiable_operations()), header, gradients)
        allocation = None
        if bits is not None:
            allocation = allocate_by_costs(config, recipe, guidance.costs(), bits)
            recipe = of_tensors(recipe, allocation.tensors)
        recipe = msgspec.structs.replace(recipe, statistics=hashlib.sha256(msgspec.json.encode(header)).hexdigest())
        quantized = Resume(work / "quantized", msgspec.json.encode((header, recipe)))
        with watch.stage("quantization"):
            values = quantize_sequentially(run, guidance, recipe, quantized)
        yield recipe, allocation, values
        shutil.rmtree(work)


def _require_disk_space(needed: int, work: Path) -> None:
    free = shutil.disk_usage(work).free
    if needed > free:
        raise MachineError(
            f"{work.parent}: {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB needed for the residual streams of the "
            "calibration set; free some space, give --out on another disk, or calibrate on fewer images"
        )
