"""Compile the CUDA runtime's sources, with the emulator and the fake driver, into a libcuda.so.1; once for the same sources."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent


def cpu_flags() -> set[str]:
    """Return what Linux says this processor can do."""
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(found[1].split()) if found else set()


KERNELS = HERE.parent.parent / "runtimes" / "cuda"
# A processor's own conversion of halves, where this one has it: products on tensor cores take half the time.
HALVES = ("-mf16c",) if "f16c" in cpu_flags() else ()
COMMON = (*HALVES, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DCOBRA_EMULATED", "-Wall", "-Wextra", "-Werror")
KERNELS_ALONE = "kernels.so"  # beside libcuda.so.1: the same, for tests of kernels without a driver
# What kernels are compiled with, and what the emulator is. "fast": nothing checked but barriers, warps and alignment of wide
# accesses. "checked": every access, by the calls that -fsanitize=thread puts in, answered by the emulator. "sanitized":
# AddressSanitizer and UBSan.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fast": ((), ()),
    "checked": (
        ("-DCOBRA_CHECKED", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"),
        ("-DCOBRA_CHECKED",),
    ),
    "sanitized": (
        ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
        ("-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer"),
    ),
}


def cache_directory() -> Path:
    """Return where compiled libraries are kept: the same for all processes that test this copy of the source."""
    return HERE.parent.parent / "build" / "emulated"


def prune(cache: Path, kept_days: float = 1.0) -> None:
    """Remove libraries of other sources, which nobody has asked for since."""
    for directory in cache.glob("*-" + 16 * "[0-9a-f]"):
        if time.time() - directory.stat().st_mtime > 86400 * kept_days:
            shutil.rmtree(directory, ignore_errors=True)
            directory.with_name(f"{directory.name}.lock").unlink(missing_ok=True)


def compiled(kind: str = "fast", kernels: Path = KERNELS, cache: Path | None = None) -> Path:
    """Return the path of a libcuda.so.1 that runs the kernels in a directory; compiled when there is none of these sources."""
    sources = sorted(kernels.glob("*.cu"))
    headers = [*sorted(kernels.glob("*.cuh")), *sorted(HERE.glob("*.h"))]
    own = sorted(HERE.glob("*.cpp"))
    for_kernels, for_emulator = KINDS[kind]
    compiler = os.environ.get("CXX", "g++")
    told = repr((compiler, COMMON, KINDS[kind]))
    digest = hashlib.sha256(told.encode())
    for file in [*sources, *headers, *own]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    directory = (cache or cache_directory()) / f"{kind}-{digest.hexdigest()[:16]}"
    library = directory / "libcuda.so.1"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if library.exists():
            os.utime(directory)
            return library
        prune(directory.parent)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            room = Path(scratch)
            includes = (f"-I{kernels}", f"-I{HERE}")

            def translate(file: Path) -> Path:
                flags = for_kernels if file.suffix == ".cu" else for_emulator
                made = room / f"{file.name}.o"
                language = ("-x", "c++") if file.suffix == ".cu" else ()
                _call(compiler, *COMMON, *flags, *includes, "-c", *language, str(file), "-o", str(made))
                return made

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(translate, [*sources, *own]))
            sanitize = [f for f in for_kernels if f.startswith("-fsanitize=") and kind == "sanitized"]
            directory.mkdir(exist_ok=True)
            # Who asks for libcuda.so.1 gets the first library of that name in the process: kernels alone have none.
            for name, named in ((KERNELS_ALONE, ()), (library.name, (f"-Wl,-soname,{library.name}",))):
                linked = room / name
                _call(compiler, "-shared", *sanitize, *named, *map(str, objects), "-o", str(linked), "-ldl")
                shutil.copy2(linked, directory / f"{name}.tmp")
                os.replace(directory / f"{name}.tmp", directory / name)
    return library


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    import sys

    print(compiled(*sys.argv[1:]))
