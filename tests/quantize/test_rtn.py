"""Packing and round-to-nearest: exact round trips, bounded errors, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobra_edge.errors import InputError
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.formats.packing import QuantizedTensor, pack, unpack
from cobra_edge.formats.recipe import Recipe, stored_tensors, uniform_recipe
from cobra_edge.formats.scheme import SCHEMES, Scheme, scheme_named
from cobra_edge.quantize.rtn import round_to_nearest

QUANTIZED = [s for s in SCHEMES.values() if s.group_size and s.code_format == "int"]
CONFIG = MambaConfig(256, 2, 512, 512, 16, 4, 16)


def naive_codes(row, scheme):
    """Quantize one group, one weight at a time, in float64: the reference of round_to_nearest."""
    extreme = max(row, key=abs)
    scale = float(np.float16(np.float32(extreme) / np.float32(-scheme.zero_code)))
    codes = []
    for weight in row:
        code = scheme.zero_code + (0 if scale == 0 else int(np.rint(float(weight) / scale)))
        codes.append(min(max(code, 0), 2 * scheme.zero_code - 1))
    return codes, scale


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda s: s.name)
@given(out=st.integers(1, 5), groups=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_packing_round_trips(scheme, out, groups, seed):
    codes = np.random.default_rng(seed).integers(0, 2**scheme.weight_bits, (out, groups * 128)).astype(np.uint8)
    packed = pack(codes, scheme)
    assert packed.nbytes * 8 == codes.size * scheme.weight_bits
    assert np.array_equal(unpack(packed, scheme), codes)


def test_four_bit_layout_is_as_documented():
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    packed = pack(codes, SCHEMES["w4a16-g128"])
    assert packed.shape == (1, 16)
    assert all(packed[0, j] == (codes[0, j] | codes[0, j + 16] << 4) for j in range(16))


def naive_three_bit_packing(row):
    """Pack one row bit by bit as docs/bundle.md says: the reference of pack."""
    packed = []
    for start in range(0, len(row), 64):
        block = [0] * 24
        for s in range(4):
            for j in range(16):
                code = int(row[start + 16 * s + j])
                block[j] |= (code & 3) << (2 * s)
                block[16 + (j & 7)] |= (code >> 2) << (2 * s + (j >> 3))
        packed += block
    return packed


def test_three_bit_layout_is_as_documented():
    codes = np.random.default_rng(0).integers(0, 8, (3, 192)).astype(np.uint8)
    packed = pack(codes, SCHEMES["w3a16-g64"])
    assert packed.shape == (3, 72)
    assert packed.tolist() == [naive_three_bit_packing(row) for row in codes]


def test_codes_come_in_whole_blocks():
    with pytest.raises(InputError, match="3-bit packing needs in_features to be a multiple of 64, got 96"):
        pack(np.zeros((2, 96), np.uint8), SCHEMES["w3a16-g64"])
    with pytest.raises(InputError, match="3-bit codes come in blocks of 64, which do not divide in_features 96"):
        round_to_nearest(np.zeros((2, 96), np.float32), Scheme("w3a16-g32", 3, 32))
    assert Scheme("w8a16-g16", 8, 16).refuses(48) == "8-bit codes come in blocks of 32, which do not divide in_features 48"
    assert Scheme("w4a16-g32", 4, 32).refuses(96) is None


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda s: s.name)
@pytest.mark.parametrize("out", [1, 63, 129])
def test_rtn_equals_its_naive_reference(scheme, out):
    weight = np.random.default_rng(out).standard_normal((out, 256)).astype(np.float32)
    weight[0, :128] = 0
    weight[-1, 200] = -9
    quantized = round_to_nearest(weight, scheme)
    codes = unpack(quantized.codes, scheme).reshape(out, -1, scheme.group(256))
    assert quantized.shape == weight.shape
    for i in range(out):
        for g, group in enumerate(weight[i].reshape(-1, scheme.group(256))):
            expected, scale = naive_codes(group, scheme)
            assert quantized.scales[i, g] == scale
            # float32 arithmetic may fall to the other side of an exact half
            assert np.abs(codes[i, g].astype(int) - expected).max() <= 1
            assert (codes[i, g] == expected).mean() > 0.98


@pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda s: s.name)
def test_rtn_error_is_at_most_half_a_step(scheme):
    weight = np.random.default_rng(0).standard_normal((40, 384)).astype(np.float32)
    quantized = round_to_nearest(weight, scheme)
    step = np.repeat(np.abs(quantized.scales.astype(np.float32)), scheme.group(384), axis=1)
    difference = np.abs(quantized.dequantize() - weight)
    # The end opposite to the extreme has no code of its own and is clipped by up to one step.
    clipped = unpack(quantized.codes, scheme) == 2 * scheme.zero_code - 1
    assert (difference <= np.where(clipped, 1.01, 0.501) * step).all()


def test_a_group_of_zeros_stays_zero():
    quantized = round_to_nearest(np.zeros((3, 128), np.float32), SCHEMES["w4a16-g128"])
    assert not quantized.dequantize().any()


def test_rows_of_a_quantized_table():
    weight = np.random.default_rng(0).standard_normal((9, 128)).astype(np.float32)
    table = round_to_nearest(weight, SCHEMES["w8a16-g128"])
    rows = np.array([3, 3, 0])
    assert np.array_equal(table.rows(rows).dequantize(), table.dequantize()[rows])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9])
def test_values_that_do_not_fit_are_refused(bad):
    weight = np.ones((4, 128), np.float32)
    weight[2, 5] = bad
    with pytest.raises(InputError, match="not finite or too large"):
        round_to_nearest(weight, SCHEMES["w4a16-g128"])


def test_a_group_size_that_does_not_divide_is_named():
    with pytest.raises(InputError, match="group size 128 does not divide in_features 96"):
        round_to_nearest(np.zeros((2, 96), np.float32), SCHEMES["w4a16-g128"])
    with pytest.raises(InputError, match="did you mean 'w4a16-g128'"):
        scheme_named("w4a16-g12")


def test_quantized_tensor_checks_its_parts():
    good = round_to_nearest(np.ones((4, 256), np.float32), SCHEMES["w4a16-g128"])
    with pytest.raises(InputError):
        QuantizedTensor(good.codes, good.scales[:, :1], good.scheme)
    with pytest.raises(InputError):
        QuantizedTensor(good.codes.astype(np.int16), good.scales, good.scheme)
    three = round_to_nearest(np.ones((4, 128), np.float32), SCHEMES["w3a16-g64"])
    with pytest.raises(InputError):
        QuantizedTensor(three.codes[:, :-1], three.scales, three.scheme)
    row = round_to_nearest(np.ones((4, 256), np.float32), SCHEMES["w8a16-channel"])
    with pytest.raises(InputError):
        QuantizedTensor(row.codes[:, :0], row.scales, row.scheme)
    assert QuantizedTensor(good.codes, good.scales, good.scheme, np.ones(2, np.float32)).rows(np.array([1])).clips is not None
    for clips in (np.ones(3, np.float32), np.ones(2), np.ones((1, 2), np.float32)):
        with pytest.raises(InputError, match="clips .* expected float32"):
            QuantizedTensor(good.codes, good.scales, good.scheme, clips)


def test_three_bit_codes_take_three_eighths_of_a_byte():
    recipe, _ = uniform_recipe(CONFIG, SCHEMES["w3a16-g64"])
    codes, scales = stored_tensors(CONFIG, recipe)["backbone.layers.1.mixer.out_proj.weight"]
    assert (codes.dtype, codes.shape) == ("uint8", (256, 512 * 3 // 8))
    assert (scales.dtype, scales.shape) == ("float16", (256, 512 // 64))


def test_clips_are_stored_for_what_enters_a_product():
    for tied in (True, False):
        config = MambaConfig(256, 1, 512, 512, 16, 4, 16, tied=tied)
        tensors = {"backbone.embedding.weight": "w4a16-g64", "lm_head.weight": "w8a16-channel"}
        tensors["backbone.layers.*.mixer.in_proj.weight"] = "w4a16-g128"
        tensors["backbone.layers.*.mixer.x_proj.weight"] = "float16"
        plan = stored_tensors(config, Recipe("mixed", "rtn", tensors, activation_percentile=99.9))
        clips = {t.name: (t.dtype, t.shape) for entries in plan.values() for t in entries if t.name.endswith(".clips")}
        head = ("backbone.embedding.weight.clips", 4) if tied else ("lm_head.weight.clips", 1)
        expected = {head[0]: ("float32", (head[1],)), "backbone.layers.0.mixer.in_proj.weight.clips": ("float32", (2,))}
        assert clips == expected
        free = stored_tensors(config, Recipe("mixed", "rtn", tensors))
        assert not any(t.name.endswith(".clips") for entries in free.values() for t in entries)


def test_recipe_keeps_the_sensitive_tensors_in_more_bits():
    recipe, kept = uniform_recipe(CONFIG, SCHEMES["w4a16-g128"])
    assert recipe.storage("backbone.layers.1.mixer.in_proj.weight") == "w4a16-g128"
    assert recipe.storage("backbone.embedding.weight") == "w4a16-g128"
    for name in ("A_log", "D", "dt_proj.bias", "conv1d.weight", "conv1d.bias"):
        assert recipe.storage(f"backbone.layers.0.mixer.{name}") == "float32"
    assert recipe.storage("backbone.norm_f.weight") == "float32"
    assert recipe.storage("backbone.layers.0.mixer.dt_proj.weight") == "w8a16-channel" and not kept


def test_a_recipe_that_cannot_be_is_refused():
    bad = Recipe("w4a16-g128", "rtn", {"backbone.norm_f.weight": "w4a16-g128"})
    with pytest.raises(InputError, match="cannot be stored"):
        stored_tensors(CONFIG, bad)
    with pytest.raises(InputError, match="cannot be stored"):
        stored_tensors(CONFIG, Recipe("w3a16-g64", "rtn", {"backbone.layers.*.mixer.dt_proj.weight": "w3a16-g64"}))
    with pytest.raises(InputError, match="unknown scheme"):
        stored_tensors(CONFIG, Recipe("w4a16-g128", "rtn", {"backbone.norm_f.weight": "w9"}))
    with pytest.raises(InputError, match="fits no matrix"):
        uniform_recipe(MambaConfig(96, 1, 64, 96, 16, 4, 8), SCHEMES["w4a16-g128"])
