"""Assemble a bundle from a checkpoint.

The order of work: open and check the checkpoint, count the memory, write the vision graph and prove it against torch, quantize
the decoder layer by layer, run the golden lines through the float model, then through the finished bundle's own runtime, and
only then give the directory its name.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .assemble_vision import build_engine_ahead, checked_engine, checked_precision, write_vision
from .bundle import (
    CARD,
    DECODER,
    GOLDEN,
    MANIFEST,
    PROMPT,
    TOKENIZER,
    VISION,
    Bundle,
    check_goal,
    file_entries,
    staged_directory,
)
from .calibrated import find_mix, hashed, statistics_for
from .errors import DriftError, InputError, MachineError, near_matches
from .manifest import SCHEMA_VERSION, Drift, Manifest, PromptFile, Source, VisionGraph
from .memory import plan_memory
from .model.config import CobraConfig
from .model_card import model_card
from .precision import InputForm
from .quantize.mix import Mix, require_reachable, smallest_mix
from .quantize.sensitivity import of_tensors
from .quantize.statistics import Statistics
from .recipe import METHODS, MIXED, ROTATIONS, Recipe, matrix_weights, uniform_recipe
from .regress.asked import AskedSuite, asked_suite
from .regress.budget import judge, read_budget
from .regress.report import Figure, Verdict
from .regress.suite import CALIBRATION, HELDOUT, Line, read_suite, spread
from .scheme import Scheme, scheme_named
from .targets import Target
from .terminal import progress
from .text import END_OF_TEXT, PromptTemplate, TextCodec
from .version import __version__
from .vision.engines.cache import EngineKey

_SMALL = 10**9  # below this many weights the float reference is quick, and more golden lines are affordable
_GOLDEN_LINES = (1000, 4)
_WRITING_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    directory: Path
    manifest: Manifest
    kept_float: dict[str, str]
    verdicts: tuple[Verdict, ...]
    mix: Mix | None = None


def export_bundle(
    source: str,
    target: Target,
    out: Path | None = None,
    *,
    scheme: str | None = None,
    method: str = "rtn",
    rotation: str = "none",
    bits: float | None = None,
    sensitivity: Path | None = None,
    statistics: Path | None = None,
    calibration: Path | None = None,
    clip_activations: float | None = None,
    force: bool = False,
    vision_precision: str | None = None,
    vision_input: InputForm = "uint8",
    engine: str = "auto",
    vision_weights: Path | None = None,
    tokenizer: Path | None = None,
    golden: Path = HELDOUT,
    golden_lines: int | None = None,
    budget: Path | None = None,
) -> Exported:
    """Export a checkpoint for a target.

    Args:
        source: "mini", a registry name, or a directory (see `open_checkpoint`).
        target: what to export for.
        out: the bundle's directory; by default bundles/MODEL-TARGET-SCHEME, with -rotated where it is.
        scheme: by default the target's.
        method: how codes are chosen, one of `recipe.METHODS`.
        rotation: one of `recipe.ROTATIONS`: "out-proj" has out_proj's input rotated, "residual" the residual stream.
        bits: budget a weight, for the best mix of schemes; `scheme` then only says what activations are.
        sensitivity: what `sensitivity` wrote of this checkpoint; None scans now where a mix is wanted.
        statistics: what `calibrate` wrote of this checkpoint, for methods that look at activations.
        calibration: a suite that statistics are taken of where none are given, that mixes are measured on, and whose pictures
            int8 vision is calibrated with; by default the embedded one.
        clip_activations: percentile at which rounded activations are clipped; None clips nothing.
        force: replace a bundle that is there.
        vision_precision: of the vision graph, one of `precision.PRECISIONS`; by default the target's.
        vision_input: what the graph takes: "uint8", pictures as they are decoded, or "float32", normalised pixels.
        engine: one of ENGINES: what becomes of an engine that is built ahead of time, where the target runs one.
        vision_weights, tokenizer: where the checkpoint itself has none.
        golden: suite whose lines become the golden ones.
        golden_lines: how many; by default all (1000 at most), or 4 for a model of more than 10⁹ weights.
        budget: drift budget; by default the one that ships.

    Raises:
        InputError, CheckpointError: something given is not what it should be; nothing is written.
        MachineError: a library, the network, memory or disk space is missing; nothing is written.
    """
    chosen = scheme_named(scheme or target.scheme)
    check_choices(chosen, method, rotation, clip_activations)
    _check_mix(chosen, bits, sensitivity)
    precision = checked_precision(target, vision_precision)
    engine = checked_engine(target, engine, precision)
    allowed, stored_as = read_budget(budget), chosen.name if bits is None else MIXED
    allowed.limits_of(stored_as, target=target.name)  # refused before any work
    lines = read_suite(golden)
    _require_torch()
    if chosen.code_format != "int":
        from .quantize.bitsandbytes_codes import load_bitsandbytes

        load_bitsandbytes()
    from .model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source, vision_weights=vision_weights, tokenizer=tokenizer)
    config = checkpoint.config
    limits = allowed.limits_of(stored_as, None if config.vision is None else precision, target.name)
    recipe, kept = uniform_recipe(config.mamba, chosen, method, ROTATIONS[rotation])
    recipe = msgspec.structs.replace(recipe, activation_percentile=clip_activations)
    if bits is not None:
        recipe, kept = msgspec.structs.replace(recipe, method=method), {}
        require_reachable(config.mamba, recipe, bits)
        recipe = of_tensors(recipe, smallest_mix(config.mamba, recipe))  # until the best one is found
    plan = plan_memory(config, recipe, target, precision)
    suffix = f"-{method}" if recipe.method not in ("none", "rtn") else ""
    suffix += "-rotated" if recipe.rotations else ""
    stored = chosen.name if bits is None else f"{MIXED}-{bits:.2f}"
    directory = out or Path("bundles") / f"{config.model_id}-{target.name}-{stored}{suffix}"
    check_goal(directory, force=force)
    codec = TextCodec.open(checkpoint.tokenizer_file(), config.mamba.vocab)
    small = config.mamba.n_parameters < _SMALL
    asked = _golden_suite(golden, spread(lines, golden_lines or _GOLDEN_LINES[0 if small else 1]), codec, config)
    needed = plan.decoder_bytes + plan.vision_bytes + _WRITING_MARGIN_BYTES
    needed += plan.vision_bytes if engine != "none" else 0  # whole first, where weights are left out too
    needed += 0 if bits is None else int(min(bits, 16) * matrix_weights(config.mamba) / 8)
    mix = None

    with staged_directory(directory, force=force, needed_bytes=needed) as stage:
        digest = hashed(checkpoint)
        sights = [golden.parent / name for name in asked.pictures]
        graph, embeddings = write_vision(checkpoint, sights, stage, precision, vision_input, calibration or CALIBRATION)
        engines = {} if graph is None else build_engine_ahead(stage, precision, target, engine)
        with statistics_for(checkpoint, digest, recipe, statistics, calibration, directory) as found:
            recipe = recipe if found is None else msgspec.structs.replace(recipe, statistics=found.fingerprint())
            if bits is not None:
                recipe, mix = find_mix(checkpoint, digest, recipe, found, calibration, bits, sensitivity)
            with progress() as bar:
                _write_decoder(checkpoint, recipe, stage, bar, found)
        with progress() as bar:
            floor = _write_golden(checkpoint, asked, embeddings, codec, stage, bar)
            _write_text(checkpoint, codec, stage)
            draft = _draft(checkpoint, digest, recipe, target, stage, graph, engines)
            draft = msgspec.structs.replace(draft, noise_floor=floor)
            del checkpoint  # its memory-mapped pages count as ours, and the runtime is about to need room
            drift = _measure(Bundle(stage, draft), len(asked.lines), bar)
        manifest = _seal(stage, draft, drift, target)
    figures = {name: Figure(value) for name, value in drift.measures.items()}
    return Exported(directory, manifest, kept, judge(figures, limits, floor), mix)


def check_choices(scheme: Scheme, method: str, rotation: str, clip_activations: float | None) -> None:
    """Raise InputError for choices that are unknown, or that do not go together."""
    if rotation not in ROTATIONS:
        raise InputError(f"unknown rotation {rotation!r}{near_matches(rotation, ROTATIONS)}")
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}{near_matches(method, METHODS)}")
    if scheme.code_format != "int" and (method != "rtn" or clip_activations is not None):
        raise InputError(f"{scheme.name}: its codes are bitsandbytes' own; leave --method and --clip-activations out")
    if scheme.group_size is None and clip_activations is not None:
        raise InputError(f"{scheme.name}: no activation is rounded, so none can be clipped; leave --clip-activations out")
    if clip_activations is not None and method.startswith("awq"):
        raise InputError(
            "--clip-activations: percentiles are of inputs without AWQ's scales; take another method, or clip nothing"
        )


def _check_mix(scheme: Scheme, bits: float | None, sensitivity: Path | None) -> None:
    """Raise InputError for a mix that cannot be."""
    if bits is None and sensitivity is not None:
        raise InputError("--sensitivity is for mixes of schemes; give their budget too, such as --bits 4.0")
    if bits is not None and scheme.code_format != "int":
        raise InputError(
            f"--bits mixes schemes of ours, not {scheme.name}; take one whose name ends as activations shall, such as w4a8"
        )


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
        source=Source(checkpoint.source_id, digest),
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


def _require_torch() -> None:
    try:
        import onnx  # noqa: F401 - only whether they are there
        import onnxscript  # noqa: F401
        import timm  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise MachineError(f"export needs {error.name}; install it with: pip install 'cobra-edge[export]'") from error


def _write_decoder(checkpoint: Any, recipe: Any, stage: Path, bar: Any, statistics: Statistics | None) -> None:
    from .model.config import decoder_shapes
    from .quantize.decoder_file import write_decoder
    from .quantize.methods import scaled_matrices

    config = checkpoint.config.mamba
    total = len(decoder_shapes(config)) + len(scaled_matrices(config, recipe))
    task = bar.add_task(f"decoder as {recipe.scheme}", total=total)
    write_decoder(checkpoint, recipe, stage / DECODER, lambda: bar.advance(task), statistics)


def _golden_suite(file: Path, lines: list[Line], codec: TextCodec, config: CobraConfig) -> AskedSuite:
    """Return the golden lines as the model reads them, those of a picture together."""
    together = sorted(lines, key=lambda line: line.image or "")
    template, sees = PromptTemplate(config.prompt_style), config.vision is not None
    numbered = list(enumerate(together, 1))
    return asked_suite(file.name, numbered, file.parent.joinpath, codec, template, sees=sees, skipped={})


def _write_golden(
    checkpoint: Any, asked: AskedSuite, embeddings: np.ndarray, codec: TextCodec, stage: Path, bar: Any
) -> dict[str, dict[str, float]]:
    """Run the golden lines through the float model and write what it says; returns its noise floor in 16 bits."""
    from .regress.float_reference import NARROW, batches
    from .regress.golden import write_golden
    from .regress.noise_floor import golden_readings, noise_floor

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
    from .regress.drift import measure_drift
    from .session import Session

    task = bar.add_task("drift of the finished bundle", total=n_lines)
    vision = None
    if bundle.manifest.vision is not None:
        from .vision.graph.emulation import open_emulated

        vision = open_emulated(bundle.path(VISION), bundle.manifest.model, bundle.manifest.vision)
    return measure_drift(Session(bundle, vision=vision), lambda: bar.advance(task))


def _require_finite_drift(drift: Drift) -> None:
    odd = [name for name, value in drift.measures.items() if not math.isfinite(value)]
    if odd:
        raise DriftError(
            f"the drift is not finite ({', '.join(odd)}): the quantized decoder overflows where the float one does not; "
            "nothing was written, take more bits"
        )
