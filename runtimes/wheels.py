"""Build the wheels, one a platform for every Python, and the source distribution: `python runtimes/wheels.py --output dist`.

The compiler is zig's, from the package index: it brings the C library of any older Linux and of other processors, so that one
machine builds for all, and links the C++ library statically.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_CONSTRAINT = ROOT / "constraints" / "build.txt"
_MOST_BYTES = 12 << 20  # the embedded model is most of it
_KERNELS = "cobra_edge/decode/cuda/kernels.xz"
_NEEDED = {
    "cobra_edge/data/export/targets/jetson-orin-nano.toml",
    "cobra_edge/data/constraints/jetpack6.txt",
}
# Of the checkout alone: the laboratory, the tests, the training of the embedded model, the documentation.
_UNWANTED = ("bench/", "tests/", "calibration/", "docs/", "runtimes/", "constraints/")


@dataclass(frozen=True)
class Platform:
    """A platform.

    Attributes:
        tag: of its wheel.
        system, processor: CMake's names.
        target: zig's name, with the oldest C library or system that it is for.
        library: the native decoder's file; None for a wheel without it, which runs bundles by the numpy decoder.
    """

    tag: str
    system: str
    processor: str
    target: str
    library: str | None

    @property
    def native(self) -> str:
        """The path of the native decoder in its wheel."""
        return f"cobra_edge/decode/native/{self.library}"


PLATFORMS = (
    Platform("manylinux_2_17_x86_64", "Linux", "x86_64", "x86_64-linux-gnu.2.17", "libcobra_cpu.so"),
    Platform("manylinux_2_28_aarch64", "Linux", "aarch64", "aarch64-linux-gnu.2.28", "libcobra_cpu.so"),
    Platform("macosx_11_0_arm64", "Darwin", "arm64", "aarch64-macos.11.0", "libcobra_cpu.dylib"),  # never run
    Platform("win_amd64", "Windows", "AMD64", "x86_64-windows-gnu", None),  # never run
)


def _run(*command: str | Path, **variables: str) -> str:
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, env=os.environ | variables, cwd=ROOT)
    if done.returncode:
        sys.exit(
            f"wheels: {command[0]} failed with exit code {done.returncode}: {' '.join(map(str, command[1:]))}\n{done.stdout}"
        )
    return done.stdout


def _package(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"wheels: {name} is missing; take: make wheels")
    return spec.submodule_search_locations[0]


def _tool(folder: Path, name: str, *arguments: str) -> Path:
    """Write a script that runs one of zig's tools: CMake takes no compiler with arguments."""
    script = folder / name
    zig = Path(_package("ziglang")) / "zig"  # not as a module: a build in isolation does not find it
    script.write_text(f'#!/bin/sh\nexec "{zig}" {" ".join(arguments)} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return script


def build(platform: Platform, output: Path) -> Path:
    """Build the wheel of a platform into a directory; return the file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        defines = {
            "CMAKE_SYSTEM_NAME": platform.system,
            "CMAKE_SYSTEM_PROCESSOR": platform.processor,
            "CMAKE_CXX_COMPILER": _tool(folder, "c++", "c++", "-target", platform.target),
            "CMAKE_AR": _tool(folder, "ar", "ar"),
            "CMAKE_RANLIB": _tool(folder, "ranlib", "ranlib"),
            "CMAKE_SHARED_LINKER_FLAGS": "-s",
        }
        if platform.library is None:
            defines["COBRA_CPU"] = "OFF"
        settings = [f"cmake.define.{key}={value}" for key, value in defines.items()]
        settings += [
            "install.strip=false",
            f"build-dir={folder / 'build'}",
        ]  # this machine's strip knows its own processor alone
        options = [f"--config-settings={setting}" for setting in settings] + [f"--build-constraint={_CONSTRAINT}"]
        _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *options, "--wheel-dir", folder, ".")
        (made,) = folder.glob("*.whl")
        _run(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", platform.tag, made)
        (tagged,) = folder.glob("*.whl")
        return Path(shutil.move(tagged, output / tagged.name))


def needed(platform: Platform) -> set[str]:
    """Return files that a wheel of a platform must have; the CUDA kernels only where there can be a GPU of NVIDIA's."""
    native = set() if platform.library is None else {platform.native}
    return _NEEDED | native | ({_KERNELS} if platform.system == "Linux" else set())


def check(platform: Platform, wheel: Path) -> None:
    """End this process with a message unless a wheel has what a device needs, no more, and runs on the systems of its tag."""
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(wheel) as opened:
        names, folder = set(opened.namelist()), Path(name)
        opened.extractall(folder)
        size = wheel.stat().st_size
        wrong = [f"lacks {name}" for name in sorted(needed(platform) - names)]
        wrong += [f"holds {name}" for name in sorted(names) if name.startswith(_UNWANTED)]
        wrong += [f"has {size:,} bytes, expected at most {_MOST_BYTES:,}"] if size > _MOST_BYTES else []
        wrong += [] if wheel.name.endswith(f"-py3-none-{platform.tag}.whl") else [f"is not for every Python on {platform.tag}"]
        if not wrong:
            linux, needs = platform.system == "Linux", None
            if platform.library is not None:
                needs = _needs_of_linux(wheel) if linux else _needs_of_macos(folder / platform.native)
            wrong += [f"needs {needs}, expected {platform.tag} or older"] if needs and not _serves(platform.tag, needs) else []
            wrong += _wrong_kernels(folder / _KERNELS) if linux else []
    if wrong:
        sys.exit("\n".join(f"wheels: {wheel.name} {what}" for what in wrong))
    print(f"{wheel.name}: {size / 1e6:.2f} MB, {len(names)} files")


def _serves(tag: str, needs: str) -> bool:
    """Return whether a system of a tag, such as manylinux_2_28_aarch64, is as new as a tag of the same kind that is needed."""
    pattern = r"(manylinux|macosx)_(\d+)_(\d+)_"
    here, there = re.match(pattern, tag), re.match(pattern, needs)
    if here is None or there is None or here[1] != there[1]:
        return False
    return (int(there[2]), int(there[3])) <= (int(here[2]), int(here[3]))


def _needs_of_linux(wheel: Path) -> str:
    """Return the tag of the oldest system that has every symbol."""
    found = re.search(r'platform tag:\s*"([^"]+)"', _run(sys.executable, "-m", "auditwheel", "show", wheel))
    return found[1] if found else "no system that auditwheel knows"


def _needs_of_macos(library: Path) -> str:
    """Return the tag of the oldest system that the library is for; another text if it could not be loaded there."""
    from macholib.mach_o import LC_BUILD_VERSION, LC_CODE_SIGNATURE, LC_LOAD_DYLIB
    from macholib.MachO import MachO

    (header,) = MachO(str(library)).headers
    commands = {load.cmd: (command, data) for load, command, data in header.commands}
    loaded = [data.rstrip(b"\0").decode() for load, _, data in header.commands if load.cmd == LC_LOAD_DYLIB]
    if loaded != ["/usr/lib/libSystem.B.dylib"]:
        return f"the libraries {', '.join(loaded)}"
    if LC_CODE_SIGNATURE not in commands:
        return "a signature"  # no process on this processor loads a library without
    oldest = int(commands[LC_BUILD_VERSION][0].minos)
    return f"macosx_{oldest >> 16}_{oldest >> 8 & 0xFF}_arm64"


def _wrong_kernels(file: Path) -> list[str]:
    """Return what is wrong with the CUDA kernels: a file that the decoder would refuse, or other images than are compiled."""
    sys.path[:0] = [str(ROOT), str(ROOT / "runtimes" / "cuda")]
    from compile import ARCHITECTURES, PTX

    from cobra_edge.decode.cuda.library import read_kernels
    from cobra_edge.errors import MachineError

    try:
        images = [str(image) for image in read_kernels(file).images]
    except MachineError as error:
        return [f"has kernels that cannot be read: {error}"]
    expected = [*ARCHITECTURES, PTX]
    return [] if images == expected else [f"has kernels for {', '.join(images)}, expected {', '.join(expected)}"]


def main() -> None:
    """Build everything into a directory, and check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="Directory for the files; default: dist.")
    tags = [platform.tag for platform in PLATFORMS]
    parser.add_argument("--platform", choices=tags, action="append", help="Build this alone, without the source; repeatable.")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for platform in PLATFORMS:
        if platform.tag in (arguments.platform or tags):
            check(platform, build(platform, arguments.output))
    if not arguments.platform:
        _run(
            sys.executable,
            "-m",
            "build",
            "--sdist",
            "--outdir",
            arguments.output,
            ROOT,
            PIP_BUILD_CONSTRAINT=str(ROOT / "constraints" / "build.txt"),
        )


if __name__ == "__main__":
    main()
