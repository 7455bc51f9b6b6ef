"""The product of codes with many tokens, at the block sizes of a GPU, beside numpy's of the dequantized matrix."""

from __future__ import annotations

import numpy as np
import pytest

from cobra_edge.decode.cuda.tiles import TILES, gemm_launch
from cobra_edge.formats.packing import QuantizedTensor, pack
from cobra_edge.formats.scheme import scheme_named

from ..tolerance import assert_close

HALF, FLOAT, ADD, SOFTPLUS, PART = range(5)
LARGEST = 65504.0


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


def gemm(emulator, matrix, x, out, epilogue=FLOAT, size=0, bias=None, splits=1, seed=0):
    n_out, n_in = matrix.shape
    tokens, stride = x.shape
    tile = TILES[matrix.bits][size]
    per_split = -(-n_in // splits // 128) * 128
    grid = (-(-tokens // tile.tokens), -(-n_out // tile.rows), splits)
    emulator.run(
        f"gemm_w{matrix.bits}_{tile.name}", grid, tile.threads, matrix.codes, matrix.scales, x, out, bias, n_out, n_in,
        matrix.shift, tokens, stride, out.shape[-1], epilogue, per_split, shared=tile.shared_bytes, seed=seed,
    )  # fmt: skip


def activations(tokens, n_in, seed=1, apart=0):
    x = np.full((tokens, n_in + apart), np.nan, np.float16)
    x[:, :n_in] = np.random.default_rng(seed).normal(0, 1, (tokens, n_in))
    return x


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 63, 129])
@pytest.mark.parametrize(
    "scheme, n_out, n_in",
    [("w4a16-g128", 70, 384), ("w4a16-g32", 65, 96), ("w3a16-g64", 66, 192), ("w8a16-channel", 70, 160), ("fp16", 72, 40)],
)
def test_it_is_the_product(emulator, scheme, n_out, n_in, tokens, size):
    matrix, x = Matrix(scheme, n_out, n_in), activations(tokens, n_in, apart=8)
    out = np.full((tokens, n_out + 2), np.nan, np.float32)
    gemm(emulator, matrix, x, out, size=size)
    assert_close(out[:, :n_out], x[:, :n_in].astype(np.float32) @ matrix.weights.T, "product", "float16")
    assert np.isnan(out[:, n_out:]).all()


@pytest.mark.parametrize("scheme", ["w4a16-g64", "w8a16-g128", "fp16"])
@pytest.mark.parametrize("size", [0, 1, 2])
def test_float16_out_is_saturated_and_what_lies_between_rows_is_left(emulator, scheme, size):
    n_in = 128
    matrix, x = Matrix(scheme, 67, n_in), activations(5, n_in)
    loud = LARGEST / (x.astype(np.float32) @ matrix.weights.T).std()
    x = np.clip(x.astype(np.float32) * loud, -LARGEST, LARGEST).astype(np.float16)
    out = np.full((5, 69), 7, np.float16)  # an odd stride: rows are written one by one
    gemm(emulator, matrix, x, out, HALF, size)
    expected = x.astype(np.float32) @ matrix.weights.T
    assert (np.abs(expected) > LARGEST).any()
    assert_close(out[:, :67], np.clip(expected, -LARGEST, LARGEST), "product", "float16")
    assert (out[:, 67:] == 7).all()


@pytest.mark.parametrize("stride", [66, 67])
def test_it_adds_to_the_residual_stream(emulator, stride):
    matrix, x = Matrix("w4a16-g128", 66, 256), activations(20, 256)
    out = np.random.default_rng(2).normal(0, 1, (20, stride)).astype(np.float32)
    expected = out.copy()
    expected[:, :66] += x.astype(np.float32) @ matrix.weights.T
    gemm(emulator, matrix, x, out, ADD, 1)
    assert_close(out, expected, "product", "float16")


def test_softplus_and_bias_are_part_of_dt_proj(emulator):
    matrix, x = Matrix("fp16", 130, 24), activations(9, 24)  # 24: dt_rank in whole eights
    bias, out = np.random.default_rng(3).normal(0, 3, 130).astype(np.float32), np.full((9, 130), np.nan, np.float32)
    gemm(emulator, matrix, x * np.float16(8), out, SOFTPLUS, bias=bias)
    assert_close(out, np.logaddexp(0, x.astype(np.float32) * 8 @ matrix.weights.T + bias), "product", "float16")


def test_softplus_keeps_its_digits_where_it_is_small_and_does_not_overflow(emulator):
    bias = np.concatenate([np.linspace(-80, 30, 126), [-1e4, 1e30, 20, np.nextafter(np.float32(20), 21)]]).astype(np.float32)
    out = np.full((1, 130), np.nan, np.float32)
    gemm(emulator, Matrix("fp16", 130, 8), np.zeros((1, 8), np.float16), out, SOFTPLUS, bias=bias)
    assert out[0] == pytest.approx(np.logaddexp(0, bias.astype(np.float64)), rel=1e-6, abs=1e-37)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g64", "fp16"])
def test_splits_are_summed_in_their_order(emulator, scheme):
    tokens, n_out, n_in, splits = 21, 70, 448, 3
    matrix, x = Matrix(scheme, n_out, n_in), activations(tokens, n_in)
    parts = np.full((splits, tokens, n_out), np.nan, np.float32)
    gemm(emulator, matrix, x, parts, PART, splits=splits)
    expected = x.astype(np.float32) @ matrix.weights.T
    assert_close(parts.sum(0), expected, "product", "float16")
    for epilogue, dtype in ((HALF, np.float16), (FLOAT, np.float32), (ADD, np.float32)):
        out = np.full((tokens, n_out + 1), 1, dtype)
        emulator.run("sum_splits", (1, tokens), 128, parts, out, splits, tokens, n_out, n_out + 1, epilogue)
        in_order = (parts[0] + parts[1]) + parts[2] + (1 if epilogue == ADD else 0)
        assert np.array_equal(out[:, :n_out], in_order.astype(dtype)) and (out[:, n_out:] == 1).all()


def test_a_projection_is_taken_apart(emulator):
    tokens, dt_rank, low_stride, d_state, states, splits = 3, 10, 16, 12, 16, 2
    parts = np.random.default_rng(0).normal(0, 1, (splits, tokens, dt_rank + 2 * d_state)).astype(np.float32)
    parts[0, 0, 0] = 1e6
    low, bc = np.full((tokens, low_stride), np.nan, np.float16), np.full((tokens, 2, states), np.nan, np.float32)
    emulator.run(
        "split_projection", (1, tokens), 128, parts, low, bc, splits, tokens, dt_rank, low_stride, d_state, states
    )  # fmt: skip
    whole = parts[0] + parts[1]
    assert np.array_equal(low[:, :dt_rank], np.clip(whole[:, :dt_rank], -LARGEST, LARGEST).astype(np.float16))
    assert np.array_equal(bc[:, :, :d_state], whole[:, dt_rank:].reshape(tokens, 2, d_state))
    assert not low[:, dt_rank:].any() and not bc[:, :, d_state:].any()


@pytest.mark.parametrize("bits", TILES)
def test_the_order_of_threads_changes_no_bit(emulator, bits):
    scheme = {3: "w3a16-g64", 4: "w4a16-g64", 8: "w8a16-g128", 16: "fp16"}[bits]
    matrix, x = Matrix(scheme, 130, 256), activations(33, 256)
    outs = [np.full((33, 130), np.nan, np.float32) for _ in range(2)]
    for seed, out in enumerate(outs):
        gemm(emulator, matrix, x, out, FLOAT, 1, seed=seed)
    assert np.array_equal(*outs)


@pytest.mark.parametrize("bits", TILES)
@pytest.mark.parametrize("size", [0, 1, 2])
def test_nothing_outside_is_touched(emulator, bits, size):
    """Odd ends everywhere; also run under AddressSanitizer and UBSan."""
    scheme = {3: "w3a16-g64", 4: "w4a16-g32", 8: "w8a16-channel", 16: "fp16"}[bits]
    matrix, x = Matrix(scheme, 33, 192 if bits == 3 else 160), activations(17, 192 if bits == 3 else 160)
    out = np.full((17, 33), np.nan, np.float32)
    gemm(emulator, matrix, x, out, FLOAT, size)
    assert_close(out, x.astype(np.float32) @ matrix.weights.T, "product", "float16")


def test_codes_and_activations_of_a_full_size_row(emulator):
    """in_proj's width, a slice of its rows: d_model 2560, 768 and some tokens at the tile that a GPU takes."""
    matrix, x = Matrix("w4a16-g128", 8, 2560), activations(65, 2560)
    launch = gemm_launch(4, 10240, 2560, 768, 8)
    assert launch.kernel == "gemm_w4_large" and launch.splits == 1
    out = np.full((65, 8), np.nan, np.float32)
    gemm(emulator, matrix, x, out, FLOAT, 2)
    assert_close(out, x.astype(np.float32) @ matrix.weights.T, "product", "float16")


def test_x_proj_of_the_full_model_in_splits(emulator):
    """d_inner 5120 to dt_rank 160 and two times d_state 16, cut as for a large GPU; then taken apart."""
    n_out, n_in, tokens, dt_rank, d_state = 192, 5120, 3, 160, 16
    matrix, x = Matrix("w4a16-g128", n_out, n_in), activations(tokens, n_in)
    launch = gemm_launch(4, n_out, n_in, tokens, 132)
    assert launch.kernel == "gemm_w4_small" and launch.splits == 10
    parts = np.full((launch.splits, tokens, n_out), np.nan, np.float32)
    gemm(emulator, matrix, x, parts, PART, 0, splits=launch.splits)
    low, bc = np.empty((tokens, dt_rank), np.float16), np.empty((tokens, 2 * d_state), np.float32)
    emulator.run(
        "split_projection", (2, tokens), 128, parts, low, bc, launch.splits, tokens, dt_rank, dt_rank, d_state, d_state
    )
    expected = x.astype(np.float32) @ matrix.weights.T
    assert_close(low, expected[:, :dt_rank], "product", "float16")
    assert_close(bc, expected[:, dt_rank:], "product", "float16")


@pytest.mark.parametrize("bits", TILES)
@pytest.mark.parametrize("tokens", [1, 17, 64, 65, 129, 768, 2048])
@pytest.mark.parametrize("n_out, n_in", [(10240, 2560), (2560, 5120), (192, 5120), (50280, 2560), (70, 96)])
@pytest.mark.parametrize("multiprocessors", [8, 132])
def test_launches_cover_the_matrix_within_what_every_gpu_has(bits, tokens, n_out, n_in, multiprocessors):
    launch = gemm_launch(bits, n_out, n_in, tokens, multiprocessors)
    columns, rows, splits = launch.grid
    assert columns * launch.tile.tokens >= tokens > (columns - 1) * launch.tile.tokens
    assert rows * launch.tile.rows >= n_out > (rows - 1) * launch.tile.rows
    assert splits * launch.inputs_a_split >= n_in > (splits - 1) * launch.inputs_a_split
    assert launch.inputs_a_split % 128 == 0 or splits == 1
    assert launch.tile.shared_bytes <= 99 << 10 and rows <= 65535 and splits <= 65535
