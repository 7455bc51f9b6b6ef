"""Choosing a token on the GPU: the same token as `decode.sampling.choose`, for the same random number."""

import numpy as np
import pytest

from cobra_edge.decode.sampling import Sampling, choose

CHOICE = np.dtype([("temperature", "f8"), ("top_p", "f8"), ("uniform", "f8"), ("top_k", "i4"), ("unused", "i4")])
BLOCKS = 3


def chosen(emulator, logits, sampling=None, uniform=0.0, seed=0):
    vocab = len(logits)
    token, not_finite, top = np.full(1, -1, np.int32), np.full(1, -1, np.int32), np.full(1, np.nan, np.float32)
    found, arrived = np.zeros(2 * BLOCKS, np.uint64), np.zeros(1, np.uint32)
    emulator.run(
        "choose_likeliest", BLOCKS, 256, logits, vocab, found, arrived, token, not_finite, top, shared=16 + 128, seed=seed
    )  # fmt: skip
    assert arrived[0] == 0
    if sampling is not None and sampling.temperature:
        choice = np.array([(sampling.temperature, sampling.top_p, uniform, sampling.top_k, 0)], CHOICE)
        weights = np.zeros(vocab, np.uint64)
        emulator.run("choose_weigh", BLOCKS, 256, logits, vocab, top, choice, weights, seed=seed)
        emulator.run(
            "choose_drawn", 1, 512, logits, weights, vocab, choice, not_finite, token, shared=2 * 3 * 16 * 8, seed=seed
        )
    return int(token[0]), int(not_finite[0])


def test_the_likeliest_is_the_first_of_equals(emulator):
    rng = np.random.default_rng(0)
    for vocab in (1, 31, 700, 1025):
        logits = rng.standard_normal(vocab).astype(np.float32)
        assert chosen(emulator, logits) == (int(np.argmax(logits)), 0)
    logits = np.full(900, -3, np.float32)
    logits[[800, 123, 500]] = 2
    assert chosen(emulator, logits) == (123, 0)
    assert chosen(emulator, np.array([-0.0, 0.0, -1.0], np.float32)) == (0, 0)


SAMPLINGS = [
    Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.9), Sampling(0.5, top_k=40, top_p=0.5), Sampling(1e-6),
    Sampling(100.0),
    Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-9), Sampling(1e-300), Sampling(1e-320), Sampling(1.0, top_k=10**6),
]  # fmt: skip


@pytest.mark.parametrize("sampling", [None, *SAMPLINGS], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_noticed(emulator, value, sampling):
    logits = np.zeros(700, np.float32)
    logits[699] = value
    token, not_finite = chosen(emulator, logits, sampling, 0.3)
    assert not_finite == 1 and 0 <= token < 700


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_same_token_as_the_rule(emulator, sampling):
    rng = np.random.default_rng(1)
    for vocab, draws in ((600, 6), (40, 6)):
        logits = (3 * rng.standard_normal(vocab)).astype(np.float32)
        for uniform in (0.0, 1 - 2**-53, *rng.random(draws)):
            assert chosen(emulator, logits, sampling, uniform) == (choose(logits, sampling, uniform), 0), (vocab, uniform)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(1.0, top_k=7), Sampling(2.0, top_p=0.5), Sampling(1.0, top_p=2 / 3)], ids=str
)
def test_equal_logits_are_taken_in_the_order_of_their_numbers(emulator, sampling):
    rng = np.random.default_rng(2)
    logits = rng.integers(-2, 3, 300).astype(np.float32)  # many of each
    logits[5] = -0.0
    for uniform in rng.random(8):
        assert chosen(emulator, logits, sampling, uniform)[0] == choose(logits, sampling, uniform)
    for uniform in (0.1, 0.5, 0.9):
        assert chosen(emulator, np.zeros(3, np.float32), sampling, uniform)[0] == choose(
            np.zeros(3, np.float32), sampling, uniform
        )


def test_the_same_token_in_any_order_of_threads(emulator):
    logits = np.random.default_rng(3).standard_normal(1000).astype(np.float32)
    assert len({chosen(emulator, logits, Sampling(1.0, 50, 0.9), 0.37, seed) for seed in range(3)}) == 1
