"""The emulator, compiled once."""

import pytest

from .kernels import Emulator


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """Return the kernels with every access checked."""
    return Emulator("checked")
