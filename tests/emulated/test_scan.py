"""The selective scan over many tokens, in one chunk and in several, beside a loop in float64."""

from __future__ import annotations

import numpy as np
import pytest

from cobra_edge.decode.cuda.tiles import ScanLaunch, scan_launch

from ..tolerance import assert_close


def inputs(tokens, d_inner, d_state, seed=0):
    rng = np.random.default_rng(seed)
    xz = np.full((tokens, 2 * d_inner), np.nan, np.float16)
    xz[:, d_inner:] = rng.normal(0, 1, (tokens, d_inner))
    return {
        "u": rng.normal(0, 1, (tokens, d_inner)).astype(np.float16),
        "delta": rng.uniform(1e-3, 0.3, (tokens, d_inner)).astype(np.float32),
        "A": -rng.uniform(0.5, 16, (d_inner, d_state)).astype(np.float32),
        "B": rng.normal(0, 1, (tokens, d_state)).astype(np.float32),
        "C": rng.normal(0, 1, (tokens, d_state)).astype(np.float32),
        "D": rng.normal(0, 1, d_inner).astype(np.float32),
        "xz": xz,
        "state": rng.normal(0, 1, (d_inner, d_state)).astype(np.float32),
    }


def reference(v):
    """Return y (tokens, d_inner) and the last state, in float64."""
    h, ys = v["state"].astype(np.float64), []
    z = v["xz"][:, v["u"].shape[1] :].astype(np.float64)
    for t in range(len(v["u"])):
        u, delta = v["u"][t].astype(np.float64), v["delta"][t].astype(np.float64)
        h = np.exp(delta[:, None] * v["A"]) * h + (delta * u)[:, None] * v["B"][t]
        ys.append((h @ v["C"][t] + v["D"] * u) * z[t] / (1 + np.exp(-z[t])))
    return np.array(ys), h


def run(emulator, v, launch, seed=0):
    """Return y, and leave the last state in v["state"]."""
    tokens, d_inner = v["u"].shape
    d_state, states = v["A"].shape[1], launch.states
    bc = np.zeros((tokens, 2, states), np.float32)
    bc[:, 0, :d_state], bc[:, 1, :d_state] = v["B"], v["C"]
    local = np.full((launch.chunks, states, d_inner), np.nan, np.float32)
    sums = np.full((launch.chunks, d_inner), np.nan, np.float32)
    sizes = (d_inner, d_state, launch.lanes)
    if launch.chunks > 1:
        assert local.size + sums.size == launch.local_floats(d_inner)
        emulator.run(
            "scan_chunks", (launch.blocks, launch.chunks - 1), launch.threads, v["u"], v["delta"], v["A"], bc, v["state"],
            local, sums, launch.length, *sizes, d_inner, seed=seed,
        )  # fmt: skip
    y = np.full((tokens, d_inner + 8), 7, np.float16)
    z = np.ascontiguousarray(v["xz"][:, d_inner:])
    emulator.run(
        "scan_rows", (launch.blocks, launch.chunks), launch.threads, v["u"], v["delta"], v["A"], bc, v["D"], z, v["state"],
        local, sums, y, tokens, launch.length, *sizes, d_inner, d_inner, d_inner + 8, seed=seed,
    )  # fmt: skip
    assert (y[:, d_inner:] == 7).all()
    return y[:, :d_inner]


def cut(d_inner, d_state, tokens, chunks):
    """Return the launch with as many chunks as asked for, whatever pays."""
    whole = scan_launch(d_inner, d_state, tokens, 1)
    length = -(-tokens // chunks)
    return ScanLaunch(whole.lanes, length, -(-tokens // length), whole.blocks)


@pytest.mark.parametrize("tokens", [1, 63, 129])
@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("d_inner, d_state", [(200, 16), (33, 7), (50, 40)])
def test_it_is_the_recurrence(emulator, tokens, chunks, d_inner, d_state):
    v = inputs(tokens, d_inner, d_state)
    expected, last = reference(v)
    launch = cut(d_inner, d_state, tokens, chunks)
    assert_close(run(emulator, v, launch), expected, "scan", "float16")
    assert_close(v["state"], last, "scan")


def test_all_channels_of_the_full_model(emulator):
    v = inputs(5, 5120, 16)
    expected, last = reference(v)
    assert_close(run(emulator, v, cut(5120, 16, 5, 2)), expected, "scan", "float16")
    assert_close(v["state"], last, "scan")


def test_the_state_is_carried_from_call_to_call(emulator):
    v = inputs(70, 40, 16)
    whole, last = reference(v)
    parts = []
    for part, chunks in ((slice(0, 1), 1), (slice(1, 40), 3), (slice(40, 70), 1)):
        some = v | {name: v[name][part] for name in ("u", "delta", "B", "C", "xz")}
        parts.append(run(emulator, some, cut(40, 16, len(some["u"]), chunks)))
    assert_close(np.concatenate(parts), whole, "scan", "float16")
    assert_close(v["state"], last, "scan")


def test_a_state_decays_to_nothing_and_nothing_overflows(emulator):
    v = inputs(40, 16, 16)
    v["delta"][:] = 50  # exp(-800) is 0 in float32
    v["u"][:, 0] = 60000
    expected, last = reference(v)
    got = run(emulator, v, cut(16, 16, 40, 4))
    assert_close(got, np.clip(expected, -65504, 65504), "scan", "float16")
    assert_close(v["state"], last, "scan")


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_order_of_threads_changes_no_bit(emulator, chunks):
    found = []
    for seed in range(2):
        v = inputs(50, 130, 16)
        found.append((run(emulator, v, cut(130, 16, 50, chunks), seed=seed), v["state"]))
    assert np.array_equal(found[0][0], found[1][0]) and np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("d_inner, d_state", [(33, 7), (20, 16), (9, 33)])
def test_nothing_outside_is_touched(emulator, d_inner, d_state):
    v = inputs(13, d_inner, d_state)
    expected, _ = reference(v)
    assert_close(run(emulator, v, cut(d_inner, d_state, 13, 3)), expected, "scan", "float16")


def test_a_small_gpu_does_the_exponentials_once_and_a_large_one_is_filled():
    assert scan_launch(5120, 16, 768, 8).chunks == 1
    large = scan_launch(5120, 16, 768, 132)
    assert large.blocks * 4 * large.chunks >= 2 * 4 * 132
    assert scan_launch(5120, 16, 63, 132).chunks == 1
    assert scan_launch(5120, 16, 4096, 132).length * scan_launch(5120, 16, 4096, 132).chunks >= 4096
    assert scan_launch(5120, 64, 16, 8).lanes == 4 and scan_launch(5120, 256, 16, 8).lanes == 16
