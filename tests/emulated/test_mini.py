"""cobra-mini's answers to held-out questions by the emulated GPU, beside the native decoder's; and the command line's."""

import subprocess
import sys

import pytest

from cobra_edge.bundle.reader import Bundle
from cobra_edge.inference.session import Session
from cobra_edge.suite.reader import read_suite

from ..conftest import MINI
from .build import compiled
from .driver import RTX_4090

HELDOUT = MINI / "heldout.jsonl"


@pytest.mark.parametrize(("scheme", "questions", "tokens"), [("default", 3, 16), ("fp16", 1, 8)])
def test_answers_are_those_of_the_native_decoder(gpu, mini_bundle, default_bundle, scheme, questions, tokens):
    bundle = Bundle.open(default_bundle if scheme == "default" else mini_bundle(scheme))
    ours, native = Session(bundle, "auto", "cuda"), Session(bundle, "cpu", "native")
    lines = read_suite(HELDOUT)[:questions]
    seen = ours.look(HELDOUT.parent / lines[0].image), native.look(HELDOUT.parent / lines[0].image)
    for line in lines:
        assert line.image == lines[0].image
        answers = [s.ask(state, line.prompt, max_new_tokens=tokens) for s, state in zip((ours, native), seen, strict=True)]
        for answer in answers:
            answer.read()
        assert answers[0].tokens == answers[1].tokens, line.prompt


def test_a_question_about_the_demo_image_by_the_command_line(mini_bundle, tmp_path):
    """In a process of its own, whose libcuda.so.1 is the fake one; the image goes through the vision graph."""
    command = [
        sys.executable, "-m", "cobra_edge", "run", str(mini_bundle("w4a16-g128")),
        "--image", str(MINI / "demo.png"), "--prompt", "How many objects are there?", "--device", "cuda",
    ]  # fmt: skip
    library = compiled("fast").parent
    environment = {
        "PATH": "",
        "HOME": str(tmp_path),
        "LD_LIBRARY_PATH": str(library),
        "FAKE_GPU": RTX_4090,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "images go through the CPU" in done.stderr  # this onnxruntime has no GPU; that is told, not refused
    told = " ".join(done.stderr.split())
    assert "tensorrt-rtx: the bundle was exported without an engine" in told and "tensorrt: " in told  # and why no other runs
    native = subprocess.run([*command[:-1], "cpu"], capture_output=True, text=True, env=environment)
    assert done.stdout and done.stdout == native.stdout
    chosen = subprocess.run([*command[:-1], "auto", "--debug"], capture_output=True, text=True, env=environment)
    assert chosen.stdout == done.stdout and "decoder: cuda on cuda" in chosen.stderr
    refused = subprocess.run(command, capture_output=True, text=True, env=environment | {"FAKE_GPU": ""})
    assert refused.returncode == 3 and "sees no GPU" in refused.stderr and "Traceback" not in refused.stderr
    failed = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"FAKE_CUDA_FAIL": "cuGraphLaunch:3:700"}
    )
    assert failed.returncode == 3 and "start again" in failed.stderr and "Traceback" not in failed.stderr
