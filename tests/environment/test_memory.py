"""Memory that is freed stays with the process, so that the system does not clear its pages again."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys
from cobra_edge.environment.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import numpy as np

def faults():
    for _ in range(20):
        np.ones(50 * 2**18)  # 100 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = faults()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted as Linux does")
def test_a_block_that_is_freed_is_given_out_again():
    found = {
        how: int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "returned")
    }
    assert found["returned"] > 1000 and found["kept"] < found["returned"] / 100
