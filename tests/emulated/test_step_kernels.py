"""The other kernels of one token, each beside numpy."""

import numpy as np
import pytest

from cobra_edge.decode.numpy_reference import causal_conv, selective_scan, silu, softplus
from cobra_edge.formats.hadamard import hadamard_factors, hadamard_matrix, rotate, unrotate

from ..tolerance import assert_close
from .matrices import random_matrix, rounded_bytes

SCHEMES = ["fp16", "w8a16-channel", "w8a16-g128", "w4a16-g128", "w4a16-g32", "w3a16-g64"]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scheme, n_inner, n_rows, d_conv", [
    *((scheme, 384, 40, 4) for scheme in SCHEMES),
    ("w4a16-g32", 160, 3, 2), ("w3a16-g64", 192, 65, 8), ("fp16", 130, 9, 3), ("fp16", 77, 200, 4), ("w8a16-channel", 32, 1, 4),
])  # fmt: skip
def test_convolution_and_x_proj(emulator, scheme, n_inner, n_rows, d_conv):
    rng = np.random.default_rng(n_inner)
    matrix, layer, n_layer = random_matrix(scheme, n_rows, n_inner), 1, 3
    xz, taps, bias = normal(rng, 2 * n_inner), normal(rng, n_inner, d_conv), normal(rng, n_inner)
    state = normal(rng, n_layer, n_inner, d_conv)
    expected_state = state.copy()
    expected_u = causal_conv(xz[None, :n_inner], expected_state[layer], taps, bias)[0]
    found = []
    for seed in (0, 1):
        blocks = -(-n_inner // 128)
        u, projected = np.full(n_inner, np.nan, np.float32), np.full(n_rows, np.nan, np.float32)
        partials, arrived = np.full((blocks, n_rows), np.nan, np.float32), np.zeros(1, np.uint32)
        address = emulator.address_of(state)
        emulator.run(
            f"conv_step_w{matrix.bits}", blocks, 128, *matrix.arrays, xz, np.array([address], np.uint64), layer, taps, bias, u,
            partials, projected, arrived, n_rows, n_inner, d_conv, matrix.layout,
            shared=1024 + rounded_bytes(128, min(matrix.bits, 8)), seed=seed,
        )  # fmt: skip
        moved = emulator.fetch(address, state)
        assert np.array_equal(moved, expected_state) and arrived[0] == 0
        found.append((u, projected))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    assert_close(u, expected_u, "convolution")
    assert_close(projected, matrix.dense @ expected_u, "product", "float32" if scheme == "fp16" else "int16")


def test_silu_digit_by_digit(emulator):
    """Of the biases: where the taps are zeros nothing else is left of a convolution."""
    bias = np.concatenate([np.linspace(-80, 80, 124), [-1e4, -200, 200, 1e30]]).astype(np.float32)
    matrix, u, projected = random_matrix("fp16", 1, 128), np.full(128, np.nan, np.float32), np.empty(1, np.float32)
    address = emulator.address_of(np.zeros((1, 128, 2), np.float32))
    emulator.run(
        "conv_step_w16", 1, 128, *matrix.arrays, np.ones(256, np.float32), np.array([address], np.uint64), 0,
        np.zeros((128, 2), np.float32), bias, u, np.empty((1, 1), np.float32), projected, np.zeros(1, np.uint32), 1, 128, 2,
        matrix.layout, shared=1024 + rounded_bytes(128, 8),
    )  # fmt: skip
    wide = bias.astype(np.float64)
    assert u == pytest.approx(wide / (1 + np.exp(np.minimum(-wide, 700))), rel=1e-5, abs=1e-37)


@pytest.mark.parametrize("scheme, n_inner, dt_rank, d_state", [
    ("fp16", 64, 8, 16), ("fp16", 100, 7, 16), ("fp16", 33, 12, 5), ("fp16", 16, 1, 1), ("fp16", 24, 40, 256),
    ("w8a16-channel", 64, 160, 16), ("w8a16-g128", 50, 128, 16), ("w8a16-channel", 16, 32, 3),
])  # fmt: skip
def test_selective_state_update(emulator, scheme, n_inner, dt_rank, d_state):
    rng = np.random.default_rng(n_inner)
    matrix, layer = random_matrix(scheme, n_inner, dt_rank), 1
    projected, xz, u = normal(rng, dt_rank + 2 * d_state), normal(rng, 2 * n_inner), normal(rng, n_inner)
    bias, D, A = normal(rng, n_inner), normal(rng, n_inner), -np.exp(normal(rng, n_inner, d_state))
    bias[0] = 30  # softplus is the identity there
    state = normal(rng, 2, n_inner, d_state)
    low, B, C = np.split(projected, [dt_rank, dt_rank + d_state])
    dt = softplus(matrix.dense @ low + bias)
    h = state[layer].copy()
    expected = (selective_scan(u[None], dt[None], A, B[None], C[None], h)[0] + D * u) * silu(xz[n_inner:])
    found = []
    for seed in (0, 1):
        y, address = np.full(n_inner, np.nan, np.float32), emulator.address_of(state)
        shared = -(-4 * (dt_rank + 2 * d_state) // 16) * 16 + (rounded_bytes(dt_rank, 8) if matrix.bits == 8 else 0)
        emulator.run(
            f"selective_state_update_w{matrix.bits}", -(-n_inner // 16), 128, projected, *matrix.arrays, bias, A, D, xz, u,
            np.array([address], np.uint64), layer, y, n_inner, dt_rank, d_state, matrix.layout, shared=shared, seed=seed,
        )  # fmt: skip
        found.append((y, emulator.fetch(address, state)))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    kind = "float32" if scheme == "fp16" else "int16"
    assert_close(y, expected, "scan", kind)
    assert_close(found[0][1][layer], h, "scan", kind)
    assert np.array_equal(found[0][1][0], state[0])


@pytest.mark.parametrize(
    "width, power", [(512, 512), (512, 64), (1536, 128), (5120, 256), (24, 2), (8, 8), (40, 2), (12, 1), (2048, 1024)]
)
def test_rotation(emulator, width, power):
    base, _ = hadamard_factors(width)
    rng = np.random.default_rng(width)
    whole = -(-width // power)
    m_times_a = np.kron(hadamard_matrix(base) if base > 1 else np.ones((1, 1), np.float32), hadamard_matrix(whole // base))
    x, after = normal(rng, 3, width), normal(rng, width)
    for signs, expected in ((m_times_a, rotate(x)), (np.ascontiguousarray(m_times_a.T), unrotate(x))):
        for weight in (None, after):
            out = np.full_like(x, np.nan)
            emulator.run("rotate", (whole, 3), 256, x, signs, weight, out, whole, power, float(width**-0.5), shared=4 * power)
            assert_close(out, expected if weight is None else expected * weight, "rotation")
