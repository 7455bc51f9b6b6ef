"""The emulator, compiled once."""

import os

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from .driver import FakeDriver, write_kernels
from .kernels import Emulator


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """Return the kernels with every access checked, or as test_sanitizers.py wants them."""
    return Emulator(os.environ.get("COBRA_EMULATED_KIND", "checked"))


@pytest.fixture(scope="session")
def _driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def gpu(_driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """Plug an emulated GPU in, with kernels installed; unplugged afterwards."""
    from cobra_edge.decode.cuda import library

    kernels = write_kernels(tmp_path / "kernels.xz")
    monkeypatch.setattr(library, "kernels_file", lambda: kernels)
    _driver.plug_in()
    yield _driver
    gc.collect()
    _driver.plug_in("")
