"""Which options of an export go together: what cannot be, and what would do nothing, is refused before any work."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..formats.recipe import METHODS, ROTATIONS
from ..formats.scheme import Scheme
from ..terminal.suggestions import near_matches


def needs_statistics(method: str, clip_activations: float | None) -> bool:
    """Tell whether a recipe looks at activations."""
    return method not in ("none", "rtn") or clip_activations is not None


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
    if scheme.group_size is None and method != "rtn":
        raise InputError(f"{scheme.name}: weights stay float16, no method chooses codes; leave --method {method} out")
    if clip_activations is not None and method.startswith("awq"):
        raise InputError(
            "--clip-activations: percentiles are of inputs without AWQ's scales; take another method, or clip nothing"
        )


def check_allocation(scheme: str | None, bits: float | None, activations: str | None, sensitivity: Path | None) -> None:
    """Raise InputError for options of a mix where none is wanted, and for a scheme where one is."""
    if bits is None and sensitivity is not None:
        raise InputError("--sensitivity is for mixes of schemes; give their budget too, such as --bits 4.0")
    if bits is None and activations is not None:
        raise InputError("--activations is for mixes, which --bits makes; a scheme says it by its name: w4a8 rounds to int8")
    if bits is not None and scheme is not None:
        raise InputError(
            f"--scheme {scheme} is one format for every matrix, --bits mixes several: give one of the two; what enters the "
            "products of a mix is said by --activations"
        )


def check_calibration(
    method: str,
    clip_activations: float | None,
    statistics: Path | None,
    calibration: Path | None,
    *,
    otherwise_used: bool,
) -> None:
    """Raise InputError for statistics, or data to take them of, that nothing would look at.

    Args:
        method, clip_activations: as `needs_statistics`.
        statistics: file that was given.
        calibration: data that was given.
        otherwise_used: whether a mix or an int8 vision graph looks at the data.
    """
    needed = needs_statistics(method, clip_activations)
    if statistics is not None and not needed:
        raise InputError(
            f"--statistics {statistics}: method {method} looks at no activations; leave it out, or take --method "
            f"{', '.join(m for m in METHODS if needs_statistics(m, None))} or --clip-activations"
        )
    if calibration is not None and not otherwise_used and (not needed or statistics is not None):
        why = "the statistics are given" if needed else f"method {method} looks at no activations"
        raise InputError(
            f"--calibration {calibration}: nothing is calibrated, {why}; it is for methods that look at activations, for "
            "--bits and for --vision-precision int8"
        )


def check_text_only(model_id: str, **given: object) -> None:
    """Raise InputError for options of vision, by their names, where the model has none; those that are None were not given."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if names:
        raise InputError(f"{model_id} is a text-only model, it has no vision; leave {', '.join(names)} out")
