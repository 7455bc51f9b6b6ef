"""The emulator, compiled once, and an emulated GPU behind the fake driver; or this machine's GPU, see `real_gpu`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import real_gpu
from .driver import FakeDriver, plugged_in
from .kernels import Emulator


@pytest.fixture(scope="session")
def emulator() -> Emulator | real_gpu.RealKernels:
    """Return the kernels with every access checked; test_sanitizers.py has them compiled another way."""
    if real_gpu.is_wanted():
        return real_gpu.RealKernels()
    return Emulator(os.environ.get("COBRA_EMULATED_KIND", "checked"))


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[FakeDriver | real_gpu.RealDriver]:
    """Return a GPU that is new for each test."""
    with plugged_in(tmp_path) as driver:
        yield driver


@pytest.fixture(scope="module")
def gpu_of_a_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeDriver | real_gpu.RealDriver]:
    """Return a GPU that stays for a module's tests."""
    with plugged_in(tmp_path_factory.mktemp("gpu")) as driver:
        yield driver
