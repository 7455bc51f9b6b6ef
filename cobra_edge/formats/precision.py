"""Table of the vision graph's precisions, and its input forms."""

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
        bits: per weight.
        relative_rms_max: limit of the graph's relative RMS error against the float32 torch model, at each encoder and at the
            projector, beyond which an export fails. Three roundings to bf16's eight bits give 4e-3 for a projector alone. For
            int8 the drift of the answers decides; this limit only detects a broken graph.
        capability_min: the oldest CUDA compute capability that supports it.
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
    """Return a compute capability such as "8.6" as a comparable tuple."""
    major, _, minor = capability.partition(".")
    return int(major), int(minor)


def why_no_gpu_of(capability: str, precision: Precision, gpu: str) -> str | None:
    """Return why a GPU of a compute capability does not support a precision, or None if it does; `gpu` is its name."""
    needed = precision.capability_min
    if needed is None or capability_number(capability) >= needed:
        return None
    least = f"{needed[0]}.{needed[1]}"
    return f"{precision.name} needs a GPU of compute capability {least} or later, {gpu} has {capability}; use fp16"
