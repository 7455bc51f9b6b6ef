"""The likely part of distributions: what KLD it gives, beside all of them."""

import numpy as np
import pytest

from cobra_edge.regress.metrics import divergence
from cobra_edge.regress.top_tokens import LEAST, MOST, TAIL_MASS, TopTokens

from .regress_lines import plain_kl, random_log_probs

SHAPES = [(40, 50_280, 9.0), (8, 50_280, 1.0), (60, 512, 6.0), (30, 64, 2.0), (30, 8, 1.0), (30, 3, 1.0)]


def cases(positions, vocab, sharpness):
    """Return a reference, a build near it, and right tokens that the reference need not find likely."""
    reference = random_log_probs(positions, vocab, sharpness)
    build = reference + 0.3 * np.random.default_rng(1).standard_normal(reference.shape)
    build -= np.log(np.exp(build).sum(-1, keepdims=True))
    return reference, build, np.random.default_rng(2).integers(0, vocab, positions)


@pytest.mark.parametrize("shape", SHAPES)
def test_kld_lacks_what_the_tails_share_out_differently_and_no_more(shape):
    reference, build, targets = cases(*shape)
    top = TopTokens.of(reference, targets)
    exact, found = divergence(reference, build), top.divergence_of(build)
    lacking = np.zeros(len(top))
    for i in range(len(top)):
        others = np.delete(np.arange(shape[1]), top.ids[top.offsets[i] : top.offsets[i + 1]])
        if len(others):
            p, q = np.exp(reference[i, others]), np.exp(build[i, others])
            lacking[i] = p.sum() * (p / p.sum() * (np.log(p / p.sum()) - np.log(q / q.sum()))).sum()
    # What is kept is float32: log-probabilities of some -10 have an error of 1e-6 there.
    assert (lacking >= -1e-12).all() and np.abs(exact - found - lacking).max() < 2e-6
    assert (found <= exact + 2e-6).all() and exact.mean() > 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_kept(shape):
    reference, _, targets = cases(*shape)
    top, vocab = TopTokens.of(reference, targets), shape[1]
    assert np.array_equal(top.most_probable(), reference.argmax(-1))
    assert np.allclose(top.log_probs_of(targets), reference[np.arange(len(targets)), targets], atol=1e-5)
    for i, (row, target) in enumerate(zip(reference, targets, strict=True)):
        ids = top.ids[top.offsets[i] : top.offsets[i + 1]]
        likely = ids[:-1] if len(ids) > min(LEAST, vocab) and np.exp(row[ids[-1]]) < np.exp(row).max() else ids
        assert len(set(ids)) == len(ids) and target in ids
        assert (np.diff(row[likely]) <= 0).all()
        kept = len(ids)
        assert min(LEAST, vocab) <= kept <= min(MOST, vocab) + 1
        left = np.exp(np.delete(row, ids)).sum()
        assert top.tails[i] == pytest.approx(left, rel=1e-5, abs=1e-12)
        if kept < min(MOST, vocab):
            assert left <= TAIL_MASS
        if min(LEAST, vocab) + 1 < kept < MOST:  # one less of the likely would have left too much
            fewer = np.sort(np.exp(row))[::-1][: kept - 2]
            assert 1 - fewer.sum() > TAIL_MASS


def test_of_equals_the_first_leads_as_in_argmax():
    flat = np.log(np.full((1, 512), 1 / 512))
    top = TopTokens.of(flat, np.array([300]))
    assert top.ids[:3].tolist() == [0, 1, 2] and top.most_probable()[0] == flat.argmax() == 0
    two = random_log_probs(1, 100, 2.0)
    two[0, [70, 20]] = two.max() + 1
    assert TopTokens.of(two, np.array([0])).ids[:2].tolist() == [20, 70]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_reference_does_not_diverge_from_itself(shape):
    reference, _, targets = cases(*shape)
    assert TopTokens.of(reference, targets).divergence_of(reference).max() < 1e-6


def test_parts_are_what_the_whole_says_there():
    reference, build, targets = cases(20, 512, 5.0)
    top = TopTokens.of(reference, targets)
    for first, end in ((0, 20), (3, 9), (19, 20), (4, 4)):
        part = top.part(first, end)
        assert len(part) == end - first
        assert np.array_equal(part.most_probable(), top.most_probable()[first:end])
        assert np.array_equal(part.log_probs_of(targets[first:end]), top.log_probs_of(targets)[first:end])
        assert np.allclose(part.divergence_of(build[first:end]), top.divergence_of(build)[first:end], rtol=1e-12, atol=0)


def test_a_token_that_the_build_finds_impossible_counts():
    reference = np.log(np.array([[0.7, 0.2, 0.1]]))
    build = np.log(np.array([[0.7, 0.3 - 1e-200, 1e-200]]))
    (found,) = TopTokens.of(reference, np.array([0])).divergence_of(build)
    assert found == pytest.approx(plain_kl(reference, build)[0], rel=1e-6)


def test_a_tail_that_the_build_finds_impossible_is_finite():
    reference = random_log_probs(1, 512, 1.0)
    top = TopTokens.of(reference, np.array([0]))
    build = np.full((1, 512), -2000.0)
    build[0, top.ids] = -np.log(len(top.ids))
    found = top.divergence_of(build)
    assert np.isfinite(found).all() and found[0] > 100
