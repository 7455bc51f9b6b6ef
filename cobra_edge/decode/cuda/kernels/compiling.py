"""Compile recorded launches for a GPU that is not here, and say what it would make of them.

Triton compiles for a GPU it is told of; only loading needs the GPU itself. Types and specialisation (a pointer that 16
divides, an integer that is 1) are left to Triton's own launcher, which is stopped before it loads anything.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ....errors import InputError, MachineError
from ....terminal.suggestions import near_matches
from .launch import Launch

_WARP = 32
_KIB = 1024
_REGISTERS_PER_THREAD = 255
_REGISTERS_PER_MULTIPROCESSOR = 65536
_REGISTER_UNIT = 256  # a warp's registers are given out in such portions
# Compute capability -> the most shared memory that one block may ask for, in bytes.
# Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_LIMITS = {
    "8.0": 163 * _KIB,
    "8.6": 99 * _KIB,
    "8.7": 163 * _KIB,
    "8.9": 99 * _KIB,
    "9.0": 227 * _KIB,
    "12.0": 99 * _KIB,
}
CAPABILITIES = tuple(SHARED_LIMITS)


@dataclass(frozen=True)
class Compiled:
    """One kernel as a kind of GPU would run it.

    Attributes:
        kernel: its name.
        types: of its arguments, as Triton writes them.
        constants: its constexpr parameters, and Triton's own options such as num_warps.
        capability: compute capability of the GPU, such as "8.7".
        registers: of a thread.
        shared_bytes: of a block.
        spilled_bytes: of a thread: what found no register and lies in the GPU's memory.
        num_warps: of a block.
        launches: how many of the launches given run it.
    """

    kernel: str
    types: tuple[str, ...]
    constants: dict[str, Any]
    capability: str
    registers: int
    shared_bytes: int
    spilled_bytes: int
    num_warps: int
    launches: int


def compile_launches(launches: Sequence[Launch], capability: str, told: Callable[[], None] = lambda: None) -> list[Compiled]:
    """Compile what was recorded, each kernel once for the types, specialisations and constants it is launched with.

    Args:
        launches: of `launch.recording`; their tensors may be on torch's "meta" device.
        capability: of the GPU, one of CAPABILITIES.
        told: called after each launch.

    Raises:
        InputError: an unknown capability, or kernels are interpreted. MachineError: Triton refuses a kernel.
    """
    if capability not in SHARED_LIMITS:
        raise InputError(f"unknown compute capability {capability!r}{near_matches(capability, SHARED_LIMITS)}")
    found: dict[str, Compiled] = {}
    with _gpu(capability):
        for launch in launches:
            binary = _binary(launch, capability)
            seen = found.get(binary.hash)
            found[binary.hash] = (
                _described(launch, binary, capability) if seen is None else replace(seen, launches=seen.launches + 1)
            )
            told()
    return list(found.values())


def why_not(compiled: Compiled) -> str | None:
    """Say why a GPU of that compute capability could not run a kernel, or None."""
    limit = SHARED_LIMITS[compiled.capability]
    if compiled.shared_bytes > limit:
        return f"{compiled.shared_bytes} bytes of shared memory, a block has {limit}"
    if compiled.registers > _REGISTERS_PER_THREAD:
        return f"{compiled.registers} registers a thread, it has {_REGISTERS_PER_THREAD}"
    a_warp = -(-compiled.registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    if a_warp * compiled.num_warps > _REGISTERS_PER_MULTIPROCESSOR:
        return f"{a_warp * compiled.num_warps} registers a block, a multiprocessor has {_REGISTERS_PER_MULTIPROCESSOR}"
    return None


class _AbsentGpu:
    """All that Triton asks of a driver before it loads something; the same in Triton 3.5, 3.6 and 3.9."""

    def __init__(self, capability: str) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self._capability.replace(".", "")), _WARP)

    def get_current_device(self) -> str:
        """Return a name no GPU has: Triton keeps what it compiled by it."""
        return f"compute capability {self._capability}"

    def get_current_stream(self, _device: str) -> int:
        return 0


@contextmanager
def _gpu(capability: str) -> Iterator[None]:
    """Have Triton compile for such a GPU; afterwards it finds out anew what is here."""
    driver.set_active(_AbsentGpu(capability))
    try:
        yield
    finally:
        driver.set_active(None)


def _binary(launch: Launch, capability: str) -> Any:
    """Return Triton's CompiledKernel, from its cache where it was compiled before."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise InputError(
            f"{kernel.__name__} is interpreted and cannot be compiled; unset TRITON_INTERPRET before Python starts"
        )
    try:
        return kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants)
    except Exception as error:  # of many types: its front end, its passes and ptxas each have their own
        sizes = ", ".join(f"{k}={v}" for k, v in launch.constants.items())
        raise MachineError(f"Triton cannot compile {kernel.__name__}({sizes}) for {capability}: {error}") from error


def _described(launch: Launch, binary: Any, capability: str) -> Compiled:
    used = _resources(binary.asm["cubin"])
    return Compiled(
        kernel=launch.kernel.__name__,
        types=tuple(str(t) for t in binary.src.signature.values() if t != "constexpr"),
        constants=dict(launch.constants),
        capability=capability,
        registers=used["REG"],
        shared_bytes=binary.metadata.shared,
        spilled_bytes=used["STACK"] + used["LOCAL"],
        num_warps=binary.metadata.num_warps,
        launches=1,
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """Return what cuobjdump, which comes with Triton, reads from a binary of one kernel: REG, STACK, LOCAL and others."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", done.stdout)}
    if done.returncode or not {"REG", "STACK", "LOCAL"} <= used.keys():
        said = done.stderr.strip() or "nothing"
        raise MachineError(f"{command[0]} does not say what a kernel takes; it said: {said}")
    return used
