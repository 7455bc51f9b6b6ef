"""Convolution, norm, rotation and embedding of many tokens on the emulator, beside numpy."""

from __future__ import annotations

import numpy as np
import pytest

from cobra_edge.decode.cuda.tiles import ROW_THREADS, convolution_launch, norm_shared_bytes, rotation_shared_bytes
from cobra_edge.formats.hadamard import hadamard_factors, hadamard_matrix, rotate, unrotate
from cobra_edge.formats.packing import QuantizedTensor, pack
from cobra_edge.formats.scheme import scheme_named

from ..tolerance import assert_close

LARGEST = 65504.0


def sign_words(order: int, transposed: bool = False) -> np.ndarray:
    """Return the signs of H_m (m, (m + 31) / 32) uint32: bit k of row i is 1 where its entry is -1."""
    matrix = hadamard_matrix(order)
    bits = (matrix.T if transposed else matrix) < 0
    words = np.zeros((order, -(-order // 32)), np.uint32)
    for k in range(order):
        words[:, k // 32] |= bits[:, k].astype(np.uint32) << np.uint32(k % 32)
    return words


def silu(x):
    return x / (1 + np.exp(-x))


def convolve(emulator, x, state, taps, bias, seed=0):
    tokens, stride = x.shape
    d_inner, d_conv = taps.shape
    kernel, grid, threads, length = convolution_launch(d_inner, d_conv, tokens)
    out = np.full((tokens, d_inner), np.nan, np.float16)
    emulator.run(
        kernel, grid, threads, x, state, taps, bias, out, tokens, length, d_inner, d_conv, stride, seed=seed
    )  # fmt: skip
    return out


def convolution_inputs(tokens, d_inner, d_conv):
    rng = np.random.default_rng(0)
    x = np.full((tokens, 2 * d_inner), np.nan, np.float16)
    x[:, :d_inner] = rng.normal(0, 1, (tokens, d_inner))
    state, taps = (rng.normal(0, 1, (d_inner, d_conv)).astype(np.float32) for _ in range(2))
    return x, state, taps, rng.normal(0, 1, d_inner).astype(np.float32)


def convolution_reference(x, state, taps, bias):
    d_inner, d_conv = taps.shape
    window = np.concatenate([state.T.astype(np.float64), x[:, :d_inner].astype(np.float64)])
    rows = [silu(bias + sum(window[t + 1 + k] * taps[:, k] for k in range(d_conv))) for t in range(len(x))]
    return np.array(rows), window[-d_conv:].T


@pytest.mark.parametrize("tokens", [1, 3, 63, 129])
@pytest.mark.parametrize("d_inner, d_conv", [(130, 4), (33, 2), (20, 7), (9, 8), (5120, 4)])
def test_the_convolution_carries_its_window(emulator, tokens, d_inner, d_conv):
    x, state, taps, bias = convolution_inputs(tokens, d_inner, d_conv)
    expected, window = convolution_reference(x, state, taps, bias)
    assert_close(convolve(emulator, x, state, taps, bias), expected, "convolution", "float16")
    assert np.array_equal(state, window.astype(np.float32))


def test_the_order_of_threads_changes_no_bit_of_a_convolution(emulator):
    x, state, taps, bias = convolution_inputs(40, 33, 4)
    expected, _ = convolution_reference(x, state, taps, bias)
    outs = [convolve(emulator, x, state.copy(), taps, bias, seed) for seed in range(2)]
    assert_close(outs[0], expected, "convolution", "float16")
    assert np.array_equal(*outs)


def test_a_prompt_in_parts_is_convolved_to_the_same_bits(emulator):
    x, state, taps, bias = convolution_inputs(40, 33, 4)
    again = state.copy()
    whole = convolve(emulator, x, state, taps, bias)
    parts = [convolve(emulator, x[some], again, taps, bias) for some in (slice(0, 33), slice(33, 35), slice(35, 40))]
    assert np.array_equal(np.concatenate(parts), whole) and np.array_equal(again, state)


@pytest.mark.parametrize("width", [256, 2560, 100, 33])
def test_the_norm(emulator, width):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 3, (5, width)).astype(np.float32)
    x[0, 0], x[4] = 1e5, 0
    weight = rng.normal(0, 1, width).astype(np.float32)
    weight[0] = 1e5
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * weight
    outs = [np.full((5, width + 8), 7, np.float16) for _ in range(2)]
    for seed, out in enumerate(outs):
        emulator.run(
            "norm_rows", 5, ROW_THREADS, x, weight, out, width, width + 8, 1e-5, shared=norm_shared_bytes(), seed=seed
        )  # fmt: skip
    assert_close(outs[0][:, :width], np.clip(expected, -LARGEST, LARGEST), "norm", "float16")
    assert (outs[0][:, width:] == 7).all() and np.array_equal(*outs)


def test_a_norm_of_what_is_not_a_number_is_none(emulator):
    out = np.zeros((2, 96), np.float16)
    x = np.ones((2, 96), np.float32)
    x[1, 5] = np.nan
    weight = np.ones(96, np.float32)
    emulator.run("norm_rows", 2, ROW_THREADS, x, weight, out, 96, 96, 1e-5, shared=norm_shared_bytes())
    assert (out[0] == 1).all() and np.isnan(out[1]).all()


WIDTHS = [256, 1536, 5120, 12, 1]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("back", [False, True])
def test_the_rotation(emulator, width, back):
    m, p = hadamard_factors(width)
    x = np.random.default_rng(0).normal(0, 1, (3, width)).astype(np.float32)
    expected = unrotate(x) if back else rotate(x)
    signs = sign_words(m, transposed=back) if m > 1 else None
    for source in (np.float32, np.float16):
        for target in (np.float32, np.float16):
            out = np.full((3, width), np.nan, target)
            emulator.run(
                "rotate_rows", 3, ROW_THREADS, x.astype(source), signs, out, m, p, width, width, int(source is np.float16),
                int(target is np.float16), shared=rotation_shared_bytes(width), seed=1,
            )  # fmt: skip
            exact = source is np.float32 and target is np.float32
            assert_close(out, expected, "rotation", "float32" if exact else "float16")


def test_a_rotation_in_place_saturates(emulator):
    x = np.zeros((2, 64), np.float16)
    x[:, :16] = 60000
    expected = np.clip(rotate(x.astype(np.float32)), -LARGEST, LARGEST)
    assert np.abs(expected).max() == LARGEST
    emulator.run("rotate_rows", 2, ROW_THREADS, x, None, x, 1, 64, 64, 64, 1, 1, shared=rotation_shared_bytes(64))
    assert_close(x, expected, "rotation", "float16")


@pytest.mark.parametrize("width", [256, 2560, 12])
def test_the_norm_between_rotations(emulator, width):
    m, p = hadamard_factors(width)
    rng = np.random.default_rng(0)
    x, weight = rng.normal(0, 2, (3, width)).astype(np.float32), rng.normal(1, 0.3, width).astype(np.float32)
    turned = unrotate(x).astype(np.float64)
    expected = rotate((turned / np.sqrt((turned**2).mean(1, keepdims=True) + 1e-5) * weight).astype(np.float32))
    signs = (sign_words(m), sign_words(m, transposed=True)) if m > 1 else (None, None)
    outs = [np.full((3, width), np.nan, np.float32) for _ in range(2)]
    for seed, out in enumerate(outs):
        emulator.run(
            "norm_between_rotations", 3, ROW_THREADS, x, *signs, weight, out, m, p, width, width, 0, 1e-5,
            shared=rotation_shared_bytes(width, with_norm=True), seed=seed,
        )  # fmt: skip
    assert_close(outs[0], expected, "rotation", "float32")
    assert np.array_equal(*outs)


@pytest.mark.parametrize("name", ["fp16", "w8a16-channel", "w8a16-g128", "w4a16-g32", "w4a16-g128", "w3a16-g64"])
def test_embeddings_are_rows_of_the_matrix(emulator, name):
    scheme, width, rng = scheme_named(name), 384, np.random.default_rng(0)
    tokens = np.array([4, 0, 4, 9], np.int32)
    out = np.full((4, width), np.nan, np.float32)
    if scheme.weight_bits == 16:
        codes, scales, shift = rng.normal(0, 1, (10, width)).astype(np.float16), None, 31
        expected = codes[tokens].astype(np.float32)
    else:
        group = scheme.group(width)
        codes = pack(rng.integers(0, 1 << scheme.weight_bits, (10, width), dtype=np.uint8), scheme)
        scales = rng.uniform(0.005, 0.02, (10, width // group)).astype(np.float16)
        shift = 31 if scheme.group_size == "row" else group.bit_length() - 1
        expected = QuantizedTensor(codes, scales, scheme).rows(tokens).dequantize()
    emulator.run(f"embed_rows_w{scheme.weight_bits}", 4, 128, codes, scales, tokens, out, width, shift)
    assert np.array_equal(out, expected)
