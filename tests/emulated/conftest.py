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


def _plugged_in(driver: FakeDriver, directory: Path) -> Iterator[FakeDriver]:
    """Plug an emulated GPU in, with kernels installed; unplugged afterwards."""
    from cobra_edge.decode.cuda import library

    kernels = write_kernels(directory / "kernels.xz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "kernels_file", lambda: kernels)
        driver.plug_in()
        yield driver
    gc.collect()
    driver.plug_in("")


@pytest.fixture
def gpu(_driver: FakeDriver, tmp_path: Path) -> Iterator[FakeDriver]:
    """Return a GPU that is new for each test."""
    yield from _plugged_in(_driver, tmp_path)


@pytest.fixture(scope="module")
def gpu_of_a_module(_driver: FakeDriver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeDriver]:
    """Return a GPU that stays for a module's tests."""
    yield from _plugged_in(_driver, tmp_path_factory.mktemp("gpu"))
