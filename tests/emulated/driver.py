"""The fake driver in this process: the real cuda-bindings on the emulated GPU."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import lzma
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from .build import compiled
from .real_gpu import RealDriver, is_wanted, real_gpu

# name; compute capability; total and free bytes; multiprocessors; whether memory is the host's; the driver's newest CUDA
ORIN_NANO = "Orin;8.7;7990000000;6000000000;8;1;12060"
RTX_4090 = "NVIDIA GeForce RTX 4090;8.9;25757220864;25000000000;16;0;13000"


class FakeDriver:
    """Calls that a test makes of the fake driver itself; loaded once in a process, and unplugged between tests."""

    def __init__(self, kind: str = "fast") -> None:
        """Load it, so that whoever asks for libcuda.so.1 gets it."""
        self._library = ctypes.CDLL(str(compiled(kind)))
        for name in ("fake_in_use", "fake_peak", "fake_pinned", "fake_handles"):
            getattr(self._library, name).restype = ctypes.c_ulonglong
        for name in ("fake_calls", "fake_launches"):
            getattr(self._library, name).restype = ctypes.c_long
        for name in ("fake_last_call", "fake_failed_call", "fake_last_error"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def plug_in(self, gpu: str = RTX_4090) -> None:
        """Have this GPU from now on, new and empty; "" for none. Whatever was allocated before is gone."""
        from cobra_edge.decode.cuda.device import first_gpu

        first_gpu.cache_clear()
        self._library.fake_gpu(gpu.encode())

    def fail(self, nth: int, code: int, name: str = "") -> None:
        """Have the nth call from now on, or the nth of that name, return an error; 0 for none."""
        self._library.fake_fail(name.encode(), ctypes.c_long(nth), code)

    def refuse_modules(self, code: int) -> None:
        """Have every module refused with an error; 0 for none."""
        self._library.fake_module_error(code)

    def run_no_kernels(self) -> None:
        """Have kernels do nothing until a GPU is plugged in again: for tests of the host alone."""
        self._library.fake_runs_kernels(0)

    def seed(self, seed: int) -> None:
        """Set the order of threads."""
        self._library.fake_seed(ctypes.c_ulonglong(seed))

    @property
    def in_use(self) -> int:
        """Bytes of device memory that are allocated."""
        return int(self._library.fake_in_use())

    @property
    def pinned(self) -> int:
        """Bytes of the host's memory that are pinned."""
        return int(self._library.fake_pinned())

    @property
    def peak(self) -> int:
        """The most that was allocated at once."""
        return int(self._library.fake_peak())

    @property
    def handles(self) -> int:
        """How many blocks, streams, graphs and modules there are."""
        return int(self._library.fake_handles())

    @property
    def calls(self) -> int:
        """How many calls were made since the GPU was plugged in."""
        return int(self._library.fake_calls())

    @property
    def launches(self) -> int:
        """How many kernels were run since then."""
        return int(self._library.fake_launches())

    @property
    def last_call(self) -> str:
        """The name of the newest call."""
        return bytes(self._library.fake_last_call()).decode()

    @property
    def failed_call(self) -> str:
        """The name of the call that failed as it was told to."""
        return bytes(self._library.fake_failed_call()).decode()

    @property
    def last_error(self) -> str:
        """What a kernel did wrong."""
        return bytes(self._library.fake_last_error()).decode()


def write_kernels(file: Path, names: tuple[str, ...] = ("sm_80", "sm_87", "sm_89", "compute_80")) -> Path:
    """Write a file of kernels that the fake driver takes: it looks at none of them."""
    images = [f"the fake driver runs {name} from the sources".encode() for name in names]
    entries = [
        {
            "name": name,
            "kind": "ptx" if name.startswith("compute") else "cubin",
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "ptx_version": "8.5" if name.startswith("compute") else "",
        }
        for name, data in zip(names, images, strict=True)
    ]
    index = json.dumps({"format": 1, "sources": "", "images": entries}).encode()
    file.write_bytes(lzma.compress(b"CobraGPU" + struct.pack("<I", len(index)) + index + b"".join(images)))
    return file


@cache
def _fake_driver() -> FakeDriver:
    return FakeDriver()


@contextmanager
def plugged_in(directory: Path) -> Iterator[FakeDriver | RealDriver]:
    """Plug an emulated GPU in, with kernels installed in a directory; unplugged afterwards. Or take this machine's GPU."""
    if is_wanted():
        real_gpu()
        yield RealDriver()
        gc.collect()
        return
    from cobra_edge.decode.cuda import library
    from cobra_edge.decode.cuda.calls import call

    kernels, driver = write_kernels(directory / "kernels.xz"), _fake_driver()
    before = driver.calls
    call("asking for the driver's version", "cuDriverGetVersion")
    if driver.calls == before:
        pytest.skip("an NVIDIA driver is loaded in this process: the fake one cannot stand in for it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "kernels_file", lambda: kernels)
        driver.plug_in()
        yield driver
    gc.collect()
    driver.plug_in("")
