"""The float model on a GPU, as far as a machine without one can tell: where tensors lie, which kernels run, what is said."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cobra_edge.cli import main
from cobra_edge.decode.native_operations import best_operations, operations_on
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.model import fused_kernels, torch_device
from cobra_edge.model.mamba import REFERENCE, Block
from cobra_edge.quantize.calibration import ObservedBlock, _Sequence, _stream

CONFIG = MambaConfig(d_model=32, n_layer=2, vocab=40, d_inner=64, d_state=16, d_conv=4, dt_rank=2)


def test_a_layer_and_its_statistics_are_on_the_gpu_and_the_streams_on_the_host(monkeypatch):
    """With tensors that have a device but no data: torch refuses an operation whose tensors lie in two places."""
    gpu, moved = torch.device("cuda", 0), []
    # A module whose tensors have no data cannot be moved: it is made there, and that it would be moved is noted.
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: moved.append((type(module), device)) or module)
    with FakeTensorMode(), torch.no_grad():
        with gpu:
            made = Block(CONFIG, REFERENCE)
        block = ObservedBlock(made, 0, CONFIG, 12, gpu)
        streams = torch.zeros(12, CONFIG.d_model)
        sequences = [_Sequence(0, 4, is_image=True), _Sequence(4, 3, False, after=0), _Sequence(7, 5, False)]
        _stream(block, streams, sequences, lambda *_: None)
        assert {p.device for p in block.block.parameters()} == {gpu} and streams.device.type == "cpu"
        assert moved == [(Block, gpu)]
        for observer in block.observers.values():
            assert observer._sum.device == gpu and {s.device for s in observer._samples} == {gpu}


def test_a_gpu_takes_fused_operations_and_a_processor_the_native_ones():
    fused_kernels.fused_operations.cache_clear()
    assert operations_on(torch.device("cpu"), CONFIG) == best_operations()
    found = operations_on(torch.device("cuda"), CONFIG)
    assert found == fused_kernels.fused_operations(torch.device("cuda"), CONFIG.d_inner, CONFIG.d_conv)


@pytest.mark.parametrize("command", [["calibrate"], ["export", "--target", "jetson", "--method", "gptq"]])
def test_the_commands_exit_with_3_and_leave_nothing(monkeypatch, capfd, tmp_path, command):
    monkeypatch.setattr(torch_device, "why_no_torch_gpu", lambda: "there is no GPU")
    monkeypatch.setattr(
        sys, "argv", ["cobra-edge", *command, "--checkpoint", "mini", "--device", "cuda", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 3 and "--device cuda: there is no GPU" in capfd.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())
