"""The base install in its own environment: it opens, inspects and answers, without torch; a Jetson's extra adds the GPU."""

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from bench.kernel_budget import compiler

from ..conftest import MINI
from ..emulated.build import compiled
from ..emulated.driver import ORIN_NANO

ROOT = Path(__file__).parents[2]
ASKED = ["--image", str(MINI / "demo.png"), "--prompt", "What is in the image?", "--json"]
# Installed: 31 MB with cuda-bindings 13.5, 97 and 107 with 12.8 and 13.0, which bring their sources.
MOST_MEGABYTES = 120
MOST_RESIDENT_MIB = 30


def built(folder, *settings):
    """Build a wheel in a folder, and return it."""
    options = [f"--config-settings={setting}" for setting in settings]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, *options, ROOT], check=True
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_and_python(tmp_path_factory):
    """Build a wheel, install it without extras, return it and the environment's interpreter."""
    folder = tmp_path_factory.mktemp("base")
    wheel = built(folder)
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    subprocess.run([*pip_for(python), "install", "--quiet", wheel], check=True)
    return wheel, python


@pytest.fixture(scope="module")
def python(wheel_and_python):
    return wheel_and_python[1]


def pip_for(python):
    """Return the command of our own pip, for an environment that has none."""
    return [sys.executable, "-m", "pip", "--python", python]


def call(python, *arguments, cwd="/", **variables):
    return subprocess.run(
        [python, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120, env=os.environ | variables
    )


def installed(python):
    return {p["name"].lower(): p["version"] for p in json.loads(call(*pip_for(python), "list", "--format", "json").stdout)}


def megabytes(python):
    return sum(file.stat().st_size for file in python.parents[1].rglob("*") if file.is_file()) / 1e6


def test_no_torch_is_installed_or_imported(python):
    names = installed(python).keys()
    assert "cobra-edge" in names and not names & {"torch", "timm", "torchvision", "onnx", "transformers"}
    done = call(python, "-c", "import sys, cobra_edge; print('torch' in sys.modules, cobra_edge.__version__)")
    assert done.stdout.startswith("False ") and not done.stderr


def test_it_answers(python, mini_bundle):
    bundle = str(mini_bundle("w4a16-g128"))
    done = call(python, "-m", "cobra_edge.run", bundle, *ASKED)
    assert done.returncode == 0, done.stderr
    here = subprocess.run([sys.executable, "-m", "cobra_edge.run", bundle, *ASKED], capture_output=True, text=True)
    assert json.loads(done.stdout)["text"] == json.loads(here.stdout)["text"]


def test_the_wheel_has_the_cuda_kernels_of_these_sources(python):
    script = "from cobra_edge.decode.cuda.library import read_kernels; k = read_kernels(); print(k.sources, *k.images)"
    done = call(python, "-c", script)
    assert done.returncode == 0, done.stderr
    made = compiler()
    assert done.stdout.split() == [made.sources_hash(), *made.ARCHITECTURES, made.PTX]


def test_it_inspects_with_the_targets_of_the_wheel(python, mini_bundle):
    done = call(python, "-m", "cobra_edge.inspect", str(mini_bundle("w4a16-g128")))
    assert done.returncode == 0 and "Jetson Orin Nano" in done.stdout and "within" in done.stdout


def test_export_says_what_is_missing(python, tmp_path):
    done = call(python, "-m", "cobra_edge", "export", "--target", "jetson", cwd=tmp_path)
    assert done.returncode == 3 and "pip install 'cobra-edge[export] @ file://" in done.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def fake_gpu():
    return {"LD_LIBRARY_PATH": str(compiled("fast").parent), "FAKE_GPU": ORIN_NANO}


def test_without_an_extra_the_gpu_is_refused_and_the_extra_named(python, mini_bundle):
    done = call(python, "-m", "cobra_edge", "run", str(mini_bundle("w4a16-g128")), *ASKED, "--device", "cuda", **fake_gpu())
    told = " ".join(done.stderr.split())
    assert done.returncode == 3 and "cuda-bindings is not installed" in told and "on a Jetson [jetpack6] or [jetpack7]" in told


@pytest.mark.parametrize("extra", ["jetpack6", "jetpack7"])
def test_a_jetson_s_extra_is_the_driver_s_bindings_and_no_more(wheel_and_python, mini_bundle, extra):
    """And is all that an answer on the GPU takes: here the fake driver's, which knows CUDA 12.6 as JetPack 6 does."""
    wheel, python = wheel_and_python
    bundle = str(mini_bundle("w4a16-g128"))
    before, size = installed(python), megabytes(python)
    already = before.keys() & {"cuda-bindings", "cuda-pathfinder"}
    subprocess.run([*pip_for(python), "install", "--quiet", f"{wheel}[{extra}]"], check=True)
    after = installed(python)
    assert after.keys() - before.keys() | already == {"cuda-bindings", "cuda-pathfinder"}
    assert int(after["cuda-bindings"].split(".")[0]) == {"jetpack6": 12, "jetpack7": 13}[extra]
    assert megabytes(python) - size < MOST_MEGABYTES
    answered = call(python, "-m", "cobra_edge", "run", bundle, *ASKED, "--device", "cuda", **fake_gpu())
    assert answered.returncode == 0, answered.stderr
    expected = call(python, "-m", "cobra_edge", "run", bundle, *ASKED, "--device", "cpu")
    assert json.loads(answered.stdout)["text"] == json.loads(expected.stdout)["text"]


RESIDENT = """
import resource, sys
def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()
import numpy
numpy.ones(4) @ numpy.ones(4)
before = resident()
from cobra_edge.decode.cuda import decoder, library
from cuda.bindings import driver
print((resident() - before) / 2**20, *sorted({"torch", "triton", "onnxruntime"} & sys.modules.keys()))
"""


def test_what_decodes_on_a_gpu_is_small_in_memory(python):
    """Comes after the extra: the decoder's modules and the driver's bindings, beside numpy."""
    done = call(python, "-c", RESIDENT)
    assert done.returncode == 0, done.stderr
    mebibytes, *modules = done.stdout.split()
    assert 1 < float(mebibytes) < MOST_RESIDENT_MIB and not modules


def test_a_wheel_without_kernels_says_how_it_was_built(python, tmp_path, mini_bundle):
    """Comes after the extra. Compiled quickly and apart from the other wheel, unpacked before that one's place."""
    quickly = "cmake.define.CMAKE_CXX_FLAGS_RELEASE=-O0"
    wheel = built(tmp_path, "cmake.define.COBRA_CUDA=OFF", quickly, f"build-dir={tmp_path / 'build'}")
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    asked = ["-m", "cobra_edge", "run", str(mini_bundle("w4a16-g128")), *ASKED]
    instead = {"PYTHONPATH": str(tmp_path / "unpacked")} | fake_gpu()
    done = call(python, *asked, "--device", "cuda", **instead)
    told = " ".join(done.stderr.split())
    assert done.returncode == 3 and "no CUDA kernels: it was built with -DCOBRA_CUDA=OFF" in told
    chosen = call(python, *asked, **instead)
    assert chosen.returncode == 0 and json.loads(chosen.stdout)["text"]
