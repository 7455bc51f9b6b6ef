"""AWQ: scales that are worth something under their own objective, and a fold that changes nothing."""

import numpy as np
import pytest

from cobra_edge.formats.model_config import MambaConfig, decoder_shapes
from cobra_edge.formats.recipe import Recipe
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.quantize.awq import input_scales
from cobra_edge.quantize.rtn import round_to_nearest
from cobra_edge.quantize.scales import least_error_scales
from cobra_edge.quantize.transforms import transformed_tensor

from ..conftest import random_tensors
from ..naive_decoder import float64, naive_logits, random_scales
from ..tolerance import distance

INT = [s for s in SCHEMES.values() if s.group_size and s.code_format == "int"]
W4 = SCHEMES["w4a16-g128"]
CONFIG = MambaConfig(128, 2, 64, 256, 16, 4, 32)


def case(out=64, outliers=(5, 77), factor=30.0):
    """Return a weight (out, 128) and the second moment of inputs with a few outliers, float32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1000, 128)) @ (np.eye(128) + 0.3 * rng.standard_normal((128, 128)) / np.sqrt(128))
    x[:, list(outliers)] *= factor
    return rng.standard_normal((out, 128)).astype(np.float32), (x.T @ x / 1000).astype(np.float32)


def naive_error(weight, second_moment, scales, scheme):
    """Return tr(ΔW H ΔWᵀ) of the matrix that is W again once its inputs are divided by the scales, float64."""
    scaled = (weight * scales).astype(np.float32)
    steps = least_error_scales(scaled, scheme, np.diagonal(second_moment) / scales**2)
    restored = round_to_nearest(scaled, scheme, steps).dequantize()
    difference = restored.astype(np.float64) / scales - weight
    return float(np.trace(difference @ second_moment.astype(np.float64) @ difference.T))


@pytest.mark.parametrize("scheme", INT, ids=lambda s: s.name)
def test_scales_are_the_best_power_of_the_magnitudes(scheme):
    weight, second_moment = case()
    found = input_scales(weight, second_moment, scheme)
    magnitudes = np.sqrt(np.diagonal(second_moment).astype(np.float64))
    unit = magnitudes / np.exp(np.log(magnitudes).mean())
    errors = [naive_error(weight, second_moment, unit**power, scheme) for power in np.linspace(0, 1, 11)]
    assert (found.dtype, found.shape) == (np.float32, (128,)) and (found > 0).all()
    assert naive_error(weight, second_moment, found, scheme) == pytest.approx(min(errors), rel=1e-3)
    assert np.log(found.astype(np.float64)).mean() == pytest.approx(0, abs=1e-6)


def test_loud_inputs_have_larger_scales_and_less_error():
    weight, second_moment = case()
    scales = input_scales(weight, second_moment, W4)
    assert (scales[[5, 77]] > 1.5).all() and np.delete(scales, [5, 77]).max() < 1.5
    assert naive_error(weight, second_moment, scales, W4) < 0.7 * naive_error(weight, second_moment, np.ones(128), W4)


def test_scales_are_never_worse_than_none():
    """Equal inputs, or outliers where the weights are large already, gain little."""
    weight, second_moment = case(factor=1.0)
    outliers = weight.copy()
    outliers[:, 5] *= 50
    for w, h in ((weight, second_moment), (outliers, case(outliers=(6,))[1]), (weight, np.eye(128, dtype=np.float32))):
        scales = input_scales(w, h, W4)
        assert naive_error(w, h, scales, W4) <= naive_error(w, h, np.ones(128), W4) * (1 + 1e-4)


def test_inputs_that_are_always_zero_have_scales_too():
    weight, second_moment = case()
    assert np.array_equal(input_scales(weight, np.zeros_like(second_moment), W4), np.ones(128, np.float32))
    second_moment[9] = second_moment[:, 9] = 0
    scales = input_scales(weight, second_moment, W4)
    assert (scales > 0).all() and np.isfinite(scales).all() and scales[9] == scales.min()


def test_a_tall_matrix_is_judged_by_some_of_its_rows(monkeypatch):
    """Rows are spread over the whole matrix: one half alone would say something else."""
    weight, second_moment = case(out=256)
    seen = []
    monkeypatch.setattr("cobra_edge.quantize.awq._ROWS", 64)
    monkeypatch.setattr("cobra_edge.quantize.awq._error", lambda rows, *_: seen.append(rows) or 0.0)
    input_scales(weight, second_moment, W4)
    assert all(np.array_equal(rows, weight[::4]) for rows in seen) and len(seen) == 11


@pytest.mark.parametrize("kind", ["in_proj", "dt_proj", "both"])
def test_folding_scales_changes_nothing(kind):
    """`transformed_tensor` multiplies and divides in whatever precision it is given: in float64 only roundings differ."""
    weights = float64(random_tensors(decoder_shapes(CONFIG)))
    scales = {n: s for n, s in random_scales(weights).items() if kind == "both" or kind in n}
    recipe = Recipe("w8a16-g128", "awq", {})
    stored = {name: transformed_tensor(name, weights.__getitem__, recipe, scales) for name in weights}
    changed = {name.rsplit("mixer.")[-1] for name in weights if not np.array_equal(stored[name], weights[name])}
    touched = {"in_proj": {"in_proj.weight"}, "dt_proj": {"dt_proj.weight", "x_proj.weight"}}
    layers = {f"backbone.layers.{i}.norm.weight" for i in range(CONFIG.n_layer)}
    both = touched["in_proj"] | layers | touched["dt_proj"]
    assert changed == {"in_proj": touched["in_proj"] | layers, "dt_proj": touched["dt_proj"], "both": both}[kind]
    tokens = list(range(0, 64, 5))
    assert max(distance(naive_logits(stored, CONFIG, tokens), naive_logits(weights, CONFIG, tokens))) <= 1e-10


def test_only_the_step_s_rows_of_x_proj_are_divided():
    """The rows behind them make B and C, which feed no matrix."""
    weights = float64(random_tensors(decoder_shapes(CONFIG)))
    name, consumer = (f"backbone.layers.1.mixer.{part}_proj.weight" for part in ("x", "dt"))
    scales = random_scales(weights)
    stored = transformed_tensor(name, weights.__getitem__, Recipe("w8a16-g128", "awq", {}), scales)
    assert np.array_equal(stored[32:], weights[name][32:])
    assert np.array_equal(stored[:32], weights[name][:32] / scales[consumer][:, None])
