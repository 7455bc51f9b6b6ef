"""The base install in its own environment: it opens, inspects and answers, without torch."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from bench.kernel_budget import compiler

from ..conftest import MINI

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Build a wheel, install it without extras, return the environment's interpreter."""
    folder = tmp_path_factory.mktemp("base")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    venv.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip_for(python), "install", "--quiet", wheel], check=True)
    return python


def pip_for(python):
    """Return the command of our own pip, for an environment that has none."""
    return [sys.executable, "-m", "pip", "--python", python]


def call(python, *arguments, cwd="/"):
    return subprocess.run([python, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_no_torch_is_installed_or_imported(python):
    listed = json.loads(call(*pip_for(python), "list", "--format", "json").stdout)
    names = {p["name"].lower() for p in listed}
    assert "cobra-edge" in names and not names & {"torch", "timm", "torchvision", "onnx", "transformers"}
    done = call(python, "-c", "import sys, cobra_edge; print('torch' in sys.modules, cobra_edge.__version__)")
    assert done.stdout.startswith("False ") and not done.stderr


def test_it_answers(python, mini_bundle):
    bundle = str(mini_bundle("w4a16-g128"))
    asked = ["--image", str(MINI / "demo.png"), "--prompt", "What is in the image?", "--json"]
    done = call(python, "-m", "cobra_edge.run", bundle, *asked)
    assert done.returncode == 0, done.stderr
    here = subprocess.run([sys.executable, "-m", "cobra_edge.run", bundle, *asked], capture_output=True, text=True)
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
