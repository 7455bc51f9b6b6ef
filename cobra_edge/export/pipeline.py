"""Build a bundle from a checkpoint.

The order of work: check everything (`plan`), write the vision graph and prove it against torch, quantize the decoder
layer by layer, run the golden lines through the float model, then through the finished bundle's own runtime, and only then
give the directory its name.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..bundle.engine_key import EngineKey
from ..bundle.manifest import SCHEMA_VERSION, Drift, Manifest, PromptFile, Source, VisionGraph
from ..bundle.memory_plan import plan_memory
from ..bundle.reader import CARD, DECODER, GOLDEN, MANIFEST, PROMPT, TOKENIZER, VISION, Bundle, file_entries, staged_directory
from ..errors import DriftError
from ..formats.recipe import Recipe
from ..formats.targets import Target
from ..inputs.text import END_OF_TEXT, TextCodec
from ..quantize.bit_allocation import Mix
from ..quantize.statistics import Statistics
from ..regress.budget import judge
from ..regress.report import Figure, Verdict
from ..suite.tokenized import AskedSuite
from ..terminal.output import progress, tell
from ..version import __version__
from .model_card import VISION_SOURCES, model_card
from .plan import ExportOptions, plan_export
from .statistics import find_mix, statistics_for
from .vision import build_engine_ahead, write_vision


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    directory: Path
    manifest: Manifest
    kept_float: dict[str, str]
    verdicts: tuple[Verdict, ...]
    mix: Mix | None = None


def export_bundle(source: str, target: Target, out: Path | None = None, **options: Any) -> Exported:
    """Export a checkpoint for a target.

    Args:
        source: "mini", a name of the hub, or a directory (see `open_checkpoint`).
        target: what to export for.
        out: the bundle's directory; by default bundles/MODEL-TARGET-SCHEME, with -rotated where it is.
        options: fields of `ExportOptions`.

    Raises:
        InputError, CheckpointError: something given is not what it should be; nothing is written. Or something appeared at
            `out` while the export ran; the bundle is kept under another name then.
        MachineError: a library, the network, memory or disk space is missing; nothing is written.
    """
    checkpoint, plan = plan_export(source, target, out, ExportOptions(**options))
    if checkpoint.vision_source is not None:
        tell(f"vision weights: {VISION_SOURCES[checkpoint.vision_source]}")
    o, recipe, asked, codec, mix = plan.options, plan.recipe, plan.asked, plan.codec, None
    with staged_directory(plan.directory, force=o.force, needed_bytes=plan.needed_bytes) as stage:
        sights = [o.golden.parent / name for name in asked.pictures]
        graph, embeddings = write_vision(checkpoint, sights, stage, plan.precision, plan.vision_input, plan.calibration)
        engines = {} if graph is None else build_engine_ahead(stage, plan.precision, target, plan.engine)
        with statistics_for(checkpoint, recipe, plan.statistics, o.calibration, stage, o.device) as found:
            recipe = recipe if found is None else msgspec.structs.replace(recipe, statistics=found.fingerprint())
            if o.bits is not None:
                recipe, mix = find_mix(checkpoint, plan.digest, recipe, found, o.calibration, o.bits, plan.sensitivity)
            with progress() as bar:
                _write_decoder(checkpoint, recipe, stage, bar, found)
        with progress() as bar:
            floor = _write_golden(checkpoint, asked, embeddings, codec, stage, bar)
            _write_text(checkpoint, codec, stage)
            draft = _draft(checkpoint, plan.digest, recipe, target, stage, graph, engines)
            draft = msgspec.structs.replace(draft, noise_floor=floor)
            del checkpoint  # its memory-mapped pages count as ours, and the runtime is about to need room
            drift = _measure(Bundle(stage, draft), len(asked.lines), bar)
        manifest = _seal(stage, draft, drift, target)
    figures = {name: Figure(value) for name, value in drift.measures.items()}
    return Exported(plan.directory, manifest, plan.kept_float, judge(figures, plan.limits, floor), mix)


def _draft(
    checkpoint: Any,
    digest: str,
    recipe: Recipe,
    target: Target,
    stage: Path,
    graph: VisionGraph | None,
    engines: dict[str, EngineKey],
) -> Manifest:
    """Return the manifest but for its files and the drift."""
    vision_bytes = sum(f.stat().st_size for f in stage.iterdir() if f.name.startswith(VISION))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        cobra_edge=__version__,
        source=Source(checkpoint.source_id, digest, checkpoint.vision_source),
        model=checkpoint.config,
        target=target.name,
        recipe=recipe,
        files={},
        memory_plan=plan_memory(checkpoint.config, recipe, target, vision_file_bytes=vision_bytes),
        drift=None,
        vision=graph,
        engines=engines,
    )


def _seal(stage: Path, draft: Manifest, drift: Drift, target: Target) -> Manifest:
    """Write card and manifest, and open the bundle as a reader would."""
    _require_finite_drift(drift)
    manifest = msgspec.structs.replace(draft, drift=drift)
    (stage / CARD).write_text(model_card(manifest, target), encoding="utf-8")
    manifest = msgspec.structs.replace(manifest, files=file_entries(stage))
    (stage / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    opened = Bundle.open(stage, thorough=True)
    if manifest.vision is not None:
        opened.graph_file()
    return manifest


def _write_decoder(checkpoint: Any, recipe: Any, stage: Path, bar: Any, statistics: Statistics | None) -> None:
    from ..formats.model_config import decoder_shapes
    from ..quantize.decoder_file import write_decoder
    from ..quantize.quantizer import scaled_matrices

    config = checkpoint.config.mamba
    total = len(decoder_shapes(config)) + len(scaled_matrices(config, recipe))
    task = bar.add_task(f"decoder as {recipe.scheme}", total=total)
    write_decoder(checkpoint, recipe, stage / DECODER, lambda: bar.advance(task), statistics)


def _write_golden(
    checkpoint: Any, asked: AskedSuite, embeddings: np.ndarray, codec: TextCodec, stage: Path, bar: Any
) -> dict[str, dict[str, float]]:
    """Run the golden lines through the float model and write what it says; returns its noise floor in 16 bits."""
    from ..regress.float_reference import NARROW, batches
    from ..regress.golden import write_golden
    from ..regress.noise_floor import golden_readings, noise_floor

    layers = len(batches(asked.lines, checkpoint.config.n_visual_tokens)) * checkpoint.config.mamba.n_layer
    task = bar.add_task("float reference", total=layers * (1 + len(NARROW)))
    readings = golden_readings(checkpoint, asked, embeddings, codec, lambda: bar.advance(task))
    write_golden(stage / GOLDEN, asked, readings, embeddings)
    return noise_floor(checkpoint, asked, readings, codec, lambda: bar.advance(task))


def _write_text(checkpoint: Any, codec: TextCodec, stage: Path) -> None:
    shutil.copyfile(checkpoint.tokenizer_file(), stage / TOKENIZER)
    prompt = PromptFile(checkpoint.config.prompt_style, END_OF_TEXT, codec.end_id)
    (stage / PROMPT).write_bytes(msgspec.json.format(msgspec.json.encode(prompt)) + b"\n")


def _measure(bundle: Bundle, n_lines: int, bar: Any) -> Drift:
    from ..inference.session import Session
    from ..regress.drift import measure_drift

    task = bar.add_task("drift of the finished bundle", total=n_lines)
    vision = None
    if bundle.manifest.vision is not None:
        from ..vision.graph.emulation import open_emulated

        vision = open_emulated(bundle.path(VISION), bundle.manifest.model, bundle.manifest.vision)
    return measure_drift(Session(bundle, vision=vision), lambda: bar.advance(task))


def _require_finite_drift(drift: Drift) -> None:
    odd = [name for name, value in drift.measures.items() if not math.isfinite(value)]
    if odd:
        raise DriftError(
            f"the drift is not finite ({', '.join(odd)}): the quantized decoder overflows where the float one does not; "
            "nothing was written, take more bits"
        )
