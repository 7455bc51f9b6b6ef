"""What an export is going to do: every option, file and size checked in one step, before the first stage begins.

Nothing here writes. What takes minutes is refused before it begins: a file of another model, options that do nothing, encoders
that do not fit, a suite that cannot be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from ..bundle.memory_plan import plan_memory
from ..bundle.reader import check_goal
from ..environment.requirements import require_export
from ..errors import InputError
from ..formats.model_config import CobraConfig
from ..formats.precision import InputForm, PrecisionName
from ..formats.recipe import MIXED, ROTATIONS, Recipe, matrix_weights, uniform_recipe
from ..formats.scheme import Scheme, scheme_named
from ..formats.targets import Target
from ..inputs.text import PromptTemplate, TextCodec
from ..model.checkpoint_hash import hashed
from ..quantize.bit_allocation import require_reachable, smallest_mix
from ..quantize.sensitivity import Sensitivity, of_tensors, read_sensitivity
from ..quantize.statistics import Statistics, read_header, read_statistics
from ..regress.budget import Limit, read_budget
from ..suite.line import Line
from ..suite.reader import CALIBRATION, HELDOUT, pictures_of, read_suite, spread
from ..suite.tokenized import AskedSuite, asked_suite
from .checks import check_calibration, check_choices, check_mix, check_text_only
from .vision import checked_engine, checked_precision

if TYPE_CHECKING:
    from ..model.checkpoint import Checkpoint

_SMALL = 10**9  # below this many weights the float reference is quick, and more golden lines are affordable
_GOLDEN_LINES = (1000, 4)
_WRITING_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        scheme: by default the target's.
        method: how codes are chosen, one of `recipe.METHODS`.
        rotation: one of `recipe.ROTATIONS`: "out-proj" has out_proj's input rotated, "residual" the residual stream.
        bits: budget a weight, for the best mix of schemes, in place of a scheme.
        activations: what enters the products of a mix; by default as in the target's scheme.
        sensitivity: what `sensitivity` wrote of this checkpoint; None scans now where a mix is wanted.
        statistics: what `calibrate` wrote of this checkpoint, for methods that look at activations.
        calibration: a suite that statistics are taken of where none are given, that mixes are measured on, and whose pictures
            int8 vision is calibrated with; by default the embedded one.
        clip_activations: percentile at which rounded activations are clipped; None clips nothing.
        force: replace a bundle that is there.
        vision_precision: of the vision graph, one of `precision.PRECISIONS`; by default the target's.
        vision_input: what the graph takes: "uint8", pictures as they are decoded and the default, or "float32", normalised.
        engine: one of ENGINES: what becomes of an engine that is built ahead of time, where the target runs one.
        vision_weights, tokenizer: where the checkpoint itself has none.
        golden: suite whose lines become the golden ones.
        golden_lines: how many; by default all (1000 at most), or 4 for a model of more than 10⁹ weights.
        budget: drift budget; by default the one that ships.
        device: "cpu", or "cuda" to take statistics on a GPU.
    """

    scheme: str | None = None
    method: str = "rtn"
    rotation: str = "none"
    bits: float | None = None
    activations: Literal["float32", "int8"] | None = None
    sensitivity: Path | None = None
    statistics: Path | None = None
    calibration: Path | None = None
    clip_activations: float | None = None
    force: bool = False
    vision_precision: str | None = None
    vision_input: InputForm | None = None
    engine: str = "auto"
    vision_weights: Path | None = None
    tokenizer: Path | None = None
    golden: Path = HELDOUT
    golden_lines: int | None = None
    budget: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """An export that may begin.

    Attributes:
        options: what was asked for.
        digest: its hash.
        target: what to export for.
        recipe: of the decoder; of a mix the smallest, until the best is found.
        kept_float: why some matrices stay float16, by name.
        limits: drift limits by measure.
        precision, vision_input, engine: of the vision graph, as they will be.
        directory: where the bundle goes.
        needed_bytes: of disk.
        codec: the tokenizer.
        asked: golden lines as the model reads them.
        statistics, sensitivity: those that were given, of this very checkpoint.
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
    asked: AskedSuite
    statistics: Statistics | None
    sensitivity: Sensitivity | None

    @property
    def calibration(self) -> Path:
        """The suite that is calibrated with."""
        return self.options.calibration or CALIBRATION


def plan_export(source: str, target: Target, out: Path | None, options: ExportOptions) -> tuple[Checkpoint, ExportPlan]:
    """Check everything that an export can be refused for, cheap things first.

    Args:
        source: "mini", a name of the hub, or a directory (see `open_checkpoint`).
        target: what to export for.
        out: the bundle's directory; by default bundles/MODEL-TARGET-SCHEME, with -rotated where it is.
        options: how.

    Returns:
        The opened checkpoint, whose encoders were found, and the plan.

    Raises:
        InputError, CheckpointError: something given is not what it should be, or would do nothing.
        MachineError: a library, the network or memory is missing.
    """
    o = options
    precision = _checked(target, o)
    engine = checked_engine(target, o.engine, precision)
    allowed, stored_as = read_budget(o.budget), MIXED if o.bits is not None else o.scheme or target.scheme
    allowed.limits_of(stored_as, target=target.name)
    lines = read_suite(o.golden)
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
        engine = "none"
    else:
        check_tower(config.vision, checkpoint.vision_weights, checkpoint.tower)
    recipe, kept = _recipe(config, target, o)
    memory = plan_memory(config, recipe, target, precision)
    directory = out or Path("bundles") / _name(config, target, recipe, o)
    check_goal(directory, force=o.force)
    codec = TextCodec.open(checkpoint.tokenizer_file(), config.mamba.vocab)
    small = config.mamba.n_parameters < _SMALL
    asked = _golden_suite(o.golden, spread(lines, o.golden_lines or _GOLDEN_LINES[0 if small else 1]), codec, config)
    needed = memory.decoder_bytes + memory.vision_bytes + _WRITING_MARGIN_BYTES
    needed += memory.vision_bytes if engine != "none" else 0  # whole first, where weights are left out too
    needed += 0 if o.bits is None else int(min(o.bits, 16) * matrix_weights(config.mamba) / 8)
    digest = hashed(checkpoint)
    plan = ExportPlan(
        options=o,
        digest=digest,
        target=target,
        recipe=recipe,
        kept_float=kept,
        limits=dict(allowed.limits_of(stored_as, None if config.vision is None else precision, target.name)),
        precision=precision,
        vision_input=o.vision_input or "uint8",
        engine=engine,
        directory=directory,
        needed_bytes=needed,
        codec=codec,
        asked=asked,
        statistics=None if o.statistics is None else read_statistics(o.statistics, config, digest),
        sensitivity=None if o.sensitivity is None else read_sensitivity(o.sensitivity, config.mamba, digest, recipe),
    )
    return checkpoint, plan


def _checked(target: Target, o: ExportOptions) -> PrecisionName:
    """Check what needs no checkpoint: choices that go together, data that can be read; returns the graph's precision."""
    check_mix(o.scheme, o.bits, o.activations, o.sensitivity)
    check_choices(scheme_named(o.scheme or target.scheme), o.method, o.rotation, o.clip_activations)
    precision = checked_precision(target, o.vision_precision)
    int8 = precision == "int8"
    used = o.bits is not None or int8
    check_calibration(o.method, o.clip_activations, o.statistics, o.calibration, otherwise_used=used)
    if o.statistics is not None:
        read_header(o.statistics)
    if o.calibration is not None:
        read_suite(o.calibration)
    if int8 and not pictures_of(o.calibration or CALIBRATION):
        raise InputError(f"{o.calibration}: int8 vision is calibrated on pictures, the suite has none; give one that has")
    return precision


def _require_libraries(scheme: Scheme) -> None:
    require_export("export", "onnx", "onnxscript", "timm", "torch")
    if scheme.code_format != "int":
        from ..formats.bitsandbytes_codes import load_bitsandbytes

        load_bitsandbytes()


def _recipe(config: CobraConfig, target: Target, o: ExportOptions) -> tuple[Recipe, dict[str, str]]:
    """Return the recipe, and why some matrices stay float16; of a mix the smallest there is, which its budget must allow."""
    recipe, kept = uniform_recipe(config.mamba, scheme_named(o.scheme or target.scheme), o.method, ROTATIONS[o.rotation])
    recipe = msgspec.structs.replace(recipe, activation_percentile=o.clip_activations)
    if o.bits is None:
        return recipe, kept
    recipe = msgspec.structs.replace(recipe, method=o.method, activations=o.activations or recipe.activations)
    require_reachable(config.mamba, recipe, o.bits)
    return of_tensors(recipe, smallest_mix(config.mamba, recipe)), {}


def _name(config: CobraConfig, target: Target, recipe: Recipe, o: ExportOptions) -> str:
    stored = recipe.scheme if o.bits is None else f"{MIXED}-{o.bits:.2f}"
    suffix = f"-{o.method}" if recipe.method not in ("none", "rtn") else ""
    suffix += "-rotated" if recipe.rotations else ""
    return f"{config.model_id}-{target.name}-{stored}{suffix}"


def _golden_suite(file: Path, lines: list[Line], codec: TextCodec, config: CobraConfig) -> AskedSuite:
    """Return the golden lines as the model reads them, those of a picture together."""
    together = sorted(lines, key=lambda line: line.image or "")
    template, sees = PromptTemplate(config.prompt_style), config.vision is not None
    numbered = list(enumerate(together, 1))
    return asked_suite(file.name, numbered, file.parent.joinpath, codec, template, sees=sees, skipped={})
