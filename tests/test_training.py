"""Training: native gradients against autograd's, and runs that resume where they stopped."""

import json
import subprocess
import sys

import pytest
import torch

from calibration.native_mixer import NATIVE
from cobra_edge.model.mamba import REFERENCE

from .tolerance import assert_close


def gradients(function, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # A fixed cotangent: a loss that bends with the outputs would multiply their rounding errors into the gradient.
    torch.autograd.backward(outputs, [torch.cos(torch.arange(o.numel()).float()).view_as(o) for o in outputs])
    return [o.detach() for o in outputs], [x.grad for x in leaves]


def compare(ours, theirs):
    for got, expected in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert_close(got.numpy(), expected.numpy(), "gradient")


@pytest.mark.parametrize("seq", [1, 2, 63])
def test_native_scan_has_the_right_gradient(seq):
    torch.manual_seed(seq)
    batch, inner, state = 3, 64, 16
    wide = torch.randn(batch, seq, 2 * inner)
    u, dt, bias, D = (torch.randn(*s) for s in ((batch, seq, inner), (batch, seq, inner), (inner,), (inner,)))
    B, C, h = (torch.randn(*s) for s in ((batch, seq, state), (batch, seq, state), (batch, inner, state)))
    A = -torch.rand(inner, state) * 8

    def strided(scan):
        return lambda u, dt, A, B, C, D, w, bias, h: scan(u, dt, A, B, C, D, w.chunk(2, -1)[1], bias, h)

    inputs = (u, dt, A, B, C, D, wide, bias, h)
    compare(gradients(strided(NATIVE.scan), inputs), gradients(strided(REFERENCE.scan), inputs))


@pytest.mark.parametrize("seq", [1, 2, 3, 4, 63])
def test_native_convolution_has_the_right_gradient(seq):
    torch.manual_seed(seq)
    inputs = (torch.randn(3, seq, 128), torch.randn(3, 64, 4), torch.randn(64, 4), torch.randn(64))

    def strided(conv):
        return lambda x, state, weight, bias: conv(x.chunk(2, -1)[0], state, weight, bias)

    compare(gradients(strided(NATIVE.conv), inputs), gradients(strided(REFERENCE.conv), inputs))


def test_shapes_the_kernel_was_not_built_for_are_refused():
    bad = [torch.randn(1, 2, 40), torch.randn(1, 40, 4), torch.randn(40, 4), torch.randn(40)]
    with pytest.raises(RuntimeError, match="expected a multiple of 32"):
        NATIVE.conv(*bad)


def run_training(out, vision_steps, language_steps):
    command = [sys.executable, "-m", "calibration.train_mini", "--out", str(out), "--log-every", "1", "--save-every", "1"]
    command += ["--vision-batch", "2", "--language-batch", "2"]
    command += ["--vision-steps", str(vision_steps), "--language-steps", str(language_steps)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    lines = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "stage" in line]


def test_a_finished_stage_is_kept_and_the_next_trains_the_same_again(tmp_path):
    whole = run_training(tmp_path / "whole", 2, 2)
    assert [(line["stage"], line["step"]) for line in whole] == [
        ("vision", 1),
        ("vision", 2),
        ("language", 1),
        ("language", 2),
    ]
    (tmp_path / "whole" / "language.pt").unlink()
    again = run_training(tmp_path / "whole", 2, 2)[4:]
    assert [line["stage"] for line in again] == ["language", "language"]
    for before, after in zip(whole[2:], again, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-3)
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in whole)
