"""Export a checkpoint as a bundle.

The steps: check everything (`plan`); write the vision graph and compare it with torch; let the float model answer
lines that have no answer; quantize the decoder layer by layer; run the golden lines through the float model, then through the
runtime of the finished bundle; rename the staging directory.

The vision tower sees each image once in float32: golden lines, int8 calibration, statistics and bit allocation share its
embeddings.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ..bundle.engine_key import EngineKey
from ..bundle.manifest import SCHEMA_VERSION, Drift, Manifest, PromptFile, Source, VisionGraph
from ..bundle.reader import (
    DECODER,
    GOLDEN,
    MANIFEST,
    MODEL_CARD,
    PROMPT,
    TOKENIZER,
    VISION,
    Bundle,
    file_entries,
    staged_directory,
)
from ..errors import DriftError
from ..formats.method import recipe_method
from ..formats.model_config import decoder_shapes
from ..formats.packing import QuantizedTensor
from ..formats.precision import PrecisionName
from ..formats.recipe import Recipe
from ..formats.targets import Target
from ..inputs.text import END_OF_TEXT, TextCodec
from ..quantize.bit_allocation import BitAllocation
from ..regress.report import Verdict
from ..suite.line_set import LineSet
from ..suite.tokenized import TokenizedSuite
from ..terminal.output import progress, tell
from ..version import __version__
from .answers import answers_file, with_answers
from .estimate import estimates, time_line
from .fallbacks import measured_within_budget
from .guided import calibration_directory, guided_values
from .lines import tokenized_lines
from .memory_plan import plan_memory
from .model_card import VISION_SOURCES, model_card
from .options import ExportOptions
from .plan import ExportPlan, open_planned, plan_export
from .statistics import find_allocation, statistics_for
from .stopwatch import Stopwatch
from .vision import build_engine_ahead, write_vision

if TYPE_CHECKING:
    from ..quantize.calibration_data import EmbeddingCache


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        directory, manifest: of the bundle.
        kept_float: reasons why matrices stay float16, by name.
        verdicts: on each limit of the drift budget.
        allocation: of bits, if there was a budget.
        seconds: wall time by stage.
        estimated_seconds: of the whole, told before it began, by quality or method.
    """

    directory: Path
    manifest: Manifest
    kept_float: dict[str, str]
    verdicts: tuple[Verdict, ...]
    allocation: BitAllocation | None
    seconds: Mapping[str, float]
    estimated_seconds: Mapping[str, float]


def export_bundle(source: str, target: Target, out: Path | None = None, **options: Any) -> Exported:
    """Export a checkpoint for a target.

    Args:
        source: "mini", a name on the hub, or a directory (see `open_checkpoint`).
        target: device profile.
        out: directory of the bundle; by default as `plan_export` names it.
        options: fields of `ExportOptions`.

    Raises:
        InputError, CheckpointError: invalid input; nothing is written. Or something appeared at `out` during the export; then
            the bundle is kept under another name.
        MachineError: a library, the network, memory or disk space is missing; nothing is written.
    """
    return write_bundle(*plan_export(source, target, out, ExportOptions(**options)))


def write_bundle(checkpoint: Any, plan: ExportPlan) -> Exported:
    """Write the bundle of a plan; raises as `export_bundle`."""
    from ..quantize.calibration_data import EmbeddingCache

    if checkpoint.vision_source is not None:
        tell(f"vision weights: {VISION_SOURCES[checkpoint.vision_source]}")
    estimated = estimates(checkpoint, plan)
    tell(time_line(estimated, plan.choice.quality))
    o, cache, watch, foretells = plan.options, EmbeddingCache(checkpoint), Stopwatch(), _foretells(plan)
    calibration = plan.calibration if plan.calibration and plan.calibration.images() else LineSet.embedded()
    with staged_directory(plan.directory, force=o.force, needed_bytes=plan.needed_bytes) as stage:
        images = plan.golden.images()
        with watch.stage("vision graph"):
            graph = write_vision(checkpoint, images, stage, plan.precision, plan.vision_input, calibration, cache)
        with watch.stage("answers"):
            plan = with_answers(checkpoint, plan, cache)
        suite = tokenized_lines(plan.golden, plan.codec, checkpoint.config)
        embeddings = _embeddings(checkpoint, suite, plan.golden.directory, cache)
        engines = {} if graph is None else build_engine_ahead(stage, plan.precision, plan.target, plan.engine)
        recipe, allocation = _write_decoder(checkpoint, plan, stage, cache, watch)
        del cache
        with watch.stage("float reference"), progress() as bar:
            floor = _write_golden(checkpoint, suite, embeddings, plan.codec, stage, bar)
        _write_text(checkpoint, plan.codec, stage)
        draft = _draft(checkpoint, plan.digest, recipe, plan.target, stage, graph, engines)
        draft = msgspec.structs.replace(draft, noise_floor=floor)
        del checkpoint  # its memory-mapped pages count as ours, and the runtime is about to need memory
        with watch.stage("drift"):
            expected = _expected_kld(allocation) if foretells else None
            found = measured_within_budget(
                plan,
                draft,
                lambda draft: msgspec.structs.replace(_measure(Bundle(stage, draft), len(suite.lines)), expected_kld=expected),
                lambda draft, precision: _with_vision(draft, plan, precision, stage, calibration),
            )
        manifest = _seal(stage, found.draft, found.drift, plan.target)
    answers_file(plan.directory).unlink(missing_ok=True)
    shutil.rmtree(calibration_directory(plan.directory), ignore_errors=True)
    return Exported(plan.directory, manifest, plan.kept_float, found.verdicts, allocation, watch.seconds, estimated)


def _with_vision(draft: Manifest, plan: ExportPlan, precision: PrecisionName, stage: Path, calibration: LineSet) -> Manifest:
    """Write the vision graph again, in another precision; return the manifest with it."""
    from ..quantize.calibration_data import EmbeddingCache

    assert not draft.engines, "engines are of the graph before"
    for file in [f for f in stage.iterdir() if f.name.startswith(VISION)]:
        file.unlink()
    checkpoint = open_planned(plan.source, plan.options, plan.choice)
    cache, images = EmbeddingCache(checkpoint), plan.golden.images()
    graph = write_vision(checkpoint, images, stage, precision, plan.vision_input, calibration, cache)
    memory = plan_memory(draft.model, draft.recipe, plan.target, vision_file_bytes=_vision_bytes(stage))
    return msgspec.structs.replace(draft, vision=graph, memory_plan=memory)


def _vision_bytes(stage: Path) -> int:
    return sum(f.stat().st_size for f in stage.iterdir() if f.name.startswith(VISION))


def _draft(
    checkpoint: Any,
    digest: str,
    recipe: Recipe,
    target: Target,
    stage: Path,
    graph: VisionGraph | None,
    engines: dict[str, EngineKey],
) -> Manifest:
    """Return the manifest without its files and the drift."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        cobra_edge=__version__,
        source=Source(checkpoint.source_id, digest, checkpoint.vision_source),
        model=checkpoint.config,
        target=target.name,
        recipe=recipe,
        files={},
        memory_plan=plan_memory(checkpoint.config, recipe, target, vision_file_bytes=_vision_bytes(stage)),
        drift=None,
        vision=graph,
        engines=engines,
    )


def _seal(stage: Path, draft: Manifest, drift: Drift, target: Target) -> Manifest:
    """Write the model card and the manifest, and open the bundle as a reader would."""
    _require_finite_drift(drift)
    manifest = msgspec.structs.replace(draft, drift=drift)
    (stage / MODEL_CARD).write_text(model_card(manifest, target), encoding="utf-8")
    manifest = msgspec.structs.replace(manifest, files=file_entries(stage))
    (stage / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    opened = Bundle.open(stage, thorough=True)
    if manifest.vision is not None:
        opened.graph_file()
    return manifest


def _write_decoder(
    checkpoint: Any, plan: ExportPlan, stage: Path, cache: EmbeddingCache, watch: Stopwatch
) -> tuple[Recipe, BitAllocation | None]:
    """Write DECODER; returns the recipe it was written by, and the bit allocation if there is a budget."""
    from ..quantize.decoder_file import write_decoder
    from ..quantize.quantizer import scaled_matrices

    o, recipe, bits, config = plan.options, plan.recipe, plan.choice.bits, checkpoint.config.mamba

    def write(recipe: Recipe, values: Mapping[str, np.ndarray | QuantizedTensor] = {}) -> None:
        with watch.stage("decoder file"), progress() as bar:
            total = len(decoder_shapes(config)) + len(scaled_matrices(config, recipe))
            task = bar.add_task(f"decoder as {recipe.scheme}", total=total)
            write_decoder(checkpoint, recipe, stage / DECODER, lambda: bar.advance(task), statistics, values)

    with statistics_for(checkpoint, recipe, plan.statistics, plan.calibration, stage, cache, o.device, watch) as statistics:
        if statistics is not None:
            recipe = msgspec.structs.replace(recipe, statistics=statistics.fingerprint())
        if recipe_method(recipe.method).needs_gradients:
            with guided_values(checkpoint, recipe, bits, plan.calibration, plan.directory, cache, watch) as (
                found,
                allocation,
                values,
            ):
                write(found, values)
            return found, allocation
        measured = None
        if bits is not None:
            with watch.stage("bit allocation"):
                recipe, measured = find_allocation(
                    checkpoint, plan.digest, recipe, statistics, plan.calibration, bits, plan.sensitivity, cache
                )
        write(recipe)
    return recipe, measured


def _foretells(plan: ExportPlan) -> bool:
    """Return whether the calibration lines tell what drift to expect on the golden ones: given answers of one set.

    A model's own answers to what it was not taught can be a token long, and drift by far more than gradients foretell.
    """
    one_set = plan.options.golden is None and (plan.calibration is None or plan.calibration.name == plan.golden.name)
    return one_set and all(line.answer for line in [*(plan.calibration.lines if plan.calibration else []), *plan.golden.lines])


def _expected_kld(allocation: BitAllocation | None) -> float | None:
    """Return the KLD that gradients foretold; None without gradients. A measured allocation was chosen by its KLD."""
    foretold = allocation is not None and allocation.kld is None and math.isfinite(allocation.kld_alone)
    return allocation.kld_alone if allocation is not None and foretold else None


def _embeddings(checkpoint: Any, suite: TokenizedSuite, directory: Path, cache: EmbeddingCache) -> np.ndarray:
    """Return the float model's embeddings of a suite's images, (images, n_visual_tokens, d_model) float32."""
    shape = len(suite.images), checkpoint.config.n_visual_tokens, checkpoint.config.mamba.d_model
    if not suite.images:
        return np.empty((0, *shape[1:]), np.float32)
    return cache.get([directory / name for name in suite.images]).numpy().reshape(shape)


def _write_golden(
    checkpoint: Any, suite: TokenizedSuite, embeddings: np.ndarray, codec: TextCodec, stage: Path, bar: Any
) -> dict[str, dict[str, float]]:
    """Run the golden lines through the float model and write the results; returns its noise floor in 16 bits."""
    from ..regress.float_reference import batches
    from ..regress.golden import write_golden
    from ..regress.noise_floor import floor_precisions, golden_predictions, noise_floor

    layers = len(batches(suite.lines, checkpoint.config.n_visual_tokens)) * checkpoint.config.mamba.n_layer
    task = bar.add_task("float reference", total=layers * (1 + len(floor_precisions(checkpoint.config))))
    predictions = golden_predictions(checkpoint, suite, embeddings, codec, lambda: bar.advance(task))
    write_golden(stage / GOLDEN, suite, predictions, embeddings)
    return noise_floor(checkpoint, suite, predictions, codec, lambda: bar.advance(task))


def _write_text(checkpoint: Any, codec: TextCodec, stage: Path) -> None:
    shutil.copyfile(checkpoint.tokenizer_file(), stage / TOKENIZER)
    prompt = PromptFile(checkpoint.config.prompt_style, END_OF_TEXT, codec.end_id)
    (stage / PROMPT).write_bytes(msgspec.json.format(msgspec.json.encode(prompt)) + b"\n")


def _measure(bundle: Bundle, n_lines: int) -> Drift:
    from ..inference.session import Session
    from ..regress.drift import measure_drift

    vision = None
    if bundle.manifest.vision is not None:
        from ..vision.graph.emulation import open_emulated

        vision = open_emulated(bundle.path(VISION), bundle.manifest.model, bundle.manifest.vision)
    with progress() as bar:
        task = bar.add_task("drift of the finished bundle", total=n_lines)
        # A GPU keeps activations in float: the drift of int8 ones is that of a processor, on any machine.
        device = "cpu" if bundle.manifest.recipe.activations == "int8" else "auto"
        return measure_drift(Session(bundle, device, vision=vision), lambda: bar.advance(task))


def _require_finite_drift(drift: Drift) -> None:
    odd = [name for name, value in drift.measures.items() if not math.isfinite(value)]
    if odd:
        raise DriftError(
            f"the drift is not finite ({', '.join(odd)}): the quantized decoder overflows, the float model does not; nothing "
            "was written; use more bits"
        )
