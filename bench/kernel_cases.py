"""The CUDA decoder's kernels at full size: what each takes of every kind of GPU, and on a GPU that is here how long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from cobra_edge.decode.cuda.kernels.compiling import Compiled, compile_launches, why_not
from cobra_edge.decode.cuda.kernels.launch import Launch
from cobra_edge.decode.cuda.state import GpuState
from cobra_edge.decode.cuda.weights import GpuWeights, hollow
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.formats.recipe import uniform_recipe
from cobra_edge.formats.scheme import scheme_named

from .launches import launch_counts, recorded

# A thread that keeps a few values in the GPU's memory loses little: they stay in its first cache. Beyond that a kernel is cut
# wrongly for that GPU.
MOST_SPILLED_BYTES = 64
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


def recorded_shape(mamba: MambaConfig, scheme: str, rotations: tuple[str, ...] = ()) -> dict[str, list[Launch]]:
    """Return what a decoder of a shape launches, as `launches.recorded` does; it takes no memory and no GPU.

    Raises:
        InputError: an unknown scheme, or one that does not fit the shape.
    """
    recipe, _ = uniform_recipe(mamba, scheme_named(scheme), rotations=rotations)
    meta = torch.device("meta")
    return recorded(GpuWeights.of(hollow(mamba, recipe), meta), GpuState.blank(mamba, meta, None))


def compiled_rows(parts: dict[str, list[Launch]], capability: str, told: Callable[[], None]) -> list[dict[str, Any]]:
    """Compile what was recorded for one kind of GPU; returns a row a kernel as results keep it.

    Args:
        parts: of `recorded_shape`.
        capability: such as "8.7".
        told: called after each launch.

    Raises:
        InputError: kernels are interpreted, or an unknown capability. MachineError: Triton refuses a kernel.
    """
    launches = [launch for part in parts.values() for launch in part]
    return [_row(compiled) for compiled in compile_launches(launches, capability, told)]


def _row(compiled: Compiled) -> dict[str, Any]:
    return asdict(compiled) | {"types": list(compiled.types), "refused": refused(compiled)}


def refused(compiled: Compiled) -> str | None:
    """Say why a kernel is not fit for that kind of GPU: it would not run, or spills more than MOST_SPILLED_BYTES. Or None."""
    reason = why_not(compiled)
    if reason is None and compiled.spilled_bytes > MOST_SPILLED_BYTES:
        return f"{compiled.spilled_bytes} bytes a thread spilled, {MOST_SPILLED_BYTES} are allowed"
    return reason


def counts(parts: dict[str, list[Launch]]) -> dict[str, dict[str, int]]:
    """Return how often each kernel is launched in each part."""
    return {part: launch_counts(launches) for part, launches in parts.items()}


def sizes_text(constants: dict[str, Any], names: Iterable[str] = ()) -> str:
    """Write a kernel's constants, Triton's own options last; only those named, where some are."""
    wanted = set(names) or constants.keys()
    ordered = sorted((k for k in constants if k in wanted), key=lambda k: (k in _OPTIONS, list(constants).index(k)))
    return " ".join(f"{k}={constants[k]}" for k in ordered)


def alike(launches: Sequence[Launch]) -> list[list[Launch]]:
    """Return launches in groups that differ in nothing but the layer: kernel, constants, and shapes are the same."""
    groups: dict[Any, list[Launch]] = {}
    for launch in launches:
        shapes = tuple((tuple(a.shape), a.stride(), a.dtype) for a in launch.arguments if isinstance(a, torch.Tensor))
        key = (launch.kernel.__name__, tuple(launch.constants.items()), shapes)
        groups.setdefault(key, []).append(launch)
    return list(groups.values())
