"""bench/gpu.sh from first to last step on the emulated GPU, at tiny sizes; and its commands where something goes wrong."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench import gpu_answers, gpu_parity, gpu_sanitizer
from bench.cuda_paper import prompt_launches
from bench.gpu_kernels import Recorded
from bench.gpu_parity import load_image, run_cases
from bench.gpu_result import ImageParity
from cobra_edge.bench.random_bundle import random_bundle
from cobra_edge.bench.roofline import launches_per_token
from cobra_edge.bench.shapes import shape_named
from cobra_edge.decode.cuda.device import first_gpu
from cobra_edge.decode.cuda.library import read_kernels
from cobra_edge.terminal.output import progress, run_command

from ..emulated.driver import plugged_in

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(tmp_path):
    with plugged_in(tmp_path) as driver:
        yield driver


def test_a_rehearsal_writes_every_result_that_needs_no_peer(mini_bundle, tmp_path):
    carried, out = tmp_path / "carried", tmp_path / "out"
    carried.mkdir()
    shutil.copytree(mini_bundle("w4a16-g128"), carried / "mini-w4a16-g128")
    environment = os.environ | {"PYTHON": sys.executable, "COBRA_GPU_CARRIED": str(carried)}
    done = subprocess.run(
        [ROOT / "bench" / "gpu.sh", "--rehearse", "--out", out], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = {path.name: json.loads(path.read_text()) for path in out.iterdir()}
    names = ("decode", "kernels", "parity", "sanitizer")
    assert results.keys() == {"gpu-session.json", *(f"gpu-{name}-emulated.json" for name in names)}
    assert all(results[f"gpu-{name}-emulated.json"]["gpu"]["name"] == "Emulated" for name in names)
    parity = results["gpu-parity-emulated.json"]
    assert all(i["passed"] > 0 and i["failed"] == 0 for i in parity["images"])
    assert [i["image"] for i in parity["images"]] == ["sm_90", "compute_80"]
    assert [(a["scheme"], a["same"], a["lines"]) for a in parity["answers"]] == [("w4a16-g128", 1, 1)]
    (scheme,) = results["gpu-kernels-emulated.json"]["schemes"]
    assert scheme["parts_ms"].keys() == {"token", "prompt of 8"}
    refused = [e for e in results["gpu-session.json"] if e["exit"]]
    assert (
        [e["exit"] for e in refused] == [3] and "--peer mamba-ssm: " in refused[0]["log"] and "or omit it" in refused[0]["log"]
    )


def test_recorded_launches_are_a_token_s_and_move_its_weights(gpu, tmp_path):
    bundle = random_bundle(shape_named("cobra-mini").mamba, "w4a16-g128", tmp_path / "bundle", progress())
    recorded, recipe = Recorded(bundle, (8,)), bundle.manifest.recipe
    config = bundle.manifest.model.mamba
    assert len(recorded.parts["token"]) == launches_per_token(config, recipe)
    assert len(recorded.parts["prompt of 8"]) == prompt_launches(config, recipe, 8, first_gpu().multiprocessors)
    groups = {(role, launches[0].name.split("_w")[0]): launches for role, launches in recorded.groups("token")}
    assert [len(launches) for launches in groups.values()] == [1, *[config.n_layer] * 4, 1, 1]
    moved, macs = recorded.work_of(groups["in_proj", "gemv"][0], 1)
    size = 2 * config.d_inner * config.d_model
    assert (moved, macs) == (size // 2 + 2 * size // 128, size)
    update, macs = recorded.work_of(groups["dt_proj", "selective_state_update"][0], 1)
    assert update > 8 * config.d_inner * config.d_state and macs == config.d_inner * config.dt_rank
    prompt = {role: launches[0] for role, launches in recorded.groups("prompt of 8") if role}
    assert recorded.work_of(prompt["in_proj"], 8)[1] == 8 * size


def test_an_image_that_the_driver_refuses_is_told_and_not_tried(gpu):
    image = read_kernels().images[0]
    assert load_image(image).load_seconds is not None
    gpu.refuse_modules(209)
    assert load_image(image) == ImageParity(image=str(image), refused="CUDA_ERROR_NO_BINARY_FOR_GPU")


def test_failures_of_cases_are_counted_and_named(monkeypatch, tmp_path):
    (tmp_path / "tests" / "emulated").mkdir(parents=True)
    case = "import pytest\n\ndef test_a(): assert 1 == 2\ndef test_b(): pass\ndef test_c(): pytest.skip('no')\n"
    (tmp_path / "tests" / "emulated" / "test_x.py").write_text(case)
    monkeypatch.setattr(gpu_parity, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_parity, "CASES", ("x",))
    found = run_cases(ImageParity(image="sm_90"), None, 1)
    assert (found.passed, found.failed, found.skipped) == (1, 1, 1)
    assert len(found.failures) == 1 and "test_a: assert 1 == 2" in found.failures[0]


def test_an_answer_that_differs_is_named(gpu, mini_bundle, monkeypatch, capsys):
    bundle = str(mini_bundle("w4a16-g128"))
    monkeypatch.setattr(gpu_answers, "_answers", lambda session, lines, n: [[session.decoder.name]] * len(lines))
    assert run_command(gpu_answers.gpu_answers, [bundle, "--lines", "2"]) == 3
    assert "answers differ on this GPU" in capsys.readouterr().err


SANITIZER = """#!/bin/sh
case "$*" in
  *--version*) echo "NVIDIA (R) Compute Sanitizer"; echo "Version 2025.3.1";;
  *memcheck*) echo "========= ERROR SUMMARY: 0 errors";;
  *racecheck*) echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"; exit 1;;
  *synccheck*) echo "Device not supported"; sleep 60 & wait; exit 1;;
esac
"""


def test_sanitizers_that_find_something_or_cannot_run_are_told(gpu, tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "compute-sanitizer"
    stub.write_text(SANITIZER)
    stub.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{stub.parent}{os.pathsep}{os.environ['PATH']}")
    began = time.monotonic()
    assert run_command(gpu_sanitizer.gpu_sanitizer, ["bundle", "--seconds", "2"]) == 3
    assert time.monotonic() - began < 30
    assert "compute-sanitizer found errors" in capsys.readouterr().err
    (file,) = (tmp_path / "bench" / "results").iterdir()
    result = json.loads(file.read_text())
    assert result["version"] == "Version 2025.3.1" and "Device not supported" in result["runs"][2]["said"]
    assert [(run["tool"], run["errors"]) for run in result["runs"]] == [("memcheck", 0), ("racecheck", 2), ("synccheck", None)]


def test_random_weights_repeat_a_pool_without_zeros(tmp_path, monkeypatch):
    monkeypatch.setattr("cobra_edge.bench.random_bundle._DRAWN", 1000)
    bundle = random_bundle(shape_named("cobra-mini").mamba, "w4a16-g128", tmp_path / "bundle", progress())
    first, second = (bundle.decoder_tensors()[f"backbone.layers.{i}.mixer.in_proj.weight"].codes for i in range(2))
    assert len(np.unique(first)) > 200 and not np.array_equal(first, second)
    assert np.array_equal(first.ravel()[:1000], first.ravel()[1000:2000])
