"""Second moments of the inputs of stored matrices, and the codes of each method."""

import numpy as np
import pytest

from cobra_edge.errors import InputError
from cobra_edge.formats.bitsandbytes_codes import quantize_bitsandbytes, why_no_bitsandbytes
from cobra_edge.formats.method import METHODS
from cobra_edge.formats.model_config import MambaConfig, decoder_shapes
from cobra_edge.formats.packing import unpack
from cobra_edge.formats.recipe import ROTATIONS, Recipe, quantized_scheme, uniform_recipe
from cobra_edge.formats.scheme import SCHEMES, Scheme
from cobra_edge.quantize.gptq import gptq
from cobra_edge.quantize.hessian import clips, stored_second_moment
from cobra_edge.quantize.quantizer import EMBEDDING, quantizer
from cobra_edge.quantize.rtn import round_to_nearest
from cobra_edge.quantize.scales import least_error_scales
from cobra_edge.quantize.statistics import (
    SCHEMA_VERSION,
    Header,
    Statistics,
    histogram_of,
    pack_second_moment,
    projection_name,
    projection_of,
    projection_width,
    projections,
)
from cobra_edge.quantize.transforms import transformed_tensor

from ..conftest import random_tensors
from ..naive_decoder import float64, orthonormal, random_scales, transformed
from ..tolerance import assert_close

# Widths whose Hadamard matrices are not symmetric, and a dt_proj that 8-bit schemes fit.
CONFIG = MambaConfig(384, 1, 128, 384, 16, 4, 32, tied=True)
UNTIED = MambaConfig(384, 1, 128, 384, 16, 4, 32, tied=False)
W4, W8 = SCHEMES["w4a16-g128"], SCHEMES["w8a16-channel"]
IN, X, DT, OUT = (f"backbone.layers.0.mixer.{part}_proj.weight" for part in ("in", "x", "dt", "out"))
POSITIONS = 900


@pytest.fixture(scope="module")
def inputs():
    """Return inputs, {(layer, projection): (positions, width) float64}: correlated, some outlier channels, one dead."""
    rng, found = np.random.default_rng(0), {}
    for layer, projection in projections(CONFIG):
        width = projection_width(CONFIG, projection)
        mixing = np.eye(width) + 0.5 * rng.standard_normal((width, width)) / np.sqrt(width)
        x = rng.standard_normal((POSITIONS, width)) @ mixing * np.exp(rng.standard_normal(width))
        x[:, 3] = 0
        found[layer, projection] = x
    return found


@pytest.fixture(scope="module")
def weights():
    return {name: tensor.numpy() for name, tensor in random_tensors(decoder_shapes(UNTIED)).items()}


@pytest.fixture(scope="module")
def statistics(inputs, weights):
    """Return the statistics of these inputs; at in_proj and head they are before the norm's weight."""
    tensors = {}
    norms = {"in_proj": weights["backbone.layers.0.norm.weight"], "head": weights["backbone.norm_f.weight"]}
    for (layer, projection), x in inputs.items():
        name, own = projection_name(layer, projection), x * norms.get(projection, 1)
        turned = (
            (x if projection == "in_proj" else own) @ orthonormal(x.shape[1]).T
            if projection in ("in_proj", "out_proj", "head")
            else own
        )
        parts = [histogram_of(values.astype(np.float32)) for values in (own, turned)]
        diagonal, correlation = pack_second_moment((x.T @ x / len(x)).astype(np.float32))
        tensors |= {f"{name}.diagonal": diagonal, f"{name}.correlation": correlation}
        tensors |= {f"{name}.peak": np.stack([p[0] for p in parts]), f"{name}.histogram": np.stack([p[1] for p in parts])}
    return Statistics(Header(SCHEMA_VERSION, "0", "random", "", "", 1, POSITIONS), CONFIG, tensors)


def entering(name, inputs, weights, rotations, scales):
    """Return what a stored matrix is multiplied with at every position, (positions, in) float64: the reference of a runtime."""
    layer, projection = projection_of(name)
    x = inputs[layer, projection]
    if projection == "head":
        x = x * weights["backbone.norm_f.weight"]
    if projection == "in_proj" and "residual" not in rotations:
        x = x * weights["backbone.layers.0.norm.weight"]
    if "residual" in rotations and projection in ("in_proj", "head") or "out-proj" in rotations and projection == "out_proj":
        x = x @ orthonormal(x.shape[1]).T
    return x / scales.get(name, 1)


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("name", [IN, X, DT, OUT, EMBEDDING, "lm_head.weight"])
def test_the_stored_second_moment_is_that_of_the_inputs(inputs, weights, statistics, name, rotation, scaled):
    scales = random_scales(weights) if scaled else {}
    recipe = Recipe("w4a16-g128", "gptq", {}, rotations=ROTATIONS[rotation])
    got = stored_second_moment(name, weights.__getitem__, recipe, statistics, scales)
    x = entering(name, inputs, weights, recipe.rotations, scales)
    assert_close(got, x.T @ x / len(x), "statistics", "float16")
    assert_close(got, got.T, "statistics")


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_products_are_as_large_as_they_were(inputs, weights, statistics, rotation):
    """Transformed weights times transformed inputs give the model's outputs: weights and second moments match."""
    recipe, scales = Recipe("w4a16-g128", "gptq", {}, rotations=ROTATIONS[rotation]), random_scales(weights)
    for name in (IN, DT, OUT, "lm_head.weight"):
        stored = transformed_tensor(name, weights.__getitem__, recipe, scales).astype(np.float64)
        second_moment = stored_second_moment(name, weights.__getitem__, recipe, statistics, scales).astype(np.float64)
        own = entering(name, inputs, weights, (), {}) @ weights[name].astype(np.float64).T
        assert np.einsum("oi,ij,oj->", stored, second_moment, stored) == pytest.approx((own**2).sum() / POSITIONS, rel=1e-3)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_clips_are_of_the_basis_that_is_rounded(inputs, weights, statistics, rotation):
    for percentile, at_most in ((100, 1 + 1e-6), (90, 1.1)):
        recipe = Recipe("w4a8", "gptq", {}, rotations=ROTATIONS[rotation], activation_percentile=percentile)
        for name, group in ((IN, 128), (X, 128), (DT, 32), (OUT, 384), (EMBEDDING, 64)):
            got = clips(name, group, recipe, statistics)
            x = np.abs(entering(name, inputs, weights, recipe.rotations, {})).reshape(POSITIONS, -1, group)
            exact = np.quantile(x, percentile / 100, axis=(0, 2), method="inverted_cdf")
            assert got.dtype == np.float32 and got.shape == exact.shape
            assert (got >= exact * (1 - 1e-5)).all() and (got <= exact * at_most).all(), name


def test_clips_of_inputs_that_are_always_zero_are_positive(statistics):
    dead = {name: values.copy() for name, values in statistics.tensors.items()}
    name = projection_name(0, "x_proj")
    dead[f"{name}.peak"][:, :4] = 0
    dead[f"{name}.histogram"][:, :4] = 0
    dead[f"{name}.histogram"][:, :4, 0] = 32 * POSITIONS
    recipe = Recipe("w4a8", "rtn", {}, activation_percentile=99.9)
    found = clips(X, 128, recipe, Statistics(statistics.header, CONFIG, dead))
    assert (found > 0).all() and found[0] < 1e-30 < 1e-3 < found[1]


def make(recipe, weights, statistics, config=CONFIG, **options):
    return quantizer(config, recipe, weights.__getitem__, statistics, **options)


def nearest(quantized, values):
    """Return which codes are the nearest to their own weight, (out, in)."""
    step = np.repeat(quantized.scales.astype(np.float32), quantized.scheme.group(values.shape[1]), axis=1)
    zero = quantized.scheme.zero_code
    code = unpack(quantized.codes, quantized.scheme).astype(int) - zero
    best = np.clip(np.rint(values / step), -zero, zero - 1)
    return (code == best) | (np.abs(np.abs(values / step - code) - 0.5) < 1e-3)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.needs_gradients])
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_an_embedding_that_is_only_looked_up_stays_what_it_is(weights, statistics, method, config):
    """No error may be moved there. Elsewhere that is all that GPTQ does."""
    recipe, _ = uniform_recipe(config, W4, method, ROTATIONS["both"])
    found = make(recipe, weights, statistics, config)
    for name in (n for n in decoder_shapes(config) if quantized_scheme(recipe, n) == W4):
        moved = ~nearest(found.quantize(name, W4), found.transformed(name))
        if METHODS[method].compensates and (config.tied or name != EMBEDDING):
            assert moved.mean() > 0.1, name
        else:
            assert not moved.any(), name


def test_only_an_embedding_that_is_the_head_is_weighed_by_the_head(weights, statistics):
    values = weights[EMBEDDING]
    head_inputs = np.diagonal(stored_second_moment(EMBEDDING, weights.__getitem__, Recipe("", "awq", {}), statistics))
    for config, importance in ((CONFIG, head_inputs), (UNTIED, None)):
        recipe, _ = uniform_recipe(config, W4, "awq")
        got = make(recipe, weights, statistics, config).quantize(EMBEDDING, W4)
        assert np.array_equal(got.scales, least_error_scales(values, W4, importance))
    assert not np.array_equal(least_error_scales(values, W4, head_inputs), least_error_scales(values, W4))


def test_each_method_makes_its_codes(weights, statistics):
    """Of a matrix that gets no scales by AWQ, so that all of them quantize the same values."""
    second_moment = stored_second_moment(OUT, weights.__getitem__, Recipe("", "gptq", {}), statistics)
    values = weights[OUT]
    rounded = round_to_nearest(values, W4, least_error_scales(values, W4))
    weighed = round_to_nearest(values, W4, least_error_scales(values, W4, np.diagonal(second_moment)))
    moved = gptq(values, second_moment, W4)
    expected = {"rtn": rounded, "gptq": moved, "awq": weighed, "awq-gptq": moved}
    for method, truth in expected.items():
        got = make(uniform_recipe(CONFIG, W4, method)[0], weights, statistics).quantize(OUT, W4)
        assert np.array_equal(got.codes, truth.codes) and np.array_equal(got.scales, truth.scales), method
    assert len({q.codes.tobytes() for q in (rounded, weighed, moved)}) == 3


def test_rounding_to_nearest_never_looks_at_statistics(weights, statistics):
    """They may be there for clipping."""
    recipe, _ = uniform_recipe(CONFIG, W4, "rtn")
    for name in (EMBEDDING, IN):
        with_them, without = (make(recipe, weights, s).quantize(name, W4) for s in (statistics, None))
        assert np.array_equal(with_them.codes, without.codes) and np.array_equal(with_them.scales, without.scales)


@pytest.mark.parametrize("method", ["gptq", "awq", "awq-gptq"])
def test_a_method_that_looks_at_activations_is_never_silently_another(weights, method):
    with pytest.raises(AssertionError):
        make(uniform_recipe(CONFIG, W4, method)[0], weights, None)


def test_a_matrix_alone_is_never_guided(weights, statistics):
    """Codes without gradients would be those of another method."""
    recipe, _ = uniform_recipe(CONFIG, W4, "guided")
    with pytest.raises(InputError, match=f"^{OUT}: method guided needs gradients"):
        make(recipe, weights, statistics).quantize(OUT, W4)


def test_statistics_are_damped_or_refused_when_they_are_read(weights, statistics):
    """No inputs have correlations of -1 all to all, but each of them could be one: damping handles even that."""
    ruined = dict(statistics.tensors)
    name = f"{projection_name(0, 'out_proj')}.correlation"
    ruined[name] = np.full_like(ruined[name], -1)
    found = make(uniform_recipe(CONFIG, W4, "gptq")[0], weights, Statistics(statistics.header, CONFIG, ruined))
    assert found.quantize(OUT, W4).shape == weights[OUT].shape
    ruined[name] = np.full_like(ruined[name], np.nan)
    with pytest.raises(InputError, match="out_proj.correlation holds values beyond -1..1; calibrate again"):
        found.quantize(OUT, W4)


def test_a_refusal_names_its_matrix(weights, statistics, monkeypatch):
    hopeless = -np.eye(CONFIG.d_inner, dtype=np.float32)
    monkeypatch.setattr("cobra_edge.quantize.quantizer.stored_second_moment", lambda *_: hopeless)
    with pytest.raises(InputError, match=f"^{OUT}: a second moment is not positive definite with any damping"):
        make(uniform_recipe(CONFIG, W4, "gptq")[0], weights, statistics).quantize(OUT, W4)
    overflowing = {**weights, OUT: weights[OUT] * np.float32(1e9)}
    with pytest.raises(InputError, match=f"^{OUT}: a weight is not finite or too large for a float16 scale"):
        make(uniform_recipe(CONFIG, W4, "rtn")[0], overflowing, None).quantize(OUT, W4)
    with pytest.raises(InputError, match=f"^{OUT}: group size 256 does not divide in_features 384"):
        make(uniform_recipe(CONFIG, W4, "rtn")[0], weights, None).quantize(OUT, Scheme("w4a16-g256", 4, 256))


@pytest.mark.parametrize("scheme", [W4, W8], ids=["w4", "w8"])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.needs_gradients])
@pytest.mark.parametrize("rotation", ["none", "both"])
def test_only_in_and_dt_projections_have_scales(weights, statistics, scheme, method, rotation):
    told = []
    recipe, _ = uniform_recipe(CONFIG, scheme, method, ROTATIONS[rotation])
    found = make(recipe, weights, statistics, on_matrix=lambda: told.append(1))
    expected = {IN, DT} if METHODS[method].scales_inputs else set()
    assert set(found.scales) == expected and len(told) == len(expected)
    reference = transformed(float64(random_tensors(decoder_shapes(UNTIED))), CONFIG, recipe.rotations, found.scales)
    for name in decoder_shapes(CONFIG):
        assert_close(found.transformed(name), reference[name], "rotation")


@pytest.mark.parametrize("scheme", ["bnb-nf4", "bnb-int8"])
def test_codes_of_bitsandbytes_are_its_own_whatever_the_method(weights, statistics, scheme):
    if why_no_bitsandbytes():
        pytest.skip("bitsandbytes is not installed")
    chosen = SCHEMES[scheme]
    assert uniform_recipe(CONFIG, chosen, "gptq")[0].method == "none"
    for method in ("gptq", "awq"):
        recipe = Recipe(scheme, method, dict.fromkeys((IN, DT, OUT), scheme))
        found = make(recipe, weights, statistics)
        got, own = found.quantize(IN, chosen), quantize_bitsandbytes(weights[IN], chosen)
        assert found.scales == {} and np.array_equal(got.codes, own.codes) and np.array_equal(got.scales, own.scales)
