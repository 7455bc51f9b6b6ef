"""Device profiles, read from export/targets/*.toml: a new device is a new file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from ..errors import InputError
from ..files.parsing import ParseError, parse_toml
from ..terminal.suggestions import near_matches
from .package_data import export_data
from .precision import Precision, PrecisionName, why_no_gpu_of


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device profile.

    Attributes:
        name: as given to --target; the file's name.
        title: readable name of the device.
        family: a shorter name that stands for one profile of several, such as "jetson"; `default_of` marks which.
        compute_capability: CUDA compute capability such as "8.7"; None for a CPU, or if it differs from GPU to GPU.
        memory_gb: memory for the system and the model, in 10⁹ bytes; None if it depends on the machine.
        memory_bandwidth_gb_s: 10⁹ bytes per second, from the data sheet; None if it depends on the machine.
        multiprocessors: of the GPU, from the data sheet; None for a CPU.
        system_gb: memory used by the system and other programs: of the GPU where it has its own. An assumption.
        vision_runtime, decoder_runtime: the runtimes used there.
        scheme: the default scheme; its activations are those of a bit allocation too.
        bits: the default budget of a bit allocation, bits per weight.
        vision_precision: the default precision of the vision graph's matmuls.
        default_of: the family this profile is the default of, or None.
    """

    name: str
    title: str
    family: str
    vision_runtime: str
    decoder_runtime: str
    scheme: str
    bits: float
    system_gb: float
    vision_precision: PrecisionName
    compute_capability: str | None = None
    memory_gb: float | None = None
    memory_bandwidth_gb_s: float | None = None
    multiprocessors: int | None = None
    default_of: str | None = None


def read_toml(file: Path, kind: type[Any]) -> Any:
    """Read one of our TOML files into a struct; unknown keys are refused.

    Raises:
        InputError: unreadable, or not a valid `kind`; the file and the key are named.
    """
    try:
        return msgspec.convert(parse_toml(file.read_bytes()), kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{file}: does not match the schema ({error})") from error
    except (OSError, ParseError) as error:
        raise InputError(f"{file}: {error}") from error


@cache
def targets() -> dict[str, Target]:
    """Return every profile by name."""
    return {t.name: t for f in sorted(export_data("targets").glob("*.toml")) for t in [read_toml(f, Target)]}


def target_named(name: str) -> Target:
    """Return the profile with a name or of a family. Raises InputError with near matches."""
    known = targets()
    families = {t.default_of: t for t in known.values() if t.default_of}
    if name in known:
        return known[name]
    if name in families:
        return families[name]
    raise InputError(f"unknown target {name!r}{near_matches(name, [*families, *known])}")


def why_not_precision(target: Target, precision: Precision) -> str | None:
    """Return why a target cannot run a vision graph of a precision; None if it can, or if its GPU is not known yet."""
    if target.compute_capability is None:
        if target.vision_runtime == "onnxruntime" and precision.name == "bf16":
            return "onnxruntime has no bfloat16 matmuls on a CPU; use fp32 or int8"
        return None
    return why_no_gpu_of(target.compute_capability, precision, target.title)
