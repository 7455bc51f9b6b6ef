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
_LIBRARY = "cobra_edge/decode/native/libcobra_cpu.so"
_NEEDED = {
    _LIBRARY,
    "cobra_edge/decode/cuda/kernels.xz",
    "cobra_edge/data/export/targets/jetson-orin-nano.toml",
    "cobra_edge/data/constraints/jetpack6.txt",
}
# Of the checkout alone: the laboratory, the tests, the training of the embedded model, the documentation.
_UNWANTED = ("bench/", "tests/", "calibration/", "docs/", "runtimes/", "constraints/")


@dataclass(frozen=True)
class Platform:
    """A platform: its wheel's tag, its processor, and the oldest C library by zig's name."""

    tag: str
    processor: str
    target: str


PLATFORMS = (
    Platform("manylinux_2_17_x86_64", "x86_64", "x86_64-linux-gnu.2.17"),
    Platform("manylinux_2_28_aarch64", "aarch64", "aarch64-linux-gnu.2.28"),
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
            "CMAKE_SYSTEM_NAME": "Linux",
            "CMAKE_SYSTEM_PROCESSOR": platform.processor,
            "CMAKE_CXX_COMPILER": _tool(folder, "c++", "c++", "-target", platform.target),
            "CMAKE_AR": _tool(folder, "ar", "ar"),
            "CMAKE_RANLIB": _tool(folder, "ranlib", "ranlib"),
            "CMAKE_SHARED_LINKER_FLAGS": "-s",
        }
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


def _glibc(tag: str) -> tuple[int, int]:
    """Return the version of the C library that a tag asks for; a later one than all for a tag that is none."""
    found = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    return (int(found[1]), int(found[2])) if found else (99, 0)


def check(platform: Platform, wheel: Path) -> None:
    """End this process with a message unless a wheel has what a device needs, no more, and asks for no newer symbols."""
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    size = wheel.stat().st_size
    wrong = [f"lacks {name}" for name in sorted(_NEEDED - names)]
    wrong += [f"holds {name}" for name in sorted(names) if name.startswith(_UNWANTED)]
    wrong += [f"has {size:,} bytes, expected at most {_MOST_BYTES:,}"] if size > _MOST_BYTES else []
    wrong += [] if wheel.name.endswith(f"-py3-none-{platform.tag}.whl") else [f"is not for every Python on {platform.tag}"]
    found = re.search(r'platform tag:\s*"([^"]+)"', _run(sys.executable, "-m", "auditwheel", "show", wheel))
    fits = found[1] if found else "none"
    wrong += [] if _glibc(fits) <= _glibc(platform.tag) else [f"needs the platform {fits}, expected {platform.tag} or older"]
    if wrong:
        sys.exit("\n".join(f"wheels: {wheel.name} {what}" for what in wrong))
    print(f"{wheel.name}: {size / 1e6:.2f} MB, {len(names)} files")


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
