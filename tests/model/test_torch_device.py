"""Whether torch can use a GPU: each reason why not, with stand-ins for the driver and the GPU."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import MachineError
from cobra_edge.model.torch_device import torch_device, why_no_torch_gpu, why_no_torch_kernels


@pytest.fixture(autouse=True)
def afresh():
    why_no_torch_gpu.cache_clear()
    yield
    why_no_torch_gpu.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A driver and a torch that see a GPU; each test takes something away."""

    def version(into):
        into._obj.value = 13000
        return 0

    library = SimpleNamespace(cuDriverGetVersion=version)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=0: "Orin")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=0: (8, 7))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90", "compute_90"])
    return library


def test_none_with_a_gpu(gpu):
    assert why_no_torch_gpu() is None and why_no_torch_kernels() is None
    assert torch_device("cuda") == torch.device("cuda", 0)


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert "there is no NVIDIA driver (libcuda.so.1 cannot be loaded)" in why_no_torch_gpu()
    with pytest.raises(MachineError, match="^--device cuda: there is no NVIDIA driver .*; or take --device cpu$"):
        torch_device("cuda")
    assert torch_device("cpu") == torch.device("cpu")


def test_no_torch(gpu, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_no_torch_gpu() == f"torch is not installed ({install_hint('export')})"


def test_torch_without_cuda(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in why_no_torch_gpu()


def test_an_old_driver(gpu):
    def old(into):
        into._obj.value = 12020
        return 0

    gpu.cuDriverGetVersion = old
    assert "too old: it knows CUDA 12.2" in why_no_torch_gpu() and "needs 13.0" in why_no_torch_gpu()


def test_a_driver_that_does_not_say_its_version_is_tried(gpu):
    gpu.cuDriverGetVersion = lambda into: 999
    assert why_no_torch_gpu() is None


def test_no_gpu_is_visible(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "sees no CUDA GPU (CUDA_VISIBLE_DEVICES is '7')" in why_no_torch_gpu()


def test_an_old_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=0: (7, 5))
    assert "has no kernels for Orin, compute capability 7.5, only for 8.0, 9.0" in why_no_torch_kernels()
