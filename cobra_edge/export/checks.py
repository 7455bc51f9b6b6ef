"""Which options of an export go together: combinations that are impossible or have no effect are refused before any work."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..formats.method import METHODS, method_named, recipe_method
from ..formats.recipe import ROTATIONS
from ..formats.scheme import Scheme
from ..terminal.suggestions import near_matches
from .options import Choice


def needs_statistics(method: str, clip_activations: float | None) -> bool:
    """Tell whether a method, as a recipe names it, or clipping needs calibration statistics."""
    return recipe_method(method).needs_statistics or clip_activations is not None


def reads_lines(method: str, bits: float | None, clip_activations: float | None, statistics: object) -> bool:
    """Tell whether an export reads calibration lines, not their images alone; `statistics`: given ones, or None."""
    collects = needs_statistics(method, clip_activations) and statistics is None
    return collects or bits is not None or recipe_method(method).needs_gradients


def check_choices(scheme: Scheme, method: str, rotation: str, clip_activations: float | None) -> None:
    """Raise InputError for unknown names and for options that exclude each other."""
    if rotation not in ROTATIONS:
        raise InputError(f"unknown rotation {rotation!r}{near_matches(rotation, ROTATIONS)}")
    chosen = method_named(method)
    if scheme.code_format != "int" and (method != "rtn" or clip_activations is not None):
        raise InputError(f"{scheme.name}: bitsandbytes makes its codes; omit --method and --clip-activations")
    if scheme.group_size is None and clip_activations is not None:
        raise InputError(f"{scheme.name}: activations are not rounded, so they cannot be clipped; omit --clip-activations")
    if scheme.group_size is None and method != "rtn":
        raise InputError(f"{scheme.name}: weights stay float16, so no method applies; omit --method {method}")
    if clip_activations is not None and chosen.scales_inputs:
        raise InputError(
            f"--clip-activations: percentiles are of inputs without AWQ's scales; omit it, or use another method than {method}"
        )


def check_allocation(scheme: str | None, choice: Choice, activations: str | None, sensitivity: Path | None) -> None:
    """Raise InputError for options of bit allocation where no bits are allocated, and for --scheme with --bits.

    Args:
        scheme, activations, sensitivity: as given.
        choice: of the method and the bits.
    """
    if sensitivity is not None and method_named(choice.method).needs_gradients:
        raise InputError(
            f"--sensitivity: method {choice.method} allocates bits by costs of its own; omit it, or use --method gptq"
        )
    if choice.bits is None and sensitivity is not None:
        raise InputError("--sensitivity is for bit allocation; give a budget too, such as --bits 4.0")
    if choice.bits is None and activations is not None:
        raise InputError("--activations applies to --bits only; a scheme's name includes its activations: w4a8 rounds to int8")
    if choice.bits is not None and scheme is not None:
        raise InputError(
            f"--scheme {scheme} stores every matrix in one format, --bits allocates several; give one of the two. With --bits, "
            "--activations sets the activations"
        )


def check_calibration(
    method: str,
    clip_activations: float | None,
    statistics: Path | None,
    calibration: Path | None,
    *,
    otherwise_used: bool,
) -> None:
    """Raise InputError for statistics or calibration data that would have no effect.

    Args:
        method, clip_activations: as in `needs_statistics`.
        statistics: --statistics.
        calibration: --calibration.
        otherwise_used: whether bit allocation or an int8 vision graph uses the calibration data.
    """
    needed = needs_statistics(method, clip_activations)
    guided = recipe_method(method).needs_gradients
    if statistics is not None and guided and not needed:
        raise InputError(
            f"--statistics {statistics}: method {method} collects gradients itself, with --calibration; omit it, or "
            "use --quality balanced"
        )
    if statistics is not None and not needed:
        users = ", ".join(m.name for m in METHODS.values() if m.needs_statistics)
        raise InputError(
            f"--statistics {statistics}: method {method} uses no statistics; omit it, or use --method {users} or "
            "--clip-activations"
        )
    if calibration is not None and not (otherwise_used or guided) and (not needed or statistics is not None):
        why = "--statistics is given" if needed else f"method {method} uses no statistics"
        raise InputError(
            f"--calibration {calibration}: nothing is calibrated, {why}; it is for methods that use statistics, for --bits and "
            "for --vision-precision int8"
        )


def check_text_only(model_id: str, **given: object) -> None:
    """Raise InputError for vision options of a text-only model, given by name; None means not given."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if names:
        raise InputError(f"{model_id} is a text-only model without vision; omit {', '.join(names)}")
