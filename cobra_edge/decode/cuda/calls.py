"""Calls of the CUDA driver, through NVIDIA's cuda-bindings: every failure is a MachineError that says what was being done.

Importable anywhere; cuda-bindings is looked for when it is needed.
"""

from __future__ import annotations

from typing import Any

from ...errors import DeviceLostError, MachineError

OUT_OF_MEMORY = 2
NO_DEVICE = 100
# What a module is refused with that was made for other GPUs or by a newer compiler, or that is damaged.
# Uncorrectable memory error, illegal address, launch timeout, destroyed context, assertion, faults of a kernel, launch failure:
# cuda.h says of each that the process must be relaunched.
_CONTEXT_LOST = {214, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719}
_BAD_IMAGE = {200, 209, 218, 221, 222, 223}


class CudaError(MachineError):
    """The driver refused.

    Attributes:
        code: of the driver, a CUresult.
        name: of that code.
    """

    def __init__(self, doing: str, code: int, name: str) -> None:
        """Say what was being done, what came of it, and what helps; where memory is lacking callers know more."""
        self.code, self.name = code, name
        advice = "close what else is on the GPU" if self.lacks_memory else "look at nvidia-smi or dmesg, and start again"
        super().__init__(f"{doing} failed on the GPU ({name}): {advice}")

    @property
    def lacks_memory(self) -> bool:
        """Whether it is memory that the GPU lacks."""
        return self.code == OUT_OF_MEMORY

    @property
    def refuses_image(self) -> bool:
        """Whether it is compiled kernels that the driver does not take."""
        return self.code in _BAD_IMAGE


class GpuLostError(CudaError, DeviceLostError):
    """The context is lost: every further call of this process fails with the same code."""


def driver() -> Any:
    """Return cuda-bindings' module of the driver. Raises MachineError where it cannot be imported."""
    try:
        from cuda.bindings import driver as bindings
    except (ImportError, OSError, RuntimeError) as error:
        raise MachineError(f"cuda-bindings cannot be used ({error}); install it again") from error
    return bindings


def call(doing: str, name: str, *arguments: Any) -> Any:
    """Call the driver.

    Args:
        doing: begins the message, such as "copying weights".
        name: of the call, such as "cuMemAlloc".
        arguments: of the call.

    Returns:
        What it returned behind its error code: one value, several as a tuple, or None.

    Raises:
        CudaError: the driver refused. MachineError: it has no such call.
    """
    bindings = driver()
    try:
        error, *values = getattr(bindings, name)(*arguments)
    except RuntimeError as missing:  # cuda-bindings' way to say that the driver lacks a call
        raise MachineError(
            f"{doing}: the NVIDIA driver is too old, it has no {name} ({missing}); update the driver"
        ) from missing
    if int(error) != 0:
        raise refusal(doing, error)
    return None if not values else values[0] if len(values) == 1 else tuple(values)


def refusal(doing: str, error: Any) -> CudaError:
    """Return what an error code of the driver, a CUresult, is told as; see `call`."""
    told, text = driver().cuGetErrorName(error)
    kind = GpuLostError if int(error) in _CONTEXT_LOST else CudaError
    return kind(doing, int(error), text.decode(errors="replace") if int(told) == 0 else f"CUDA error {int(error)}")
