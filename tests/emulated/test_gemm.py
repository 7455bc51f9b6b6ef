"""The product of codes with many tokens, at the block sizes of a GPU, beside numpy's of the dequantized matrix."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from cobra_edge.formats.packing import QuantizedTensor, pack
from cobra_edge.formats.scheme import Scheme, scheme_named

from ..tolerance import assert_close
from .kernels import Emulator

HALF, FLOAT, ADD, SOFTPLUS, PART = range(5)
LARGEST = 65504.0


@cache
def emulator(kind: str = "checked") -> Emulator:
    return Emulator(kind)


class Matrix:
    """Random weights (out, in), what a kernel reads of them, and the weights that its float16 products see."""

    def __init__(self, scheme: str, n_out: int, n_in: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shape, self.scheme = (n_out, n_in), scheme_named(scheme)
        self.bits = self.scheme.weight_bits
        if self.bits == 16:
            self.codes = rng.normal(0, 0.1, (n_out, n_in)).astype(np.float16)
            self.scales, self.shift, self.weights = None, 31, self.codes.astype(np.float32)
            return
        group = self.scheme.group(n_in)
        codes = rng.integers(0, 1 << self.bits, (n_out, n_in), dtype=np.uint8)
        self.scales = rng.uniform(0.005, 0.02, (n_out, n_in // group)).astype(np.float16)
        self.codes = pack(codes, self.scheme)
        self.weights = QuantizedTensor(self.codes, self.scales, self.scheme).dequantize()
        self.shift = 31 if self.scheme.group_size == "row" else group.bit_length() - 1


SIZES = {
    "small": (64, 16, {4: (4096, 6), 3: (3072, 6), 8: (8192, 4), 16: (8192, 4)}),
    "medium": (128, 64, {4: (8192, 2), 3: (6144, 2), 8: (16384, 2), 16: (16384, 2)}),
    "large": (None, 128, {4: (16384, 2), 3: (6144, 2), 8: (16384, 2), 16: (16384, 3)}),
}


def launch_shape(bits, size):
    rows, tokens, stages = SIZES[size]
    rows = rows or (256 if bits == 4 else 128)
    codes_bytes, n_stages = stages[bits]
    token_bytes = 128 if bits == 16 else 256
    threads = 256 if size == "large" and bits != 16 else 128
    return rows, tokens, threads, n_stages * (codes_bytes + tokens * token_bytes)


def gemm(matrix, x, out, epilogue=FLOAT, size="small", bias=None, splits=1, kind="checked", seed=0):
    n_out, n_in = matrix.shape
    tokens, stride = x.shape
    rows, width, threads, shared = launch_shape(matrix.bits, size)
    per_split = -(-n_in // splits // 128) * 128 if splits > 1 else n_in
    grid = (-(-tokens // width), -(-n_out // rows), splits)
    emulator(kind).run(
        f"gemm_w{matrix.bits}_{size}", grid, threads, matrix.codes, matrix.scales, x, out, bias, n_out, n_in, matrix.shift,
        tokens, stride, out.shape[-1], epilogue, per_split, shared=shared, seed=seed,
    )  # fmt: skip


def activations(tokens, n_in, seed=1, apart=0):
    x = np.full((tokens, n_in + apart), np.nan, np.float16)
    x[:, :n_in] = np.random.default_rng(seed).normal(0, 1, (tokens, n_in))
    return x


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [1, 63, 129])
@pytest.mark.parametrize(
    "scheme, n_out, n_in",
    [("w4a16-g128", 70, 384), ("w4a16-g32", 65, 96), ("w3a16-g64", 66, 192), ("w8a16-channel", 70, 160), ("fp16", 72, 40)],
)
def test_it_is_the_product(scheme, n_out, n_in, tokens, size):
    matrix, x = Matrix(scheme, n_out, n_in), activations(tokens, n_in, apart=8)
    out = np.full((tokens, n_out + 2), np.nan, np.float32)
    gemm(matrix, x, out, size=size)
    assert_close(out[:, :n_out], x[:, :n_in].astype(np.float32) @ matrix.weights.T, "product", "float16")
    assert np.isnan(out[:, n_out:]).all()
