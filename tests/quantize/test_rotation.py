"""Transformed weights are the same model, proved in float64, on random weights and on trained ones."""

import numpy as np
import pytest

from cobra_edge.formats.model_config import MambaConfig, decoder_shapes
from cobra_edge.formats.recipe import ROTATIONS, Recipe
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.quantize.transforms import transformed_tensor

from ..conftest import random_tensors
from ..naive_decoder import float64, naive_logits, random_scales, transformed
from ..tolerance import assert_close, distance

# Widths are 12 · 32 and 12 · 64, whose Hadamard matrices are not symmetric: a transposed one is another.
RANDOM = MambaConfig(384, 2, 512, 768, 16, 4, 24, tied=False)
TOKENS = np.random.default_rng(0).integers(0, 512, 12).tolist()
each_rotation = pytest.mark.parametrize("rotation", ROTATIONS)
each_scaling = pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])


@pytest.fixture(scope="module", params=["random", "mini"])
def model(request):
    """Return sizes, the model's own weights in float64, and its logits."""
    if request.param == "random":
        config, tensors = RANDOM, random_tensors(decoder_shapes(RANDOM))
    else:
        checkpoint = open_checkpoint("mini")
        config = checkpoint.config.mamba
        tensors = {name: checkpoint.decoder[name].float() for name in decoder_shapes(config)}
    weights = float64(tensors)
    return config, weights, naive_logits(weights, config, TOKENS)


@each_scaling
@each_rotation
def test_a_transformed_model_is_the_same_model(model, rotation, scaled):
    """In float64 only the order of sums differs."""
    config, weights, truth = model
    stored = transformed(weights, config, ROTATIONS[rotation], random_scales(weights) if scaled else {})
    assert max(distance(naive_logits(stored, config, TOKENS, ROTATIONS[rotation]), truth)) <= 1e-10


@each_scaling
@each_rotation
def test_prepared_is_its_float64_reference(model, rotation, scaled):
    config, weights, truth = model
    scales = random_scales(weights) if scaled else {}
    recipe = Recipe("fp16", "none", {}, rotations=ROTATIONS[rotation])
    expected = transformed(weights, config, recipe.rotations, scales)
    narrow = {n: values.astype(np.float32) for n, values in scales.items()}
    got = {
        name: transformed_tensor(name, lambda n: weights[n].astype(np.float32), recipe, narrow)
        for name in decoder_shapes(config)
    }
    for name, values in got.items():
        assert values.dtype == np.float32
        assert_close(values, expected[name], "rotation")
    wide = {name: values.astype(np.float64) for name, values in got.items()}
    assert_close(naive_logits(wide, config, TOKENS, recipe.rotations), truth, "decoder")


def test_the_reference_notices_what_a_runtime_leaves_out(model):
    config, weights, truth = model
    for rotation in ("out-proj", "residual"):
        stored = transformed(weights, config, ROTATIONS[rotation], {})
        assert distance(naive_logits(stored, config, TOKENS), truth)[0] > 0.01, rotation


def test_preparing_leaves_the_model_alone():
    weights = {name: tensor.numpy() for name, tensor in random_tensors(decoder_shapes(RANDOM)).items()}
    kept = {name: values.copy() for name, values in weights.items()}
    recipe = Recipe("fp16", "none", {}, rotations=ROTATIONS["both"])
    for name in weights:
        transformed_tensor(name, weights.__getitem__, recipe, random_scales(weights))
    assert all(np.array_equal(weights[name], kept[name]) for name in weights)
