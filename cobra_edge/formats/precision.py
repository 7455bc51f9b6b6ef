"""In which numbers a vision graph computes, and what it takes: a table."""

from __future__ import annotations

from typing import Literal

import msgspec

from ..errors import InputError
from ..terminal.suggestions import near_matches

PrecisionName = Literal["fp32", "fp16", "bf16", "int8"]
InputForm = Literal["float32", "uint8"]


class Precision(msgspec.Struct, frozen=True):
    """One row.

    Attributes:
        name: as given to --vision-precision.
        bits: a weight takes.
        relative_rms_max: how far the graph may be from the torch model in float32, at each encoder and at the projector, before
            an export refuses to write it. Three roundings to bf16's eight digits are 4e-3 for a projector alone; int8 is
            judged by the drift of the answers, and this only tells a broken graph.
        capability_min: the oldest CUDA compute capability that multiplies in it.
    """

    name: PrecisionName
    bits: int
    relative_rms_max: float
    capability_min: tuple[int, int] | None = None


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp32", 32, 1e-4),
        Precision("fp16", 16, 5e-3, (5, 3)),
        Precision("bf16", 16, 2e-2, (8, 0)),
        Precision("int8", 8, 0.3, (7, 2)),
    )
}


def precision_named(name: str) -> Precision:
    """Return a row of the table. Raises InputError with near matches."""
    if name not in PRECISIONS:
        raise InputError(f"unknown vision precision {name!r}{near_matches(name, PRECISIONS)}")
    return PRECISIONS[name]


def capability_number(capability: str) -> tuple[int, int]:
    """Return a compute capability such as "8.6" as numbers, which can be compared."""
    major, _, minor = capability.partition(".")
    return int(major), int(minor)


def why_no_gpu_of(capability: str, precision: Precision, gpu: str) -> str | None:
    """Return why a GPU of a compute capability does not multiply in a precision, or None where it does; `gpu` names it."""
    needed = precision.capability_min
    if needed is None or capability_number(capability) >= needed:
        return None
    least = f"{needed[0]}.{needed[1]}"
    return f"{precision.name} needs a GPU of compute capability {least} or later, {gpu} has {capability}; take fp16"
