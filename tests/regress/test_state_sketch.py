"""State sketches: accuracy of distances, and stability of the file format."""

import zlib

import numpy as np
import pytest

from cobra_edge.regress.state_sketch import SKETCH_SIZE, state_sketch


def states(count, layers=4, shape=(512, 16)):
    return np.random.default_rng(0).standard_normal((count, layers, *shape)).astype(np.float32)


def test_distances_are_within_their_deviation():
    """Sparse and dense differences alike: no pair of entries may tell."""
    rng, pairs = np.random.default_rng(1), states(200, 1)
    errors = []
    for i, a in enumerate(pairs):
        difference = rng.standard_normal(a.shape) * (rng.random(a.shape) < (1.0, 0.1, 0.01, 0.001)[i % 4])
        difference[0, i, i % 16] = 30.0 if i % 2 else 0.1
        b = (a + difference).astype(np.float32)
        true = np.square((b - a).astype(np.float64)).sum()
        errors.append(np.square(state_sketch(b).astype(np.float64) - state_sketch(a)).sum() / true - 1)
    promised = np.sqrt(2 / SKETCH_SIZE)
    assert np.std(errors) <= 1.1 * promised  # of 200: a tenth more is two deviations
    assert np.std(errors) >= 0.4 * promised  # it is an estimate, nothing was kept whole
    assert abs(np.mean(errors)) < 4 * promised / np.sqrt(len(errors))
    assert np.abs(errors).max() < 5 * promised


def test_lines_average_it_out():
    """A layer's figure is a root of summed squares over some hundred lines."""
    a, b = states(2 * 400, 1, (256, 16)).reshape(2, 400, 1, 256, 16)
    true = np.square(b.astype(np.float64) - a).sum()
    estimate = sum(np.square(state_sketch(y) - state_sketch(x)).sum() for x, y in zip(a, b, strict=True))
    assert np.sqrt(estimate / true) == pytest.approx(1, abs=4 * 0.044 / np.sqrt(400))


def test_it_is_linear():
    a, b = states(2)
    assert np.allclose(state_sketch(a - 2 * b), state_sketch(a) - 2 * state_sketch(b), atol=1e-4)
    assert not state_sketch(np.zeros_like(a)).any()


def test_every_entry_counts_once():
    """Of a state with one entry, the sketch is that entry, with a sign, in one place; all places are used, evenly."""
    places, signs = [], []
    for i in range(0, 8192, 3):
        one = np.zeros((1, 8192), np.float32)
        one[0, i] = 2.5
        (found,) = state_sketch(one)
        (place,) = np.flatnonzero(found)
        assert abs(found[place]) == 2.5
        places.append(place)
        signs.append(np.sign(found[place]))
    assert abs(np.mean(signs)) < 4 / np.sqrt(len(signs))
    counts = np.bincount(places, minlength=SKETCH_SIZE)
    assert counts.min() > 0 and counts.max() < 5 * counts.mean()


@pytest.mark.parametrize("size", [1, 17, SKETCH_SIZE - 1, SKETCH_SIZE])
def test_small_states_are_kept_whole(size):
    small = states(1, 3, (size,))[0]
    found = state_sketch(small)
    assert found.shape == (3, SKETCH_SIZE) and np.array_equal(found[:, :size], small) and not found[:, size:].any()


def test_layers_do_not_mix():
    a = states(1)[0]
    changed = a.copy()
    changed[2] += 1
    differ = (state_sketch(a) != state_sketch(changed)).any(axis=1)
    assert differ.tolist() == [False, False, True, False]


def test_the_numbers_in_bundles_mean_the_same_tomorrow():
    whole = np.arange(3 * 1000, dtype=np.float32).reshape(3, 1000)
    found = state_sketch(whole)  # whole numbers: their sums are exact, whatever the order
    assert found.dtype == np.float32 and zlib.crc32(found.astype("<f4").tobytes()) == 0xFF59BD52
