"""Training: runs that resume where they stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from calibration import train_mini


def run_training(out, vision_steps, language_steps, *more, stop_after=None):
    """Train with tiny batches; with stop_after, as a process whose group is killed once that many steps are in its log."""
    given = ["--out", str(out), "--log-every", "1", "--save-every", "1", "--vision-batch", "2", "--language-batch", "2", *more]
    given += ["--vision-steps", str(vision_steps), "--language-steps", str(language_steps)]
    if stop_after is None:
        threads, refusal = torch.get_num_threads(), None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train_mini", *given])
            try:
                train_mini.main()
            except SystemExit as error:
                refusal = error.code
            finally:
                torch.set_num_threads(threads)
        return refusal, steps_logged(out)
    command = [sys.executable, "-m", "calibration.train_mini", *given]
    with open(os.devnull, "w") as nowhere:
        child = subprocess.Popen(command, stdout=nowhere, stderr=nowhere, start_new_session=True)
    deadline = time.monotonic() + 240
    while len(steps_logged(out)) < stop_after and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return child.returncode, steps_logged(out)


def steps_logged(out):
    file = out / "log.jsonl"
    texts = file.read_text().splitlines() if file.exists() else []
    lines = [json.loads(text) for text in texts if text.endswith("}")]  # the last may be half written
    return [line for line in lines if "stage" in line]


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    """Ended hard in the middle of stage language, then given the same command again: same log, same weights."""
    more = ("--workers", "2")
    refusal, whole = run_training(tmp_path / "whole", 2, 4, *more)
    assert refusal is None
    assert [(line["stage"], line["step"]) for line in whole] == [
        ("vision", 1), ("vision", 2), ("language", 1), ("language", 2), ("language", 3), ("language", 4)
    ]  # fmt: skip
    code, before = run_training(tmp_path / "cut", 2, 4, *more, stop_after=4)
    assert code != 0 and 4 <= len(before) <= 6
    refusal, resumed = run_training(tmp_path / "cut", 2, 4, *more)
    assert refusal is None
    assert [(line["stage"], line["step"]) for line in resumed] == [(line["stage"], line["step"]) for line in whole]
    for one, two in zip(whole, resumed, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    a, b = (torch.load(tmp_path / d / "language.pt", weights_only=True) for d in ("whole", "cut"))
    for name, value in a["model"].items():
        torch.testing.assert_close(b["model"][name], value, rtol=1e-3, atol=1e-5)


def test_other_settings_do_not_resume_and_the_same_do(tmp_path):
    code, before = run_training(tmp_path, 1, 4, "--workers", "1", stop_after=2)
    assert code != 0 and 2 <= len(before) <= 4
    refusal, _ = run_training(tmp_path, 1, 4, "--workers", "1", "--seed", "5")
    assert "give the same, or another --out" in refusal
    refusal, resumed = run_training(tmp_path, 1, 4, "--workers", "1")
    assert refusal is None and [line["step"] for line in resumed] == [1, 1, 2, 3, 4]
