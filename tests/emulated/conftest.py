"""The emulator, compiled once."""

import os

import pytest

from .kernels import Emulator


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    """Return the kernels with every access checked, or as test_sanitizers.py wants them."""
    return Emulator(os.environ.get("COBRA_EMULATED_KIND", "checked"))
