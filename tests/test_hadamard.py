"""The rotation of out_proj's input: Hadamard matrices against their definition."""

import numpy as np
import pytest

from cobra_edge.errors import InputError
from cobra_edge.hadamard import hadamard_factors, hadamard_matrix, rotate

from .tolerance import assert_close

FACTORS = {
    1: (1, 1),
    2: (1, 2),
    12: (12, 1),
    20: (20, 1),
    44: (44, 1),
    60: (60, 1),
    224: (224, 1),
    384: (12, 32),
    512: (1, 512),
    1536: (12, 128),
    2048: (1, 2048),
    3072: (12, 256),
    4096: (1, 4096),
    5120: (20, 256),
}


@pytest.mark.parametrize(("width", "factors"), FACTORS.items())
def test_the_power_of_two_is_as_large_as_possible(width, factors):
    assert hadamard_factors(width) == factors


@pytest.mark.parametrize("width", FACTORS)
def test_rows_are_orthogonal(width):
    matrix = hadamard_matrix(width)
    assert matrix.dtype == np.float32 and set(np.unique(matrix)) <= {-1.0, 1.0}
    assert np.array_equal(matrix @ matrix.T, width * np.eye(width))


def test_small_matrices_by_hand():
    assert hadamard_matrix(2).tolist() == [[1, 1], [1, -1]]
    assert hadamard_matrix(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    squares = {1, 3, 4, 5, 9}  # modulo 11
    for i in range(11):
        for j in range(11):
            chi = 0 if i == j else 1 if (i - j) % 11 in squares else -1
            assert hadamard_matrix(12)[i + 1, j + 1] == chi + (i == j)
    assert (hadamard_matrix(12)[0] == 1).all() and (hadamard_matrix(12)[1:, 0] == -1).all()


@pytest.mark.parametrize("width", FACTORS)
def test_rotation_equals_the_explicit_matrix(width):
    base, power = FACTORS[width]
    matrix = np.kron(hadamard_matrix(base), hadamard_matrix(power)).astype(np.float64) / np.sqrt(width)
    x = np.random.default_rng(width).standard_normal((2, 3, width)).astype(np.float32)
    kept = x.copy()
    got = rotate(x)
    assert got.dtype == np.float32 and np.array_equal(x, kept)
    assert_close(got, x @ matrix.T, "rotation")
    assert_close(rotate(x[0, 0]), matrix @ x[0, 0], "rotation")
    assert_close(np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), "rotation")


def test_a_strided_view_and_no_rows():
    wide = np.random.default_rng(0).standard_normal((5, 2 * 384)).astype(np.float32)
    assert np.array_equal(rotate(wide[:, ::2]), rotate(wide[:, ::2].copy()))
    assert rotate(wide[:0, :384]).shape == (0, 384)


def test_an_outlier_is_spread_evenly():
    x = np.zeros(5120, np.float32)
    x[77] = 1000
    assert_close(np.abs(rotate(x)), np.full(5120, 1000 / np.sqrt(5120)), "rotation")


@pytest.mark.parametrize("width", [0, -4, 3, 28, 52, 100, 36, 5121])
def test_widths_without_a_hadamard_matrix_are_refused(width):
    with pytest.raises(InputError, match=f"width {width} has no Hadamard matrix here: it has to be a power of two, or"):
        hadamard_factors(width)
