"""The plan of an export: every option, file and size is checked before any work.

Nothing here writes. Errors that would otherwise appear after minutes are found first: a file of another model, options without
effect, encoders that do not fit, a suite that cannot be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from ..bundle.manifest import MemoryPlan
from ..bundle.reader import check_goal
from ..environment.requirements import require_export
from ..errors import InputError
from ..formats.method import recipe_method
from ..formats.model_config import CobraConfig
from ..formats.precision import InputForm, PrecisionName
from ..formats.recipe import MIXED, ROTATIONS, Recipe, matrix_weights, uniform_recipe
from ..formats.scheme import Scheme, scheme_named
from ..formats.targets import Target
from ..inputs.text import TextCodec
from ..model.checkpoint_hash import hashed
from ..quantize.bit_allocation import require_reachable, smallest_allocation
from ..quantize.sensitivity import Sensitivity, of_tensors, read_sensitivity
from ..quantize.statistics import Statistics, read_header, read_statistics
from ..regress.budget import Limit, read_budget
from ..suite.line_set import LineSet
from .checks import check_allocation, check_calibration, check_choices, check_text_only
from .lines import affordable, calibration_and_golden, check_answerable, golden_lines, tokenized_lines
from .memory_plan import plan_memory
from .vision import checked_engine, checked_precision

if TYPE_CHECKING:
    from ..model.checkpoint import Checkpoint

_WRITING_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        scheme: weight format; None for the target's.
        method: quantization method, a name of `method.METHODS`.
        rotation: one of `recipe.ROTATIONS`: "out-proj" rotates out_proj's input, "residual" the residual stream.
        bits: budget of bits per weight for bit allocation; None stores every matrix by `scheme`.
        activations: activations of a bit allocation; None for those of the target's scheme.
        sensitivity: file of `sensitivity` for this checkpoint; None measures it now if bits are allocated.
        statistics: file of `calibrate` for this checkpoint, for methods that need statistics.
        calibration: folder of images, or suite, for new statistics, for bit allocation and for int8 vision; None for the
            embedded set.
        skip_bad: leave out images and lines of `calibration` that cannot be read.
        clip_activations: percentile at which rounded activations are clipped; None does not clip.
        force: replace an existing bundle.
        vision_precision: of the vision graph, one of `precision.PRECISIONS`; None for the target's.
        vision_input: input of the graph: "uint8" (default), decoded images, or "float32", normalised pixels.
        engine: one of ENGINES: how to build an engine ahead of time, if the target runs one.
        vision_weights, tokenizer: for checkpoints that have none.
        golden: suite of the golden lines; None for held-out images of `calibration`, or else for the embedded suite.
        golden_lines: how many; None for all (1000 at most), or 4 for a model of more than 10⁹ weights.
        budget: drift budget; None for the embedded one.
        device: "cpu", or "cuda" to collect statistics on a GPU.
    """

    scheme: str | None = None
    method: str = "rtn"
    rotation: str = "none"
    bits: float | None = None
    activations: Literal["float32", "int8"] | None = None
    sensitivity: Path | None = None
    statistics: Path | None = None
    calibration: Path | None = None
    skip_bad: bool = False
    clip_activations: float | None = None
    force: bool = False
    vision_precision: str | None = None
    vision_input: InputForm | None = None
    engine: str = "auto"
    vision_weights: Path | None = None
    tokenizer: Path | None = None
    golden: Path | None = None
    golden_lines: int | None = None
    budget: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """An export whose options, files and sizes were checked.

    Attributes:
        options: as given.
        digest: hash of the checkpoint.
        target: device profile.
        recipe: of the decoder; for bit allocation the smallest one, until bits are allocated.
        kept_float: reasons why matrices stay float16, by name.
        limits: drift limits by measure.
        precision, vision_input, engine: of the vision graph, defaults resolved.
        directory: of the bundle.
        needed_bytes: disk space.
        codec: tokenizer.
        calibration: lines to calibrate on, some without answers; None for the embedded set.
        golden: golden lines, ordered by image, some without answers.
        statistics, sensitivity: from the given files, verified to be of this checkpoint.
    """

    options: ExportOptions
    digest: str
    target: Target
    recipe: Recipe
    kept_float: dict[str, str]
    limits: dict[str, Limit]
    precision: PrecisionName
    vision_input: InputForm
    engine: str
    directory: Path
    needed_bytes: int
    codec: TextCodec
    calibration: LineSet | None
    golden: LineSet
    statistics: Statistics | None
    sensitivity: Sensitivity | None


def plan_export(source: str, target: Target, out: Path | None, options: ExportOptions) -> tuple[Checkpoint, ExportPlan]:
    """Check everything that an export can be refused for, cheap checks first.

    Args:
        source: "mini", a name on the hub, or a directory (see `open_checkpoint`).
        target: device profile.
        out: directory of the bundle; by default bundles/MODEL-TARGET-SCHEME, plus the method and -rotated if they apply.
        options: of the export.

    Returns:
        The opened checkpoint and the plan.

    Raises:
        InputError, CheckpointError: invalid input, or an option without effect.
        MachineError: a library, the network or memory is missing.
    """
    o = options
    precision = _checked(target, o)
    engine = checked_engine(target, o.engine, precision)
    budget, stored_as = read_budget(o.budget), MIXED if o.bits is not None else o.scheme or target.scheme
    budget.limits_of(stored_as, target=target.name)
    calibration, golden = calibration_and_golden(o.calibration, o.golden, precision, skip_bad=o.skip_bad)
    checkpoint = _open_checkpoint(source, target, o)
    config = checkpoint.config
    engine = engine if config.vision is not None else "none"
    recipe, kept = _recipe(config, target, o)
    memory = plan_memory(config, recipe, target, precision)
    directory = out or Path("bundles") / _name(config, target, recipe, o)
    check_goal(directory, force=o.force)
    codec = TextCodec.open(checkpoint.tokenizer_file(), config.mamba.vocab)
    if calibration is not None and not all(line.answer for line in calibration.lines):
        calibration = affordable(calibration, config)
    golden = golden_lines(golden, o.golden_lines, config)
    for lines in filter(None, (golden, calibration)):
        check_answerable(lines, config)
        tokenized_lines(lines, codec, config, answered=False)
    digest = hashed(checkpoint)
    plan = ExportPlan(
        options=o,
        digest=digest,
        target=target,
        recipe=recipe,
        kept_float=kept,
        limits=dict(budget.limits_of(stored_as, None if config.vision is None else precision, target.name)),
        precision=precision,
        vision_input=o.vision_input or "uint8",
        engine=engine,
        directory=directory,
        needed_bytes=_needed_bytes(memory, config, o, engine),
        codec=codec,
        calibration=calibration,
        golden=golden,
        statistics=None if o.statistics is None else read_statistics(o.statistics, config, digest),
        sensitivity=None if o.sensitivity is None else read_sensitivity(o.sensitivity, config.mamba, digest, recipe),
    )
    return checkpoint, plan


def _open_checkpoint(source: str, target: Target, o: ExportOptions) -> Checkpoint:
    """Open the checkpoint and find its vision encoders; refuse vision options of a text-only model."""
    _require_libraries(scheme_named(o.scheme or target.scheme))
    from ..model.checkpoint import open_checkpoint
    from ..model.torch_device import torch_device
    from ..model.vision import check_tower

    torch_device(o.device)
    checkpoint = open_checkpoint(source, vision_weights=o.vision_weights, tokenizer=o.tokenizer)
    config = checkpoint.config
    if config.vision is None:
        given = {name: getattr(o, name) for name in ("vision_precision", "vision_input", "vision_weights")}
        check_text_only(config.model_id, engine=None if o.engine == "auto" else o.engine, **given)
    else:
        check_tower(config.vision, checkpoint.vision_weights, checkpoint.tower)
    return checkpoint


def _needed_bytes(memory: MemoryPlan, config: CobraConfig, o: ExportOptions, engine: str) -> int:
    """Return the disk space that the export needs."""
    needed = memory.decoder_bytes + memory.vision_bytes + _WRITING_MARGIN_BYTES
    needed += memory.vision_bytes if engine != "none" else 0  # stripped engines are written with their weights first
    return needed + (0 if o.bits is None else int(min(o.bits, 16) * matrix_weights(config.mamba) / 8))


def _checked(target: Target, o: ExportOptions) -> PrecisionName:
    """Check what needs no checkpoint, options and readable data; return the graph's precision."""
    check_allocation(o.scheme, o.bits, o.activations, o.sensitivity, o.method)
    check_choices(scheme_named(o.scheme or target.scheme), o.method, o.rotation, o.clip_activations)
    precision = checked_precision(target, o.vision_precision)
    int8 = precision == "int8"
    used = o.bits is not None or int8
    check_calibration(o.method, o.clip_activations, o.statistics, o.calibration, otherwise_used=used)
    if o.statistics is not None:
        read_header(o.statistics)
    if o.skip_bad and o.calibration is None:
        raise InputError("--skip-bad is for images and lines of --calibration; omit it")
    return precision


def _require_libraries(scheme: Scheme) -> None:
    require_export("export", "onnx", "onnxscript", "timm", "torch")
    if scheme.code_format != "int":
        from ..formats.bitsandbytes_codes import load_bitsandbytes

        load_bitsandbytes()


def _recipe(config: CobraConfig, target: Target, o: ExportOptions) -> tuple[Recipe, dict[str, str]]:
    """Return the recipe and why matrices stay float16; for bit allocation the smallest one, which the budget must allow."""
    recipe, kept = uniform_recipe(config.mamba, scheme_named(o.scheme or target.scheme), o.method, ROTATIONS[o.rotation])
    recipe = msgspec.structs.replace(recipe, activation_percentile=o.clip_activations)
    if o.bits is None:
        return recipe, kept
    recipe = msgspec.structs.replace(recipe, method=o.method, activations=o.activations or recipe.activations)
    require_reachable(config.mamba, recipe, o.bits)
    return of_tensors(recipe, smallest_allocation(config.mamba, recipe)), {}


def _name(config: CobraConfig, target: Target, recipe: Recipe, o: ExportOptions) -> str:
    stored = recipe.scheme if o.bits is None else f"{MIXED}-{o.bits:.2f}"
    suffix = f"-{o.method}" if recipe_method(recipe.method).needs_statistics else ""
    suffix += "-rotated" if recipe.rotations else ""
    return f"{config.model_id}-{target.name}-{stored}{suffix}"
