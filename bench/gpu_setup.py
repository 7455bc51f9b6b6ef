"""Make a bare machine ready for bench/gpu.sh from what `--prepare` gathered: the standard library alone.

`python -m bench.gpu_setup` installs wheels that are missing, and puts the compiled kernels and the native decoder into the
source tree; `--peers` builds mamba-ssm's kernels. What is there already stays.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CARRIED = Path(os.environ.get("COBRA_GPU_CARRIED", ROOT / "build" / "gpu"))
SITE = CARRIED / "site"
MEMORY = Path("/dev/shm")
_ROOM = 14 << 30  # bundles of random weights of all schemes


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def install_wheels() -> None:
    """Install carried wheels of packages that this Python lacks, beside the tree."""
    for wheel in sorted((CARRIED / "wheels").glob("*.whl")):
        if not _is_installed(wheel.name.split("-")[0]):
            try:
                _pip("install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(SITE), str(wheel))
            except subprocess.CalledProcessError:
                print(f"{wheel.name} cannot be installed here; what needs it will say so")  # of another Python, say


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _says(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip()


def put_kernels() -> None:
    """Put the compiled kernels beside the decoder's sources where this tree has none."""
    if _says("from cobra_edge.decode.cuda.library import kernels_file; print(kernels_file() is not None)") != "True":
        shutil.copy2(CARRIED / "kernels.xz", ROOT / "cobra_edge" / "decode" / "cuda" / "kernels.xz")


def build_native() -> None:
    """Compile the native decoder where it cannot be imported: with what this machine has, without a network."""
    if _says("from cobra_edge.decode.native.library import why_not; print(why_not() is None)") == "True":
        return
    with tempfile.TemporaryDirectory() as folder:
        defines = "--config-settings=cmake.define.COBRA_CUDA=OFF"
        _pip("wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation", defines, "-w", folder, str(ROOT))
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            name = "cobra_edge/decode/native/libcobra_cpu.so"
            wheel.extract(name, ROOT)


def keep_bundles_in_memory() -> None:
    """Let `bundles` lie in the machine's memory where there is room, as disks may be slow."""
    bundles, there = Path("bundles"), MEMORY / "cobra-bundles"
    if not bundles.exists() and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > _ROOM:
        there.mkdir(exist_ok=True)
        bundles.symlink_to(there)


def build_peers() -> None:
    """Build mamba-ssm and causal-conv1d for this GPU from carried sources; they stay in build/gpu/built."""
    sources, built = CARRIED / "peers", CARRIED / "built"
    if not sources.is_dir():
        print("no sources of peers were carried")
        return
    built.mkdir(exist_ok=True)
    capability = _says("from cobra_edge.decode.cuda.device import first_gpu; print('%d.%d' % first_gpu().capability)")
    script = ROOT / "bench" / "build_peers.sh"
    subprocess.run([script, sources, built, capability, sys.executable], check=True, env=os.environ | {"MAX_JOBS": "12"})


def main(arguments: list[str]) -> None:
    """Run what the arguments name."""
    if "--peers" in arguments:
        build_peers()
        return
    if "--in-memory" in arguments:
        keep_bundles_in_memory()
    install_wheels()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(SITE)]))
    put_kernels()
    build_native()  # last: it is the one that may fail, and the kernels can be timed without it


if __name__ == "__main__":
    main(sys.argv[1:])
