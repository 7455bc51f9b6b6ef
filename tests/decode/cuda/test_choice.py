"""The choice on the GPU, against generate.choose."""

import numpy as np
import pytest
import torch

from cobra_edge.decode.cuda.kernels.choice import choose_token
from cobra_edge.decode.sampling import GREEDY, Sampling, choose

RULES = [
    GREEDY,
    Sampling(1.0),
    Sampling(0.7, top_k=40),
    Sampling(1.3, top_k=1000),
    Sampling(1.5, top_p=0.9),
    Sampling(2.0, 30, 0.5),
    Sampling(1e-320),
    Sampling(1.0, top_p=1e-9),
]


def chosen(logits: torch.Tensor, sampling: Sampling, uniform: float) -> tuple[int, int]:
    token, not_finite = torch.tensor([-1]), torch.zeros(1, dtype=torch.int32)
    choose_token(logits, sampling, torch.tensor([uniform], dtype=torch.float64), token, not_finite)
    return int(token), int(not_finite)


@pytest.mark.parametrize("sampling", RULES, ids=str)
def test_the_same_rule(sampling):
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal(500)).astype(np.float32)
    logits[100:110] = logits[::50]  # equal ones
    uniforms = [0.0, np.nextafter(1.0, 0.0), *rng.random(200)]
    got = [chosen(torch.from_numpy(logits), sampling, u) for u in uniforms]
    assert got == [(choose(logits, sampling, u), 0) for u in uniforms]


def test_the_lowest_of_equal_ones():
    logits = torch.zeros(300)
    logits[[7, 50, 299]] = 4.0
    assert chosen(logits, GREEDY, 0.5) == (7, 0)
    assert chosen(logits, Sampling(1e-3, top_k=1), 0.99) == (7, 0)


@pytest.mark.parametrize("sampling", RULES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_noticed_and_never_forgotten(bad, sampling):
    logits, token, not_finite = torch.randn(64), torch.tensor([-1]), torch.zeros(1, dtype=torch.int32)
    logits[5] = bad
    uniform = torch.tensor([0.3])
    choose_token(logits, sampling, uniform, token, not_finite)
    assert int(not_finite) == 1 and 0 <= int(token) < 64
    choose_token(torch.randn(64), sampling, uniform, token, not_finite)
    assert int(not_finite) == 1
