"""Every call of the driver that the CUDA decoder makes is as old as the oldest driver that it accepts."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from cobra_edge.decode.cuda.device import LEAST_CUDA

ROOT = Path(__file__).parents[3]
CALL = re.compile(r'"(cu[A-Z]\w+)"')


def used() -> set[str]:
    """Return the names of calls in the decoder's host code."""
    return {name for file in (ROOT / "cobra_edge/decode/cuda").glob("*.py") for name in CALL.findall(file.read_text())}


def forms() -> dict[str, list[int]]:
    """Return the versions of CUDA that changed each call of the driver, from NVIDIA's list for CUDA 12.6."""
    places = find_spec("nvidia.cuda_runtime").submodule_search_locations
    header = (Path(next(iter(places))) / "include" / "cudaTypedefs.h").read_text()
    found: dict[str, list[int]] = {}
    for name, version in re.findall(r"\bPFN_(cu\w+?)_v(\d{4,5})\b", header):
        found.setdefault(name, []).append(int(version))
    return found


def test_the_list_tells_old_calls_from_new_ones() -> None:
    known = forms()
    assert max(known["cuLaunchKernel"]) == 4000 and max(known["cuCtxCreate"]) > 12000


@pytest.mark.parametrize("name", sorted(used()))
def test_a_call_did_not_change_after_the_oldest_driver(name: str) -> None:
    """cuda-bindings of any version then ask such a driver for a form that it has."""
    assert max(forms()[name]) <= 1000 * LEAST_CUDA[0] + 10 * LEAST_CUDA[1]
