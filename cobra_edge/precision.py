"""In which numbers a vision graph computes: a table, and which device can."""

from __future__ import annotations

from typing import Literal

import msgspec

from .errors import InputError, near_matches
from .targets import Target

PrecisionName = Literal["fp32", "fp16", "bf16", "int8"]
InputForm = Literal["float32", "uint8"]


class Precision(msgspec.Struct, frozen=True):
    """One row.

    Attributes:
        name: as given to --vision-precision.
        relative_rms_max: how far the graph may be from the torch model in float32, at each encoder and at the projector; None
            where the drift of the answers is the judge.
        capability_min: the oldest CUDA compute capability that multiplies in it.
    """

    name: PrecisionName
    relative_rms_max: float | None
    capability_min: tuple[int, int] | None = None


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp32", 1e-4),
        Precision("fp16", 5e-3, (5, 3)),
        Precision("bf16", 5e-3, (8, 0)),
        Precision("int8", None, (7, 2)),
    )
}
FLOAT_PRECISIONS = ("fp32", "fp16", "bf16")


def precision_named(name: str) -> Precision:
    """Return a row of the table. Raises InputError with near matches."""
    if name not in PRECISIONS:
        raise InputError(f"unknown vision precision {name!r}{near_matches(name, PRECISIONS)}")
    return PRECISIONS[name]


def why_not(precision: Precision, target: Target) -> str | None:
    """Return why a target cannot run a precision, or None where it can, or where its card is not known beforehand."""
    if target.compute_capability is None:
        if target.vision_runtime == "onnxruntime" and precision.name == "bf16":
            return "onnxruntime multiplies no bfloat16 on a processor; take fp32 or int8"
        return None
    major, _, minor = target.compute_capability.partition(".")
    needed = precision.capability_min
    if needed is not None and (int(major), int(minor)) < needed:
        return (
            f"{precision.name} needs a card of compute capability {needed[0]}.{needed[1]} or later, {target.title} has "
            f"{target.compute_capability}; take fp16"
        )
    return None
