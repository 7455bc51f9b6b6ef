"""The plan of an export: every option, file and size is checked before any work.

Nothing here writes, but for images that are drawn into the user's cache. Errors that would otherwise appear after minutes are
found first: a file of another model, options without effect, encoders that do not fit, a suite that cannot be read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..bundle.manifest import MemoryPlan
from ..bundle.reader import check_goal
from ..environment.requirements import require_export
from ..errors import InputError
from ..formats.method import recipe_method
from ..formats.model_config import CobraConfig
from ..formats.precision import InputForm, PrecisionName
from ..formats.recipe import (
    MIXED,
    ROTATIONS,
    Recipe,
    activations_of,
    matrix_bits,
    matrix_weights,
    require_hadamard,
    uniform_recipe,
)
from ..formats.scheme import Scheme, scheme_named
from ..formats.targets import Target
from ..inputs.text import TextCodec
from ..model.checkpoint_hash import hashed
from ..quantize.bit_allocation import least_bits, require_reachable, smallest_allocation
from ..quantize.sensitivity import Sensitivity, of_tensors, read_sensitivity
from ..quantize.statistics import Statistics, read_header, read_statistics
from ..regress.budget import Budget, Limits, read_budget
from ..suite.line_set import LineSet
from ..suite.reader import HELDOUT
from ..terminal.output import tell
from .checks import check_allocation, check_calibration, check_choices, check_text_only, reads_lines
from .lines import (
    affordable,
    calibration_and_golden,
    check_answerable,
    drawn_lines,
    golden_lines,
    require_judgeable,
    tokenized_lines,
)
from .memory_plan import plan_memory
from .options import Choice, ExportOptions, choose
from .vision import checked_engine, checked_precision

if TYPE_CHECKING:
    from ..model.checkpoint import Checkpoint

_WRITING_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """An export whose options, files and sizes were checked.

    Attributes:
        options: as given.
        choice: how the decoder is quantized.
        source: as given: "mini", a name on the hub, or a directory.
        digest: hash of the checkpoint.
        target: device profile.
        recipe: of the decoder; for bit allocation the smallest one, until bits are allocated.
        kept_float: reasons why matrices stay float16, by name.
        budget: drift budget.
        stored_as: the scheme that the budget's limits are of.
        precision, vision_input, engine: of the vision graph, defaults resolved.
        directory: of the bundle.
        needed_bytes: disk space.
        codec: tokenizer.
        calibration: lines to calibrate on, some without answers; None for the embedded set.
        golden: golden lines, ordered by image, some without answers.
        statistics, sensitivity: from the given files, verified to be of this checkpoint.
    """

    options: ExportOptions
    choice: Choice
    source: str
    digest: str
    target: Target
    recipe: Recipe
    kept_float: dict[str, str]
    budget: Budget
    stored_as: str
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

    def limits(self, precision: PrecisionName | None) -> Limits:
        """Return the drift limits by measure, with a vision graph in a precision or without one."""
        return self.budget.limits_of(self.stored_as, precision, self.target.name)


def plan_export(source: str, target: Target, out: Path | None, options: ExportOptions) -> tuple[Checkpoint, ExportPlan]:
    """Check everything that an export can be refused for, cheap checks first.

    Args:
        source: "mini", a name on the hub, or a directory (see `open_checkpoint`).
        target: device profile.
        out: directory of the bundle; by default bundles/MODEL-TARGET-QUALITY; scheme, method and -rotated if flags chose.
        options: of the export.

    Returns:
        The opened checkpoint and the plan.

    Raises:
        InputError, CheckpointError: invalid input, or an option without effect.
        MachineError: a library, the network or memory is missing.
    """
    o, choice = options, choose(options, target)
    precision = _checked(target, o, choice)
    engine = checked_engine(target, o.engine, precision)
    budget, stored_as = read_budget(o.budget), choice.scheme if choice.bits is None else MIXED
    budget.limits_of(stored_as, target=target.name)
    calibration, golden = calibration_and_golden(
        o.calibration, o.golden, needs_images=o.vision_precision == "int8", skip_bad=o.skip_bad
    )
    checkpoint = open_planned(source, o, choice)
    config = checkpoint.config
    engine = engine if config.vision is not None else "none"
    choice, recipe, kept = _recipe(config, choice, o)
    memory = plan_memory(config, recipe, target, precision, unallocated_bytes=_unallocated_bytes(config, recipe, choice))
    directory = out or Path("bundles") / _name(config, target, recipe, choice)
    check_goal(directory, force=o.force)
    reads = reads_lines(choice.method, choice.bits, o.clip_activations, o.statistics)
    calibration, golden = _with_drawn(calibration, golden, config, calibrates=reads or precision == "int8")
    codec = TextCodec.open(checkpoint.tokenizer_file(), config.mamba.vocab)
    method = recipe_method(recipe.method)
    if calibration is not None:
        calibration = affordable(calibration, config, gradients=method.needs_gradients, quiet=not reads)
    in_minutes = not (method.needs_gradients or method.needs_statistics)
    golden = golden_lines(golden, o.golden_lines, config, in_minutes=in_minutes)
    sees = None if config.vision is None else precision
    require_judgeable(golden, budget.limits_of(stored_as, sees, target.name), config)
    for lines in filter(None, (golden, calibration)):
        check_answerable(lines, config)
        tokenized_lines(lines, codec, config, answered=False)
    digest = hashed(checkpoint)
    plan = ExportPlan(
        options=o,
        choice=choice,
        source=source,
        digest=digest,
        target=target,
        recipe=recipe,
        kept_float=kept,
        budget=budget,
        stored_as=stored_as,
        precision=precision,
        vision_input=o.vision_input or "uint8",
        engine=engine,
        directory=directory,
        needed_bytes=_needed_bytes(memory, choice, engine),
        codec=codec,
        calibration=calibration,
        golden=golden,
        statistics=None if o.statistics is None else read_statistics(o.statistics, config, digest),
        sensitivity=None if o.sensitivity is None else read_sensitivity(o.sensitivity, config.mamba, digest, recipe),
    )
    return checkpoint, plan


def _with_drawn(
    calibration: LineSet | None, golden: LineSet | None, config: CobraConfig, *, calibrates: bool
) -> tuple[LineSet | None, LineSet]:
    """Return the lines to calibrate on, and those that golden lines are chosen from: drawn ones where a user gave none.

    Without either the embedded sets are used, for models that take no larger images.
    """
    missing = golden is None or (calibration is None and calibrates)
    drawn = drawn_lines(config, quiet=calibration is not None) if missing else None
    if drawn is None:
        return calibration, golden or LineSet.of_suite(HELDOUT)
    to_read, held_out = drawn.divided()
    return calibration or to_read, golden or held_out


def open_planned(source: str, o: ExportOptions, choice: Choice) -> Checkpoint:
    """Open the checkpoint and find its vision encoders; refuse vision options of a text-only model."""
    _require_libraries(scheme_named(choice.scheme))
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


def _unallocated_bytes(config: CobraConfig, recipe: Recipe, choice: Choice) -> int:
    """Return by how much the decoder may grow when bits are allocated; `recipe` is the smallest one."""
    if choice.bits is None:
        return 0
    spent, weights = sum(matrix_bits(config.mamba, recipe).values()), matrix_weights(config.mamba)
    return int(max(0, min(choice.bits, 16) * weights - spent) / 8)


def _needed_bytes(memory: MemoryPlan, choice: Choice, engine: str) -> int:
    """Return the disk space that the export needs."""
    needed = memory.decoder_bytes + memory.vision_bytes + _WRITING_MARGIN_BYTES
    needed += memory.vision_bytes if engine != "none" else 0  # stripped engines are written with their weights first
    return needed + (0 if choice.bits is None else memory.decoder_bytes)  # parts that are kept for resuming


def _checked(target: Target, o: ExportOptions, choice: Choice) -> PrecisionName:
    """Check what needs no checkpoint, options and readable data; return the graph's precision."""
    check_allocation(o.scheme, choice, o.activations, o.sensitivity)
    check_choices(scheme_named(choice.scheme), choice.method, choice.rotation, o.clip_activations)
    precision = checked_precision(target, o.vision_precision)
    int8 = precision == "int8"
    used = choice.bits is not None or int8
    check_calibration(choice.method, o.clip_activations, o.statistics, o.calibration, otherwise_used=used)
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


def _recipe(config: CobraConfig, choice: Choice, o: ExportOptions) -> tuple[Choice, Recipe, dict[str, str]]:
    """Return the choice, the recipe and why matrices stay float16; for bit allocation the smallest recipe.

    What no flag gave and this model cannot have is replaced, and said. Raises InputError for what a flag gave.
    """
    choice = _possible_rotation(config, choice)
    scheme, rotations = scheme_named(choice.scheme), ROTATIONS[choice.rotation]
    bits = choice.bits
    if bits is None:
        recipe, kept = uniform_recipe(config.mamba, scheme, choice.method, rotations)
        return choice, msgspec.structs.replace(recipe, activation_percentile=o.clip_activations), kept
    activations = o.activations or activations_of(scheme)
    clipped = o.clip_activations
    recipe = Recipe(MIXED, choice.method, {}, None, rotations, activations, clipped)  # type: ignore[arg-type] # of the table
    least = least_bits(config.mamba, recipe)
    if bits < least and "bits" in choice.implied:
        tell(f"this model needs {least:.3g} bits per weight; {bits:g} of the target are not possible")
        choice = replace(choice, bits=least)
    else:
        require_reachable(config.mamba, recipe, bits)
    return choice, of_tensors(recipe, smallest_allocation(config.mamba, recipe)), {}


def _possible_rotation(config: CobraConfig, choice: Choice) -> Choice:
    try:
        require_hadamard(config.mamba, ROTATIONS[choice.rotation])
    except InputError as error:
        if "rotation" not in choice.implied:
            raise
        tell(f"{error}: done, it is not rotated")
        return replace(choice, rotation="none")
    return choice


def _name(config: CobraConfig, target: Target, recipe: Recipe, choice: Choice) -> str:
    start = f"{config.model_id}-{target.name}"
    if choice.is_plain:
        return f"{start}-{choice.quality}"
    stored = recipe.scheme if choice.bits is None else f"{MIXED}-{choice.bits:.2f}"
    suffix = "" if choice.method == "rtn" else f"-{choice.method}"
    suffix += "-rotated" if recipe.rotations else ""
    return f"{start}-{stored}{suffix}"
