"""`bench/gpu.sh --prepare`: gather in build/gpu what a machine with a GPU lacks that has no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click

from cobra_edge.bench.machine import machine
from cobra_edge.decode.cuda.library import kernels_file
from cobra_edge.errors import MachineError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, megabytes, say

from .gpu_setup import CARRIED

SCHEMES = ("w4a16-g128", "w8a16-g128", "w3a16-g64", "fp16")
# What a machine with torch, numpy, onnxruntime, tokenizers, safetensors, pillow, rich, click and filelock may still lack.
PACKAGES = ("msgspec", "platformdirs", "tomlkit", "cuda-bindings", "cuda-pathfinder", "bitsandbytes")
PEERS = ("mamba-ssm", "causal-conv1d")
_GLIBC = ("2_28", "2_27", "2_24", "2_17")


def carry_kernels() -> None:
    """Copy this installation's compiled kernels. Raises MachineError where it has none."""
    file = kernels_file()
    if file is None:
        raise MachineError("this installation has no CUDA kernels to carry; install it without -DCOBRA_CUDA=OFF")
    shutil.copy2(file, CARRIED / "kernels.xz")


def carry_bundles() -> None:
    """Export cobra-mini in each scheme."""
    for scheme in SCHEMES:
        export_bundle(
            "mini", target_named("jetson"), CARRIED / f"mini-{scheme}", scheme=scheme, method="rtn", golden_lines=2, force=True
        )


def carry_wheels(python: str, packages: tuple[str, ...]) -> None:
    """Download wheels for x86-64 and a version of Python. Raises MachineError where the index has none."""
    tags = [word for glibc in _GLIBC for word in ("--platform", f"manylinux_{glibc}_x86_64")]
    tags += ["--platform", "manylinux2014_x86_64", "--python-version", python, "--implementation", "cp"]
    _download("wheels", "--only-binary=:all:", *tags, *packages)


def thinned(wheel: Path, cuda: str) -> None:
    """Take out of a wheel the libraries for other CUDA versions: bitsandbytes brings one of 20 MB for each.

    Args:
        wheel: to be changed.
        cuda: version without its dot, such as "130".
    """
    slim = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as kept:
        others = {n for n in whole.namelist() if re.search(r"_(?:cuda|rocm)\d+\.", n) and f"_cuda{cuda}." not in n}
        for name in whole.namelist():
            data = whole.read(name)
            if name.endswith(".dist-info/RECORD"):
                data = b"".join(row for row in data.splitlines(True) if row.split(b",")[0].decode() not in others)
            if name not in others:
                kept.writestr(name, data)
    slim.replace(wheel)


def carry_peers() -> None:
    """Download the sources of mamba-ssm and causal-conv1d; nothing is compiled here."""
    with tempfile.TemporaryDirectory() as tools:
        # Their setup.py, which pip asks for a name and a version, imports these and the torch that is here.
        _pip("install", "-q", "--target", tools, "setuptools", "wheel", "packaging", "ninja")
        skipped = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE", "PYTHONPATH": tools}
        _download("peers", "--no-binary=:all:", "--no-build-isolation", *PEERS, variables=skipped)


def _download(folder: str, *arguments: str, variables: dict[str, str] | None = None) -> None:
    _pip("download", "-q", "--no-deps", "-d", str(CARRIED / folder), *arguments, variables=variables)


def _pip(*arguments: str, variables: dict[str, str] | None = None) -> None:
    if subprocess.run([sys.executable, "-m", "pip", *arguments], env=os.environ | (variables or {})).returncode:
        raise MachineError(f"pip cannot {' '.join(arguments)}; see what it says above")


def carry_commit() -> None:
    """Write which commit this tree is, for the results of a copy without its repository."""
    (CARRIED / "commit").write_text(machine().commit + "\n")


def carried_sizes() -> dict[str, int]:
    """Return the bytes of everything that is carried, by its name in build/gpu."""
    return {
        path.name: sum(f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file())
        for path in sorted(CARRIED.iterdir())
    }


@click.command(cls=Command, epilog="Example: python -m bench.gpu_prepare --python 3.12 --cuda 130")
@option("--python", group="input", default="3.12", help="Version of the machine's Python.")
@option("--with", "more", group="input", multiple=True, metavar="PACKAGE", help="Another wheel to carry; repeatable.")
@option("--cuda", group="input", default="130", help="CUDA version of the machine's torch, without the dot.")
@option("--peers/--no-peers", group="input", default=True, help="Carry sources of mamba-ssm, to be built there with nvcc.")
@debug_option
def gpu_prepare(python: str, more: tuple[str, ...], cuda: str, peers: bool) -> None:
    """Gather wheels, compiled kernels, cobra-mini's bundles and sources of peers in build/gpu, and say what they weigh."""
    CARRIED.mkdir(parents=True, exist_ok=True)
    carry_commit()
    carry_kernels()
    carry_wheels(python, (*PACKAGES, *more))
    for wheel in (CARRIED / "wheels").glob("bitsandbytes-*.whl"):
        thinned(wheel, cuda)
    if peers:
        carry_peers()
    carry_bundles()
    sizes = carried_sizes()
    for name, size in sizes.items():
        say(f"{name}: {megabytes(size)}")
    say(f"carry build/gpu, {megabytes(sum(sizes.values()))}, with the source tree; the native decoder is compiled there")


main = main_of(gpu_prepare)

if __name__ == "__main__":
    main()
