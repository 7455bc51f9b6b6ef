"""The product with one token's activations, at the block sizes of a GPU, beside numpy."""

import numpy as np
import pytest

from ..tolerance import assert_close, distance
from .matrices import random_matrix, rounded_bytes

TILE = 8192


def multiply(emulator, matrix, x, out, *, norm=None, mean_of=None, eps=1e-5, add=False, split=False, seed=0):
    n_out, n_in = matrix.dense.shape
    room = 4 * min(matrix.layout, TILE) if matrix.bits == 16 else rounded_bytes(min(n_in, TILE), matrix.bits)
    if mean_of is x:
        mean_of = x.copy()  # arrays are copied to the device one by one
    emulator.run(
        f"gemv_w{matrix.bits}" + "_split" * split, -(-n_out // (16 if split else 64)), 128, *matrix.arrays, x, norm, mean_of,
        eps, out, n_out, n_in, matrix.layout, int(add), shared=512 + room, seed=seed,
    )  # fmt: skip


def activations(n, seed=0):
    x = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    x[n // 3] *= 40  # one as loud as a model's
    return x


CODES = ["w8a16-channel", "w8a16-g128", "w4a16-g128", "w4a16-g64", "w4a16-g32", "w3a16-g64"]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("scheme", CODES)
def test_codes(emulator, scheme, split):
    matrix, x = random_matrix(scheme, 70, 384), activations(384)
    out = np.full(70, np.nan, np.float32)
    multiply(emulator, matrix, x, out, split=split)
    assert_close(out, matrix.dense @ x, "product", "int16")


@pytest.mark.parametrize(
    "scheme, n_out, n_in", [("w4a16-g32", 1, 32), ("w8a16-channel", 17, 160), ("w3a16-g64", 65, 192), ("w4a16-g64", 64, 64)]
)
def test_sizes_that_fill_no_group(emulator, scheme, n_out, n_in):
    matrix, x = random_matrix(scheme, n_out, n_in), activations(n_in)
    for split in (False, True):
        out = np.full(n_out, np.nan, np.float32)
        multiply(emulator, matrix, x, out, split=split)
        assert_close(out, matrix.dense @ x, "product", "int16")


@pytest.mark.parametrize("scheme", ["w4a16-g128", "w3a16-g64", "fp16"])
def test_more_inputs_than_shared_memory_has_room_for(emulator, scheme):
    matrix, x, norm = random_matrix(scheme, 3, TILE + 256), activations(TILE + 256), activations(TILE + 256, 1)
    for split in (False, True):
        out = np.full(3, np.nan, np.float32)
        multiply(emulator, matrix, x, out, norm=norm, mean_of=x, split=split)
        root = 1 / np.sqrt((x.astype(np.float64) ** 2).mean() + 1e-5)
        assert_close(out, matrix.dense @ (x * norm) * root, "product", "float32" if scheme == "fp16" else "int16")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("n_in", [384, 8, 37])
def test_float16(emulator, n_in, split):
    matrix, x = random_matrix("fp16", 70, n_in), activations(n_in)
    out = np.full(70, np.nan, np.float32)
    multiply(emulator, matrix, x, out, split=split)
    assert_close(out, matrix.dense @ x, "product", "float32")


@pytest.mark.parametrize("scheme", ["w4a16-g128", "fp16"])
def test_normed_before_and_added_after(emulator, scheme):
    matrix, x, norm, other = random_matrix(scheme, 70, 256), activations(256), activations(256, 1), activations(256, 2)
    kind = "float32" if scheme == "fp16" else "int16"
    for mean_of in (x, other):
        out = activations(70, 3)
        expected = out + matrix.dense @ (x * norm) / np.sqrt((mean_of**2).mean() + np.float32(1e-5))
        multiply(emulator, matrix, x, out, norm=norm, mean_of=mean_of, add=True)
        assert_close(out, expected, "product", kind)


@pytest.mark.parametrize("scheme", ["w8a16-g128", "w4a16-g128", "w3a16-g64", "fp16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_carried_through(emulator, scheme, value):
    matrix, x = random_matrix(scheme, 20, 256), activations(256)
    x[77] = value
    out = np.zeros(20, np.float32)
    multiply(emulator, matrix, x, out)
    assert not np.isfinite(out).any()


def test_zeros_and_the_smallest_numbers(emulator):
    matrix = random_matrix("w4a16-g128", 20, 256)
    for value in (0.0, 1e-38, 1e-45):
        out = np.full(20, np.nan, np.float32)
        multiply(emulator, matrix, np.full(256, value, np.float32), out)
        assert np.isfinite(out).all() and np.abs(out).max() <= 1e-33 * 256


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("scheme", ["w4a16-g64", "fp16"])
def test_the_same_bits_in_any_order_of_threads(emulator, scheme, split):
    matrix, x, found = random_matrix(scheme, 70, 384), activations(384), []
    for seed in (1, 2):
        found.append(np.full(70, np.nan, np.float32))
        multiply(emulator, matrix, x, found[-1], mean_of=x, split=split, seed=seed)
    assert np.array_equal(*found)


def test_integers_are_nearer_than_float16(emulator):
    matrix, x = random_matrix("w4a16-g128", 70, 384), np.random.default_rng(5).standard_normal(384).astype(np.float32)
    out = np.full(70, np.nan, np.float32)
    multiply(emulator, matrix, x, out)
    exact = matrix.dense.astype(np.float64) @ x
    assert distance(out, exact)[0] < distance(matrix.dense @ x.astype(np.float16).astype(np.float32), exact)[0] / 3
