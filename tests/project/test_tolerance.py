"""The comparator: it must reject wrong results."""

import numpy as np
import pytest

from ..tolerance import assert_close


@pytest.mark.parametrize(
    "wrong", [lambda x: 2 * x, np.zeros_like, lambda x: np.full_like(x, np.nan), lambda x: x[:-1], lambda x: x + 1e-3]
)
def test_comparator_rejects(wrong):
    x = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    assert_close(x.copy(), x, "decoder")
    with pytest.raises(AssertionError):
        assert_close(wrong(x), x, "decoder")


def test_comparator_rejects_one_bad_element():
    x = np.ones(100_000, np.float32)
    y = x.copy()
    y[5] = 1.001
    with pytest.raises(AssertionError):
        assert_close(y, x, "decoder")
