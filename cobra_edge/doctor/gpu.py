"""Checks of the GPU: what the CUDA decoder needs, and its memory bandwidth."""

from __future__ import annotations

from msgspec.structs import replace

from ..decode.cuda.device import first_gpu, why_no_gpu
from ..environment.nvidia_driver import driver_cuda, driver_release, why_no_driver
from ..errors import MachineError
from .check import Check


class GpuCheck(Check, frozen=True, kw_only=True):
    """The first NVIDIA GPU.

    Attributes:
        driver: release of the driver, such as "540.4.0".
        driver_cuda: the newest CUDA that it knows, such as "12.6".
        name: of the GPU.
        compute_capability: such as "8.7".
        multiprocessors: how many it has.
        total_bytes, free_bytes: its memory; of a Jetson the machine's.
        copy_bytes_per_s: memory bandwidth of a copy, bytes read and written.
    """

    driver: str | None = None
    driver_cuda: str | None = None
    name: str | None = None
    compute_capability: str | None = None
    multiprocessors: int | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    copy_bytes_per_s: float | None = None


def check_gpu() -> GpuCheck:
    """Check whether the CUDA decoder runs on a GPU here: driver, bindings, compute capability, kernels; measure its memory."""
    reason = why_no_driver()
    if reason is not None:
        return GpuCheck(verdict="missing", text=reason)
    known = driver_cuda()
    found = GpuCheck(text="", driver=driver_release(), driver_cuda=None if known is None else "{}.{}".format(*known))
    try:
        reason = why_no_gpu()
        return _measured(found) if reason is None else replace(found, verdict="missing", text=reason)
    except MachineError as error:
        return replace(found, verdict="missing", text=str(error))


def _measured(found: GpuCheck) -> GpuCheck:
    """Load the kernels and measure. Raises MachineError where the driver takes none of them, or the memory fails."""
    from ..bench.gpu import Gpu, GpuMemory

    gpu = first_gpu()
    gpu.load()
    free, total = gpu.memory()
    speed = GpuMemory(Gpu()).read_bandwidth()
    text = (
        f"{gpu.title}, driver {found.driver or 'of unknown release'} (CUDA {found.driver_cuda or 'unknown'}); "
        f"{free / 1e9:.1f} of {total / 1e9:.1f} GB available, {speed / 1e9:,.0f} GB/s of copy bandwidth"
    )
    return replace(
        found,
        text=text,
        name=gpu.name,
        compute_capability="{}.{}".format(*gpu.capability),
        multiprocessors=gpu.multiprocessors,
        total_bytes=total,
        free_bytes=free,
        copy_bytes_per_s=speed,
    )
