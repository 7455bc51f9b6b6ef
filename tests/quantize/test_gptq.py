"""GPTQ against the textbook's update in float64, and second moments that are hard to factorize."""

import logging

import numpy as np
import pytest

from cobra_edge.errors import InputError
from cobra_edge.formats.packing import unpack
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.quantize.gptq import gptq, inverse_factor
from cobra_edge.quantize.rtn import round_to_nearest
from cobra_edge.quantize.scales import least_error_scales

INT = [s for s in SCHEMES.values() if s.group_size and s.code_format == "int"]
W4 = SCHEMES["w4a16-g64"]


def case(out, n_in, seed=0, positions=None):
    """Return a weight (out, n_in) and the second moment of correlated inputs with outliers, float32."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(n_in) + 0.5 * rng.standard_normal((n_in, n_in)) / np.sqrt(n_in)
    magnitudes = np.exp(rng.standard_normal(n_in))
    x = rng.standard_normal((positions or 4 * n_in, n_in)) @ mixing * magnitudes
    return rng.standard_normal((out, n_in)).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def naive_gptq(weight, second_moment, scales, scheme, damping=0.01):
    """Return unsigned codes: one column after the other, the inverse Hessian explicit, float64."""
    n_in = weight.shape[1]
    w, steps = weight.astype(np.float64), np.repeat(scales.astype(np.float64), scheme.group(n_in), axis=1)
    h = second_moment.astype(np.float64)
    inverse = np.linalg.inv(h + damping * np.diagonal(h).mean() * np.eye(n_in))
    codes, left = np.zeros(weight.shape, np.int64), list(range(n_in))
    for j in sorted(range(n_in), key=lambda j: -second_moment[j, j]):
        step = steps[:, j]
        code = np.clip(
            np.rint(np.divide(w[:, j], step, out=np.zeros_like(step), where=step != 0)), -scheme.zero_code, scheme.zero_code - 1
        )
        codes[:, j] = code + scheme.zero_code
        error = (w[:, j] - code * step) / inverse[j, j]
        left.remove(j)
        w[:, left] -= np.outer(error, inverse[j, left])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def objective(weight, quantized, second_moment):
    """Return tr(ΔW H ΔWᵀ), float64."""
    difference = quantized.dequantize().astype(np.float64) - weight
    return float(np.einsum("oi,ij,oj->", difference, second_moment.astype(np.float64), difference))


def codes_of(quantized):
    return unpack(quantized.codes, quantized.scheme).astype(int)


@pytest.mark.parametrize("scheme", INT, ids=lambda s: s.name)
@pytest.mark.parametrize("out", [1, 7, 63])
@pytest.mark.parametrize("n_in", [128, 256])
def test_gptq_is_the_textbooks(scheme, out, n_in):
    weight, second_moment = case(out, n_in, seed=out)
    quantized = gptq(weight, second_moment, scheme)
    assert np.array_equal(quantized.scales, least_error_scales(weight, scheme))
    expected = naive_gptq(weight, second_moment, quantized.scales, scheme)
    got = codes_of(quantized)
    # A weight that falls on the other side of a half in float32 changes what later columns of its row make up for.
    assert (got == expected).mean() >= (0.995 if out > 1 else 0.98)
    reference = np.repeat(quantized.scales.astype(np.float64), scheme.group(n_in), axis=1) * (expected - scheme.zero_code)
    least = float(np.einsum("oi,ij,oj->", reference - weight, second_moment.astype(np.float64), reference - weight))
    assert objective(weight, quantized, second_moment) == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("at_once", [1, 48, 1000])
def test_blocks_of_columns_are_only_a_matter_of_speed(width, at_once, monkeypatch):
    monkeypatch.setattr("cobra_edge.quantize.gptq._COLUMNS_AT_ONCE", at_once)
    weight, second_moment = case(33, width)
    expected = naive_gptq(weight, second_moment, least_error_scales(weight, W4), W4)
    assert (codes_of(gptq(weight, second_moment, W4)) == expected).mean() >= 0.995


@pytest.mark.parametrize("scheme", INT, ids=lambda s: s.name)
def test_gptq_errs_less_than_rounding(scheme):
    weight, second_moment = case(63, 256)
    rounded = round_to_nearest(weight, scheme, least_error_scales(weight, scheme))
    assert objective(weight, gptq(weight, second_moment, scheme), second_moment) < 0.85 * objective(
        weight, rounded, second_moment
    )


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    weight, _ = case(7, 128)
    second_moment = np.diag(np.random.default_rng(0).exponential(size=128)).astype(np.float32)
    rounded = round_to_nearest(weight, W4, least_error_scales(weight, W4))
    assert np.array_equal(gptq(weight, second_moment, W4).codes, rounded.codes)


def test_the_arguments_are_left_alone():
    weight, second_moment = case(7, 128)
    kept = weight.copy(), second_moment.copy()
    gptq(weight, second_moment, W4)
    assert np.array_equal(weight, kept[0]) and np.array_equal(second_moment, kept[1])


def test_dead_inputs_are_rounded_to_nearest():
    """Nothing is known of them, and nothing moves to them or from them."""
    weight, second_moment = case(7, 128)
    dead = np.arange(0, 128, 5)
    second_moment[dead] = second_moment[:, dead] = 0
    quantized = gptq(weight, second_moment, W4)
    rounded = round_to_nearest(weight, W4, quantized.scales)
    assert np.array_equal(codes_of(quantized)[:, dead], codes_of(rounded)[:, dead])
    assert not np.array_equal(quantized.codes, rounded.codes)
    assert objective(weight, quantized, second_moment) < objective(weight, rounded, second_moment)


def test_a_group_of_zeros_stays_zero():
    weight, second_moment = case(7, 128)
    weight[3, :64] = 0
    weight[5] = 0
    restored = gptq(weight, second_moment, W4).dequantize()
    assert not restored[3, :64].any() and not restored[5].any() and restored[0].any()


def test_a_singular_moment_succeeds():
    weight, _ = case(7, 128)
    x = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    second_moment = np.outer(x, x)
    rounded = round_to_nearest(weight, W4, least_error_scales(weight, W4))
    assert objective(weight, gptq(weight, second_moment, W4), second_moment) < 0.1 * objective(weight, rounded, second_moment)


def test_no_second_moment_at_all_is_rounding():
    weight, _ = case(7, 128)
    quantized = gptq(weight, np.zeros((128, 128), np.float32), W4)
    assert np.array_equal(quantized.codes, round_to_nearest(weight, W4, quantized.scales).codes)


def test_damping_grows_until_an_indefinite_second_moment_is_factorized(caplog):
    """Correlations in float16 are no longer those of anything: a smallest eigenvalue of 0 falls below it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 128)) * np.exp(4 * rng.standard_normal(128))
    root = np.sqrt((x**2).mean(0))
    correlation = (x.T @ x / 2 / np.outer(root, root)).astype(np.float16)
    second_moment = (correlation * np.outer(root, root)).astype(np.float32)
    assert np.linalg.eigvalsh(second_moment.astype(np.float64))[0] < 0
    weight, _ = case(7, 128)
    assert np.isfinite(gptq(weight, second_moment, W4).scales).all()
    second_moment -= np.float32(0.05 * np.diagonal(second_moment).mean()) * np.eye(128, dtype=np.float32)
    with caplog.at_level(logging.INFO):
        quantized = gptq(weight, second_moment, W4)
    assert "damping 0.01; retrying with ten times more" in caplog.text and "damping 0.1;" not in caplog.text
    expected = naive_gptq(weight, second_moment, quantized.scales, W4, damping=0.1)
    assert (codes_of(quantized) == expected).mean() >= 0.99


@pytest.mark.parametrize("n", [1, 5, 64])
def test_the_factor_is_that_of_the_inverse(n):
    _, second_moment = case(1, n, seed=n)
    upper = inverse_factor(second_moment).double().numpy()
    wide = second_moment.astype(np.float64)
    assert np.array_equal(upper, np.triu(upper))
    damped = wide + 0.01 * np.diagonal(wide).mean() * np.eye(n)
    assert np.abs(upper.T @ upper @ damped - np.eye(n)).max() < 1e-4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_moment_that_is_not_finite_is_refused(bad):
    weight, second_moment = case(3, 64)
    second_moment[5, 7] = second_moment[7, 5] = bad
    with pytest.raises(InputError, match="a second moment holds NaN or infinity; calibrate again"):
        gptq(weight, second_moment, W4)


def test_a_second_moment_that_no_damping_helps_is_refused():
    weight, second_moment = case(3, 64)
    second_moment[5, 5] = -1e9
    with pytest.raises(InputError, match="not positive definite with any damping; calibrate again with more lines"):
        gptq(weight, second_moment, W4)


def test_a_weight_that_is_not_finite_is_refused():
    weight, second_moment = case(3, 64)
    weight[1, 1] = np.nan
    with pytest.raises(InputError, match="fix the checkpoint"):
        gptq(weight, second_moment, W4)


def test_a_group_size_that_does_not_divide_is_refused():
    weight, second_moment = case(3, 96)
    with pytest.raises(InputError, match="group size 64 does not divide in_features 96; choose another scheme"):
        gptq(weight, second_moment, W4)
