"""The compiled kernels: one file that runtimes/cuda/compile.py writes when a wheel is built, and which part of it a GPU loads.

A cubin is machine code for one compute capability. On discrete GPUs it also runs on later minor versions of the same major
one; on a Jetson that is not promised, so sm_87 is in the file itself. PTX is translated by the driver, for any later GPU, if
the driver knows this version of PTX. Source: CUDA Compiler Driver documentation, "GPU Compilation"; CUDA for Tegra
application note, on compatibility.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from ...errors import MachineError

FILE = "kernels.xz"
_MAGIC = b"CobraGPU"
_FORMAT = 1
_MOST_BYTES = 256 << 20  # of the file as it is unpacked; it is some megabytes
_INDEX_BYTES = 64 << 10  # more than an index has
_NOT_BUILT = (
    "this installation has no CUDA kernels: it was built with -DCOBRA_CUDA=OFF; install it again without that option, "
    "or take --device cpu"
)
# The CUDA version that first knew a version of PTX, and the driver that came with it.
# Source: PTX ISA, "Release Notes"; CUDA Toolkit release notes, "CUDA driver".
_PTX_DRIVERS = {"8.4": "CUDA 12.4 (driver 550)", "8.5": "CUDA 12.5 (driver 555)"}
_CUBIN_DRIVER = "CUDA 12 (driver 525, JetPack 6)"

T = TypeVar("T")


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    kind: Literal["cubin", "ptx"]
    size: int
    sha256: str
    ptx_version: str = ""


class _Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    sources: str
    images: list[_Entry]


@dataclass(frozen=True, eq=False)
class Image:
    """What the driver loads as a module.

    Attributes:
        capability: the compute capability it was compiled for, such as (8, 7).
        kind: "cubin" or "ptx".
        data: its bytes; PTX ends in a NUL, as the driver wants it.
        ptx_version: of PTX, such as "8.5".
    """

    capability: tuple[int, int]
    kind: Literal["cubin", "ptx"]
    data: bytes
    ptx_version: str = ""

    def __str__(self) -> str:
        """Name it as compilers do."""
        major, minor = self.capability
        return f"{'sm' if self.kind == 'cubin' else 'compute'}_{major}{minor}"


class Refused(Exception):
    """A driver does not take an image; the text is the driver's reason."""


@dataclass(frozen=True, eq=False)
class KernelLibrary:
    """All images of a file.

    Attributes:
        images: in the file's order.
        sources: SHA-256 of what they were compiled from.
    """

    images: tuple[Image, ...]
    sources: str

    def candidates(self, capability: tuple[int, int], *, integrated: bool) -> tuple[Image, ...]:
        """Return the images that may run on a GPU, best first; none where it is older than all of them.

        Args:
            capability: the GPU's compute capability.
            integrated: whether it shares the machine's memory, as a Jetson's does.
        """
        exact = [i for i in self.images if i.kind == "cubin" and i.capability == capability]
        older: list[Image] = []
        if not integrated and not exact:
            # A Jetson's own minor version is no ancestor of a discrete GPU's.
            older = [
                i
                for i in self.images
                if i.kind == "cubin"
                and i.capability[0] == capability[0]
                and i.capability < capability
                and i.capability != (8, 7)
            ]
        ptx = [i for i in self.images if i.kind == "ptx" and i.capability <= capability]
        return (*exact, *sorted(older, key=lambda i: i.capability, reverse=True), *ptx)

    def load(self, capability: tuple[int, int], load: Callable[[Image], T], *, title: str, integrated: bool) -> T:
        """Return what `load` makes of the first image that the driver takes.

        Args:
            capability: the GPU's compute capability.
            load: hands an image to the driver; raises Refused where the driver does not take it.
            title: the GPU's name, for messages.
            integrated: as of `candidates`.

        Raises:
            MachineError: the GPU is too old, or the driver takes no image; the driver that is needed is named.
        """
        named = f"{title} (compute capability {capability[0]}.{capability[1]})"
        found = self.candidates(capability, integrated=integrated)
        if not found:
            least = min(i.capability for i in self.images)
            raise MachineError(
                f"{named} is too old: the CUDA kernels need compute capability {least[0]}.{least[1]} or later "
                "(Ampere: A100, RTX 30, Orin); take --device cpu"
            )
        reasons = []
        for image in found:
            try:
                return load(image)
            except Refused as error:
                reasons.append(f"{image}: {error}")
        needed = _CUBIN_DRIVER if found[0].kind == "cubin" else _PTX_DRIVERS.get(found[0].ptx_version, "a newer CUDA")
        raise MachineError(
            f"the NVIDIA driver takes none of the CUDA kernels for {named}: it has to know {needed} or later; update the "
            f"driver, or take --device cpu ({'; '.join(reasons)})"
        )


def kernels_file() -> Path | None:
    """Return where the file lies, beside this package or where an editable installation put it; None where there is none."""
    from .. import cuda

    places = [Path(place) / FILE for place in cuda.__path__]
    return next((place for place in places if place.is_file()), None)


def image_names(file: Path | None = None) -> tuple[str, ...]:
    """Return the images of the file of kernels, such as ("sm_80", …, "compute_80"), from its index alone.

    Args:
        file: None for this installation's own.

    Raises:
        MachineError: there is none, or its index is damaged.
    """
    file = file or kernels_file()
    if file is None:
        raise MachineError(_NOT_BUILT)
    with _reading(file):
        reader = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MOST_BYTES)
        return tuple(entry.name for entry in _index(_decompressed(reader, file.read_bytes(), _INDEX_BYTES))[0].images)


def why_no_kernels() -> str | None:
    """Return why this installation has no CUDA kernels, with what to do; None where it has. Reads nothing."""
    return None if kernels_file() is not None else _NOT_BUILT


def read_kernels(file: Path | None = None) -> KernelLibrary:
    """Read the file of kernels, each image checked against its hash.

    Args:
        file: None for this installation's own.

    Raises:
        MachineError: there is none, or it is damaged.
    """
    file = file or kernels_file()
    if file is None:
        raise MachineError(_NOT_BUILT)
    with _reading(file):
        return _parsed(_unpacked(file.read_bytes()))


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn errors of reading a file of kernels into a MachineError."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"the CUDA kernels cannot be read: {error}") from error
    except _Damaged as error:
        raise MachineError(f"the CUDA kernels are damaged: {file}: {error}; install cobra-edge again") from error


class _Damaged(Exception):
    """What is wrong with a file of kernels."""


def _decompressed(reader: lzma.LZMADecompressor, data: bytes, most_bytes: int) -> bytes:
    try:
        return reader.decompress(data, max_length=most_bytes)
    except lzma.LZMAError as error:
        raise _Damaged(f"it does not unpack ({error})") from error


def _unpacked(data: bytes) -> bytes:
    reader = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MOST_BYTES)
    plain = _decompressed(reader, data, _MOST_BYTES)
    if not reader.eof or reader.unused_data:
        raise _Damaged("it ends too early" if not reader.eof else "something lies behind its end")
    return plain


def _index(plain: bytes) -> tuple[_Index, int]:
    """Return the index, and where the images begin."""
    head = len(_MAGIC) + 4
    if plain[: len(_MAGIC)] != _MAGIC or len(plain) < head:
        raise _Damaged("it does not begin as one")
    (length,) = struct.unpack_from("<I", plain, len(_MAGIC))
    try:
        index = msgspec.json.decode(plain[head : head + length], type=_Index)
    except msgspec.DecodeError as error:
        raise _Damaged(f"its index is unreadable ({error})") from error
    if index.format != _FORMAT:
        raise _Damaged(f"it has format {index.format}, expected {_FORMAT}")
    return index, head + length


def _parsed(plain: bytes) -> KernelLibrary:
    index, at = _index(plain)
    images = []
    for entry in index.images:
        data = plain[at : at + max(entry.size, 0)]
        if entry.size <= 0 or len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise _Damaged(f"{entry.name[:40]} is not what it was compiled to")
        images.append(Image(_capability(entry.name), entry.kind, data, entry.ptx_version))
        at += entry.size
    if at != len(plain) or not images:
        raise _Damaged("its images and its index do not fit")
    return KernelLibrary(tuple(images), index.sources)


def _capability(name: str) -> tuple[int, int]:
    digits = name.rpartition("_")[2]
    if not (digits.isascii() and digits.isdecimal() and 2 <= len(digits) <= 3):
        raise _Damaged(f"{name[:40]!r} is no architecture")
    return int(digits[:-1]), int(digits[-1])
