"""Faults planted in the kernels of many tokens: the emulator names each, where a GPU would give wrong numbers now and then."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

from .build import KERNELS
from .kernels import Emulator, KernelError
from .test_gemm import Matrix, activations, gemm
from .test_rows import sign_words
from .test_scan import cut, inputs, run

OUTSIDE = "outside|no allocation|bounds|not allocated"
# A fault: the file it is planted in, a pattern that is there once, what is put in its place, and what the emulator has to say.
FAULTS = {
    "no-wait": ("gemm.cu", r"wait_copies<STAGES - 2>\(\);", "", "copy|copies|race"),
    "no-barrier-of-a-stage": ("gemm.cu", r"sync_block\(\);  // the stage is there.*", "", "race|copy"),
    "no-barrier-before-results": ("gemm.cu", r"sync_block\(\);  // the last stage has been read.*", "", "race"),
    "no-warp-barrier": ("gemm.cu", r"(sums\[m\]\[n\]\[2 \+ k\]\)\);\s+)sync_warp\(\);", r"\1", "race"),
    "rows-behind": ("gemm.cu", r"rows_left > 0 && (inside > 0)", r"\1", OUTSIDE),
    "tokens-behind": ("gemm.cu", r"token < tokens && (row < n_out\) output.put)", r"\1", OUTSIDE),
    "misaligned": ("gemm.cu", r"t \* 16 \+ h \* 8\)", "t * 16 + h * 4)", "multiple|align"),
    "no-barrier-after-a-round": ("norm_rows.cu", r"(store\(at \+ half, a - b\);\s+\}\s+)sync_block\(\);", r"\1", "race"),
    "no-barrier-after-reading": (
        "norm_rows.cu",
        r"sync_block\(\);\s+(butterflies\(row, width, p\);\s+const size_t)",
        r"\1",
        "race",
    ),
    "half-a-mask": ("norm_rows.cu", r"shuffle_xor\(v, d\)", "shuffle_xor(v, d, 0xffffu)", "mask"),
    "state-of-a-neighbour": ("scan.cu", r"if \(place.inside\) (read_states\(state)", r"\1", "race"),
    "state-of-the-last-chunk": ("scan.cu", r"if \(gridDim.y == 1\)", "if (chunk == 0)", "race"),
}


class Renamed:
    """An emulator whose kernels have a fault's number behind their names."""

    def __init__(self, emulator, number):
        self._emulator, self._number = emulator, number

    def run(self, name, *arguments, **options):
        self._emulator.run(f"{name}_{self._number}", *arguments, **options)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Return, by the fault's name, the kernels that have it: all compiled into one library, each under names of its own."""
    folder = tmp_path_factory.mktemp("faults")
    for header in KERNELS.glob("*.cuh"):
        shutil.copy(header, folder)
    for number, (file, old, new, _) in enumerate(FAULTS.values()):
        text, times = re.subn(old, new, (KERNELS / file).read_text())
        assert times == 1, f"{file} has {old!r} {times} times"
        # Of the products only the smallest of 4 bits, which compiles soon.
        text = re.sub(r"^COBRA_GEMM\((?!4, small).*\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"^(namespace |\s+using namespace )(\w+)", rf"\1\2_{number}", text, flags=re.MULTILINE)
        text = re.sub(r"\b(gemm|splits|rows|scan)::", rf"\1_{number}::", text)
        for kernel in re.findall(r"COBRA_EXPORT\((\w+)\)|COBRA_EXPORT\((gemm_w##BITS##_##SIZE)\)", text):
            name = kernel[0] or kernel[1]
            text = re.sub(rf"{re.escape(name)}\b", f"{name}##_{number}" if "##" in name else f"{name}_{number}", text)
        (folder / f"fault_{number}.cu").write_text(text)
    emulator = Emulator("checked", folder)
    return {name: Renamed(emulator, number) for number, name in enumerate(FAULTS)}


def use(file, emulator):
    """Launch a kernel of a file at sizes that have odd ends."""
    if file == "gemm.cu":
        # The last stage lies where results are staged afterwards.
        out = np.full((15, 65), np.nan, np.float32)
        gemm(emulator, Matrix("w4a16-g128", 65, 896), activations(15, 896), out)
    elif file == "scan.cu":
        for chunks in (1, 3):
            run(emulator, inputs(30, 33, 7), cut(33, 7, 30, chunks))
    else:
        x = np.ones((1, 384), np.float32)
        emulator.run("norm_rows", 1, 256, x, x[0].copy(), np.empty((1, 384), np.float16), 384, 384, 1e-5, shared=32)
        signs, out = sign_words(12), np.empty((1, 384), np.float32)
        emulator.run("rotate_rows", 1, 256, x, signs, out, 12, 32, 384, 384, 0, 0, shared=4 * 384)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(faulty, name):
    with pytest.raises(KernelError, match=FAULTS[name][3]):
        use(FAULTS[name][0], faulty[name])


@pytest.mark.parametrize("file", ["gemm.cu", "norm_rows.cu", "scan.cu"])
def test_without_a_fault_nothing_is_named(emulator, file):
    use(file, emulator)
