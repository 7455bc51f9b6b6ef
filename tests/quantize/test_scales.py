"""Scales of groups: the search against a naive one in float64, and what it promises."""

import numpy as np
import pytest

from cobra_edge.errors import InputError
from cobra_edge.formats.packing import QuantizedTensor
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.quantize.rtn import round_to_nearest
from cobra_edge.quantize.scales import largest_value_scales, least_error_scales

INT = [s for s in SCHEMES.values() if s.group_size and s.code_format == "int"]
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 1.05)
each_scheme = pytest.mark.parametrize("scheme", INT, ids=lambda s: s.name)


def weights(out, n_in=256, seed=0):
    """Return heavy-tailed weights (out, n_in) float32, as trained ones are."""
    return np.random.default_rng(seed).standard_t(4, (out, n_in)).astype(np.float32)


def naive_error(group, scale, importance, zero):
    """Return the weighted squared error of one group rounded with one scale, float64, one weight after the other."""
    mean, total = sum(float(w) ** 2 for w in group) / len(group), 0.0
    for weight, matters in zip(group.tolist(), importance.tolist(), strict=True):
        code = (
            min(max(round(weight / scale), -zero), zero - 1) if scale else 0
        )  # round() takes halves to the even, as rint does
        total += matters * (0.3 * mean + weight**2) * (code * scale - weight) ** 2
    return total


def naive_search(group, plain, importance, zero):
    """Return the least error of any candidate."""
    tried = [float(np.float16(np.float32(plain) * np.float32(sign * factor))) for factor in FACTORS for sign in (1, -1)]
    return min(naive_error(group, scale, importance, zero) for scale in tried if np.isfinite(scale))


@each_scheme
@pytest.mark.parametrize("out", [1, 7, 63])
def test_the_search_finds_what_a_naive_one_finds(scheme, out):
    weight = weights(out, seed=out)
    weight[0] *= 1e-3
    importance = np.random.default_rng(out).exponential(size=256).astype(np.float32)
    plain, found = largest_value_scales(weight, scheme), least_error_scales(weight, scheme, importance)
    size, zero = scheme.group(256), scheme.zero_code
    assert (found.dtype, found.shape) == (np.float16, (out, 256 // size))
    for i in range(out):
        for g in range(256 // size):
            columns = slice(g * size, (g + 1) * size)
            group, matters = weight[i, columns], importance[columns]
            least = naive_search(group, plain[i, g], matters, zero)
            # Two scales may be as good as each other to within float32, so errors are compared and not scales.
            assert naive_error(group, float(found[i, g]), matters, zero) == pytest.approx(least, rel=1e-4)


@each_scheme
def test_the_search_is_worth_it(scheme):
    """It never errs more than the plain scales, and in many groups less."""
    weight, zero, size = weights(20), scheme.zero_code, scheme.group(256)
    ones = np.ones(size, np.float32)
    groups = weight.reshape(-1, size)
    plain, found = (f(weight, scheme).reshape(-1) for f in (largest_value_scales, least_error_scales))
    before = np.array([naive_error(g, float(s), ones, zero) for g, s in zip(groups, plain, strict=True)])
    after = np.array([naive_error(g, float(s), ones, zero) for g, s in zip(groups, found, strict=True)])
    assert (after <= before * (1 + 1e-5)).all()
    assert (after < 0.999 * before).mean() > 0.1


@each_scheme
def test_the_largest_weight_is_exact_with_the_plain_scales(scheme):
    weight = weights(7).astype(np.float16).astype(np.float32) * 2.0**-3  # so that scales of 2^-n of them are exact
    restored = round_to_nearest(weight, scheme).dequantize()
    groups, back = (a.reshape(-1, scheme.group(256)) for a in (weight, restored))
    largest = np.abs(groups).argmax(axis=1)[:, None]
    assert np.array_equal(np.take_along_axis(back, largest, 1), np.take_along_axis(groups, largest, 1))


@each_scheme
def test_groups_of_zeros_have_scales_that_keep_them(scheme):
    weight = weights(3)
    weight[1] = 0
    scales = least_error_scales(weight, scheme)
    assert np.isfinite(scales).all() and (scales[[0, 2]] != 0).all()
    restored = round_to_nearest(weight, scheme, scales).dequantize()
    assert not restored[1].any() and restored[[0, 2]].any()


def test_inputs_that_matter_are_rounded_better():
    """If only half of every group's inputs are nonzero, their error falls, at the cost of the other half's."""
    scheme, weight = SCHEMES["w4a16-g128"], weights(64)
    importance_of = np.tile(np.repeat([1.0, 1e-6], 64), 2).astype(np.float32)
    errors = []
    for importance in (None, importance_of):
        scales = least_error_scales(weight, scheme, importance)
        squares = (round_to_nearest(weight, scheme, scales).dequantize() - weight) ** 2
        errors.append((squares[:, importance_of == 1].sum(), squares[:, importance_of != 1].sum()))
    (even, rest), (favoured, neglected) = errors
    assert favoured < 0.95 * even and neglected > 1.05 * rest


def test_an_importance_of_ones_is_none():
    weight = weights(5)
    for scheme in INT:
        assert np.array_equal(least_error_scales(weight, scheme), least_error_scales(weight, scheme, np.ones(256, np.float32)))


def test_how_many_rows_are_worked_on_together_changes_nothing(monkeypatch):
    weight, scheme = weights(9), SCHEMES["w3a16-g64"]
    whole = least_error_scales(weight, scheme)
    monkeypatch.setattr("cobra_edge.quantize.scales._ROWS_AT_ONCE", 2 * 256)
    assert np.array_equal(least_error_scales(weight, scheme), whole)


def test_a_scale_near_the_largest_float16_stays_finite():
    """The candidate above the plain scale overflows and is skipped."""
    scheme = SCHEMES["w4a16-g128"]
    weight = weights(2)
    weight[0, 0] = 65504 * 8
    scales = least_error_scales(weight, scheme)
    assert np.isfinite(scales).all()
    assert QuantizedTensor(round_to_nearest(weight, scheme, scales).codes, scales, scheme).dequantize()[0, 0] > 4e5


@pytest.mark.parametrize("search", [largest_value_scales, least_error_scales])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9])
def test_what_has_no_scale_is_refused(search, bad):
    weight = weights(4)
    weight[2, 5] = bad
    with pytest.raises(InputError, match="not finite or too large for a float16 scale; fix the checkpoint"):
        search(weight, SCHEMES["w4a16-g128"])
