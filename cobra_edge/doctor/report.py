"""The report: all checks of a machine, and of a bundle on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec.structs import replace

from ..bundle.reader import Bundle
from ..environment.source_commit import source_commit
from ..version import __version__
from .bundle import BundleReport, check_bundle
from .check import Check
from .gpu import GpuCheck, check_gpu
from .host import CacheCheck, MemoryCheck, ProcessorCheck, check_cache, check_memory, check_processor
from .installation import platform_text
from .jetson import JetsonCheck, check_jetson
from .libraries import LibrariesCheck, check_libraries
from .vision import RuntimeCheck, check_onnxruntime, check_tensorrt, check_tensorrt_rtx


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`cobra-edge doctor`: an installation, the checks of its machine, and those of a bundle if one was given."""

    version: str
    commit: str | None
    platform: str
    processor: ProcessorCheck
    memory: MemoryCheck
    gpu: GpuCheck
    jetson: JetsonCheck | None
    onnxruntime: RuntimeCheck
    tensorrt: RuntimeCheck
    tensorrt_rtx: RuntimeCheck
    libraries: LibrariesCheck
    cache: CacheCheck
    bundle: BundleReport | None

    @property
    def runs(self) -> bool:
        """Whether the bundle runs here; True without one."""
        return self.bundle is None or all(check.verdict != "missing" for _, check in checks(self.bundle))


def examine(directory: Path | None) -> Report:
    """Check this machine, and a bundle on it if its directory is given; takes some seconds.

    Raises:
        BundleError: the bundle is incomplete or altered.
        MachineError: its decoder failed.
    """
    bundle = None if directory is None else Bundle.open(directory)  # refused before seconds of measuring
    report = Report(
        version=__version__,
        commit=source_commit(),
        platform=platform_text(),
        processor=check_processor(),
        memory=check_memory(),
        gpu=check_gpu(),
        jetson=check_jetson(),
        onnxruntime=check_onnxruntime(),
        tensorrt=check_tensorrt(),
        tensorrt_rtx=check_tensorrt_rtx(),
        libraries=check_libraries(),
        cache=check_cache(),
        bundle=None,
    )
    if bundle is None:
        return report
    bandwidths = {"cpu": report.memory.read_bytes_per_s, "cuda": report.gpu.copy_bytes_per_s}
    return replace(report, bundle=check_bundle(bundle, bandwidths, {check.text for _, check in checks(report)}))


def checks(report: Report | BundleReport) -> Iterator[tuple[str, Check]]:
    """Yield the checks of a report in order, each with a readable name."""
    for name in report.__struct_fields__:
        value = getattr(report, name)
        if isinstance(value, Check):
            yield _NAMES.get(name, name), value


_NAMES = {"gpu": "GPU", "jetson": "Jetson", "tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
