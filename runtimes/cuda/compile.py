"""Compile the CUDA kernels with NVRTC and pack them into one file; neither a GPU nor a CUDA toolkit is needed.

    python runtimes/cuda/compile.py --output cobra_edge/decode/cuda/kernels.xz

CMake calls this when a wheel is built, in an environment that has the build requirements of pyproject.toml and nothing else.
Hence it imports nothing but the standard library. NVRTC and the headers come from the packages nvidia-cuda-nvrtc-cu12 and
nvidia-cuda-runtime-cu12. NVRTC 12.6 is the version whose cubins and PTX a JetPack 6 driver still loads.

The file is an xz stream: 8 bytes of magic, the length of the index (4 bytes, little endian), the index (JSON), the images one
after the other. cobra_edge/decode/cuda/library.py reads it. The same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import lzma
import os
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"CobraGPU"
FORMAT = 1
ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90")
PTX = "compute_80"
NVRTC = (12, 6)
SOURCES = Path(__file__).parent
# Instructions are 16 bytes, so what a byte is depends on its place among 16: what xz is told, for 2 % less.
_SASS = {"lc": 1, "lp": 3, "pb": 4}
_OPTIONS = ("--std=c++17", "-default-device", "--ptxas-options=-v")


class CompileError(Exception):
    """The kernels cannot be compiled here; the text says why and what to do."""


@dataclass(frozen=True)
class Image:
    """A compiled unit.

    Attributes:
        name: "sm_87" for a cubin, "compute_80" for PTX.
        data: its bytes.
        log: what the compiler said, registers and spills of each kernel among it.
    """

    name: str
    data: bytes
    log: str

    @property
    def kind(self) -> str:
        """What it is: "cubin" or "ptx"."""
        return "ptx" if self.name.startswith("compute_") else "cubin"


def source_files(folder: Path = SOURCES) -> list[Path]:
    """Return the files that kernels are made of, in order of their names."""
    return sorted([*folder.glob("*.cu"), *folder.glob("*.cuh")])


def unit(folder: Path = SOURCES) -> bytes:
    """Return the source that is compiled: all of a directory's .cu files as one unit, one cubin an architecture."""
    return "".join(f'#include "{file.name}"\n' for file in source_files(folder) if file.suffix == ".cu").encode()


def sources_hash(folder: Path = SOURCES) -> str:
    """Return the SHA-256 of names and contents of all sources: what tells a stale file of kernels."""
    digest = hashlib.sha256()
    for file in source_files(folder):
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _package_folder(module: str, package: str) -> Path:
    """Return the directory of one of NVIDIA's packages, which have no code to import."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise CompileError(
            f"the CUDA kernels cannot be compiled: {package} is not installed for {sys.executable}; install it "
            f"(pip install {package}), or build without them: -DCOBRA_CUDA=OFF"
        )
    return Path(places[0])


class Nvrtc:
    """NVRTC's C interface, loaded from its package."""

    def __init__(self) -> None:
        """Load the library. Raises CompileError where it is absent, or of another version."""
        folder = _package_folder("nvidia.cuda_nvrtc", "nvidia-cuda-nvrtc-cu12") / "lib"
        self.include = _package_folder("nvidia.cuda_runtime", "nvidia-cuda-runtime-cu12") / "include"
        try:
            self._library = ctypes.CDLL(str(folder / "libnvrtc.so.12"))
        except OSError as error:
            raise CompileError(f"the CUDA kernels cannot be compiled: NVRTC cannot be loaded ({error})") from error
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)
        if self.version != NVRTC:
            raise CompileError(
                f"the CUDA kernels cannot be compiled: NVRTC is {major.value}.{minor.value}, expected {NVRTC[0]}.{NVRTC[1]}: "
                "what others write is refused by a JetPack 6 driver; install the version that pyproject.toml pins"
            )
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _check(self, code: int, log: str = "") -> None:
        if code:
            said = self._library.nvrtcGetErrorString(code).decode()
            raise CompileError(f"NVRTC failed ({said})" + (f":\n{log}" if log else ""))

    def compile(self, architecture: str, source: bytes, folder: Path = SOURCES) -> Image:
        """Compile one unit for an architecture. Raises CompileError with the compiler's log."""
        program = ctypes.c_void_p()
        code = self._library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None)
        self._check(code)
        try:
            options = (f"--gpu-architecture={architecture}", *_OPTIONS, f"-I{folder}", f"-I{self.include}")
            array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            code = self._library.nvrtcCompileProgram(program, len(options), array)
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            self._check(code, log)
            ptx = architecture.startswith("compute_")
            data = self._read(program, "PTX" if ptx else "CUBIN")
            return Image(architecture, data, log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        room = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, room))
        return room.raw


def compile_all(folder: Path = SOURCES, architectures: tuple[str, ...] = (*ARCHITECTURES, PTX)) -> list[Image]:
    """Compile the kernels for every architecture, as many at a time as there are cores. Raises CompileError."""
    nvrtc, source = Nvrtc(), unit(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda architecture: nvrtc.compile(architecture, source, folder), architectures))


def packed(images: list[Image], source: str) -> bytes:
    """Return the file of kernels.

    Args:
        images: compiled ones.
        source: `sources_hash` of what they were made from.
    """
    entries = []
    for image in images:
        entry = {"name": image.name, "kind": image.kind, "size": len(image.data)}
        entry["sha256"] = hashlib.sha256(image.data).hexdigest()
        if image.kind == "ptx":
            version = re.search(rb"^\.version (\d+\.\d+)$", image.data, re.MULTILINE)
            assert version, "PTX begins with its version"
            entry["ptx_version"] = version[1].decode()
        entries.append(entry)
    index = json.dumps({"format": FORMAT, "sources": source, "images": entries}, sort_keys=True).encode()
    plain = b"".join([MAGIC, struct.pack("<I", len(index)), index, *(image.data for image in images)])
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, **_SASS}]
    return lzma.compress(plain, check=lzma.CHECK_CRC64, filters=filters)


def main() -> int:
    """Compile and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    output = parser.parse_args().output
    try:
        data = packed(compile_all(), sources_hash())
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(data)
    print(f"{output}: {len(data)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
