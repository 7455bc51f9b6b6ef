"""95 % intervals: against naive references, closed forms and the truth, which they must hold as often as they say."""

import math
import sys
from functools import partial

import numpy as np
import pytest
from msgspec import structs
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, binomtest, t, ttest_1samp

from bench.figures import PAGES, with_tables
from bench.interval_coverage_result import CoverageResult, coverage_table
from bench.interval_coverage_run import coverage
from cobra_edge.bench.tables import markdown
from cobra_edge.errors import InputError, MachineError
from cobra_edge.regress import intervals
from cobra_edge.regress.intervals import Interval

from ..machine_case import MACHINE

Z = 1.959963984540054


def clusters(random, images=40):
    """Counts, and two positive skewed measures that share the difficulty of an image."""
    counts = random.integers(1, 9, images).astype(float)
    hard = random.gamma(0.5, size=images)
    return counts, hard * counts * random.gamma(2.0, 0.1, images), hard * counts * random.gamma(2.0, 0.2, images)


def linear_error(a, b):
    """The textbook's standard error of sum(a) / sum(b)."""
    off = a - a.sum() / b.sum() * b
    return math.sqrt((off**2).sum() * len(a) / (len(a) - 1)) / b.sum()


def naive_bootstrap_t(a, b, by_ratio):
    value, own, away = a.sum() / b.sum(), linear_error(a, b), []
    for row in intervals._drawn(len(a), 0, intervals.RESAMPLES):
        picks = np.repeat(np.arange(len(a)), row.astype(int))
        drawn, error = a[picks].sum() / b[picks].sum(), linear_error(a[picks], b[picks])
        away.append(abs(math.log(drawn / value) / (error / drawn)) if by_ratio else abs(drawn - value) / error)
    reach = max(np.quantile(away, 0.95), t.ppf(0.975, len(a) - 1)) * own
    if by_ratio:
        return Interval(value, value * math.exp(-reach / value), value * math.exp(reach / value))
    return Interval(value, value - reach, value + reach)


def same(found, expected, rel=1e-6):
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high), rel=rel)


def test_means_and_ratios_are_those_of_a_naive_loop(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    counts, a, b = clusters(np.random.default_rng(7))
    same(intervals.mean(a, counts), naive_bootstrap_t(a, counts, True))
    same(intervals.difference_of_means(a, b, counts), naive_bootstrap_t(a - b, counts, False))
    same(intervals.mean(a - b, counts), naive_bootstrap_t(a - b, counts, False))
    same(intervals.ratio_of_means(a, b), naive_bootstrap_t(a, b, True))
    same(intervals.root_ratio(a, b), naive_bootstrap_t(a, b, True).map(math.sqrt))


def test_a_mean_of_a_large_normal_sample_is_student_s():
    values = np.random.default_rng(1).normal(3.0, size=400) - 3.0
    found, known = intervals.mean(values, np.ones(400)), ttest_1samp(values, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.1 * (known.high - known.low))


def test_lines_of_one_image_are_not_independent():
    """Ten lines that all say what their image says are no more than one: the interval must not shrink."""
    of_images, right = np.random.default_rng(0).normal(size=50), (np.arange(50) % 7 > 0).astype(float)
    same(intervals.mean(10 * of_images, np.full(50, 10.0)), intervals.mean(of_images, np.ones(50)))
    same(intervals.share(10 * right, np.full(50, 10.0)), intervals.share(right, np.ones(50)))
    same(intervals.quantile([np.full(10, x) for x in of_images], 0.3), intervals.quantile(of_images[:, None], 0.3), 0.2)


@pytest.mark.parametrize("right", [0, 60])
def test_a_share_of_none_or_all_is_wilson_s_and_has_a_width(right):
    found, known = (
        intervals.share(np.full(20, right / 20), np.full(20, 3.0)),
        binomtest(right, 60).proportion_ci(method="wilson"),
    )
    assert (found.low, found.high) == pytest.approx((known.low, known.high)) and found.high - found.low > 0.05


def test_a_share_holds_what_a_score_test_would_not_refuse():
    random = np.random.default_rng(2)
    counts = random.integers(1, 9, 30).astype(float)
    right = random.binomial(counts.astype(int), random.beta(4, 1, 30)).astype(float)
    p = right.sum() / counts.sum()
    per_line = linear_error(right, counts) ** 2 / (p * (1 - p))

    def refusal(truth):
        return (p - truth) ** 2 - Z**2 * truth * (1 - truth) * per_line

    same(intervals.share(right, counts), Interval(p, brentq(refusal, 1e-9, p), brentq(refusal, p, 1 - 1e-9)))


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (0, 4), (2, 6), (9, 5)])
def test_a_difference_of_shares_is_tango_s(gained, lost):
    """The reference finds the maximum likelihood share of losses by search, the module by a formula."""
    n, risen = 40, (gained - lost) / 40

    def score(rise):
        def unlikely(share_lost):
            cells = ((gained, share_lost + rise), (lost, share_lost), (n - gained - lost, 1 - 2 * share_lost - rise))
            return -sum(k * math.log(max(p, 1e-300)) for k, p in cells if k)

        bounds = (max(0.0, -rise), (1 - rise) / 2)
        estimate = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        return (gained - lost - n * rise) / math.sqrt(n * (2 * estimate + rise * (1 - rise)))

    low, high = intervals._tango(gained, lost, n)
    assert score(low) == pytest.approx(Z, rel=1e-3) and score(high) == pytest.approx(-Z, rel=1e-3)
    assert intervals._tango(lost, gained, n) == pytest.approx((-high, -low), abs=1e-9)
    up, down = (np.arange(n) < gained) * 1.0, (np.arange(n) >= n - lost) * 1.0
    found = intervals.difference_of_shares(up, down, np.ones(n))
    assert found.value == pytest.approx(risen)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low))  # n - 1 and not n in the variance


def test_quantiles_hold_every_value_that_a_test_would_not_refuse():
    random = np.random.default_rng(3)
    groups = [random.gamma(0.5, random.gamma(1.0), size) for size in random.integers(1, 9, 40)]
    values, counts = np.sort(np.concatenate(groups)), np.array([len(g) for g in groups], float)

    def refused(q, below):
        part = below.sum() / counts.sum()
        effect = linear_error(below, counts) ** 2 / (part * (1 - part)) if 0 < part < 1 else 1 / counts.sum()
        return (part - q) / math.sqrt(q * (1 - q) * effect)

    for q, found in zip((0.2, 0.5, 0.9), intervals.quantiles(groups, [0.2, 0.5, 0.9]), strict=True):
        low = min(v for v in values if refused(q, np.array([(g <= v).sum() for g in groups], float)) >= -Z)
        high = max(v for v in values if refused(q, np.array([(g < v).sum() for g in groups], float)) <= Z)
        same(found, Interval(float(np.quantile(values, q)), low, high), 1e-12)
        assert found == intervals.quantile(groups, q)


TOO_FEW, TOO_MANY = (partial(binom.ppf, chance) for chance in (1e-3, 1 - 1e-3))
SUITES = 1000


def held(found, truth, scale=1.0):
    """Count intervals that hold the truth, each made wider about its value."""
    ends = [(i.value + scale * (i.low - i.value), i.value + scale * (i.high - i.value)) for i in found]
    return sum(low <= truth <= high for low, high in ends)


def is_95_percent(count):
    return TOO_FEW(SUITES, 0.93) <= count <= TOO_MANY(SUITES, 0.97)


def skewed(random, images=70):
    """Lines of images that are hard or easy together; half the values are tiny."""
    counts = random.integers(2, 9, images)
    hard = random.gamma(0.7, size=images)
    return [h * random.gamma(0.5, size=n) for h, n in zip(hard, counts, strict=True)]


@pytest.mark.parametrize("measure", ["mean", "root", "share", "quantile"])
def test_intervals_hold_the_truth_as_often_as_they_say(measure):
    """Of a known distribution; the check itself must refuse intervals of 0.7 and of 1.5 times the width."""
    random, found = np.random.default_rng(11), []
    truth = {"mean": 0.35, "root": math.sqrt(0.7 * 1.7 * 0.5 * 1.5)}.get(measure)
    if truth is None:  # all of a large sample is as good as known
        many = np.concatenate(skewed(np.random.default_rng(5), 200_000))
        truth = float((many < 1.0).mean()) if measure == "share" else float(np.quantile(many, 0.9))
    for _ in range(SUITES):
        groups = skewed(random)
        counts = np.array([len(g) for g in groups], float)
        if measure == "mean":
            found.append(intervals.mean(np.array([g.sum() for g in groups]), counts))
        elif measure == "root":
            found.append(intervals.root_ratio(np.array([(g**2).sum() for g in groups]), counts))
        elif measure == "share":
            found.append(intervals.share(np.array([(g < 1.0).sum() for g in groups]), counts))
        else:
            found.append(intervals.quantile(groups, 0.9))
    if measure != "root":  # squares of such a tail are more than 70 images can tell; it errs to one side, and not far
        assert is_95_percent(held(found, truth))
        assert not is_95_percent(held(found, truth, 0.7)) and not is_95_percent(held(found, truth, 1.5))
    else:
        assert TOO_FEW(SUITES, 0.88) <= held(found, truth) <= TOO_MANY(SUITES, 0.97)


def every_measure(x, counts):
    """Call all of them with one column."""
    return [
        intervals.mean(x, counts),
        intervals.difference_of_means(x, np.zeros(len(x)), counts),
        intervals.ratio_of_means(x, counts),
        intervals.root_ratio(x, counts),
        intervals.share(x, counts),
        intervals.difference_of_shares(x, np.zeros(len(x)), counts),
        intervals.quantile([x[i : i + 1] for i in range(len(x))], 0.5),
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_no_interval(bad):
    for found in every_measure(np.array([1.0, bad, 0.5]), np.ones(3)):
        assert math.isnan(found.value) and math.isnan(found.low) and math.isnan(found.high)


def test_one_image_is_refused():
    for measure in (intervals.mean, intervals.ratio_of_means, intervals.root_ratio, intervals.share):
        with pytest.raises(InputError, match="two or more images"):
            measure(np.ones(1), np.ones(1))
    for call in (
        lambda: intervals.difference_of_means(np.ones(1), np.ones(1), np.ones(1)),
        lambda: intervals.difference_of_shares(np.ones(1), np.zeros(1), np.ones(1)),
        lambda: intervals.share(np.ones(2), np.array([1.0, 0.0])),
        lambda: intervals.quantiles([np.ones(3), np.ones(0)], [0.5]),
    ):
        with pytest.raises(InputError, match="two or more images"):
            call()


def test_a_mean_of_equals_has_no_width():
    for value in (0.0, 0.1, 1.0):
        assert intervals.mean(np.full(5, value), np.ones(5)) == Interval(value, value, value)
    assert intervals.quantile([np.full(3, 0.1)] * 5, 0.9) == Interval(0.1, 0.1, 0.1)
    assert intervals.root_ratio(np.zeros(5), np.ones(5)) == Interval(0, 0, 0)


def test_two_images_are_known_to_say_little():
    found = intervals.mean(np.array([1.0, 2.0]), np.ones(2))
    same(found, Interval(1.5, 1.5 * math.exp(-t.ppf(0.975, 1) / 3), 1.5 * math.exp(t.ppf(0.975, 1) / 3)))


def test_images_without_a_line_of_a_task_are_no_part():
    x, counts = np.array([3.0, 1.0, 2.0, 0.0]), np.array([4.0, 4.0, 4.0, 0.0])
    same(intervals.mean(x, counts), intervals.mean(x[:3], counts[:3]))
    same(intervals.share(x, counts), intervals.share(x[:3], counts[:3]))
    same(intervals.difference_of_shares(x, 0 * x, counts), intervals.difference_of_shares(x[:3], 0 * x[:3], counts[:3]))


def test_where_few_images_differ_a_suite_without_them_is_left_out():
    """Their standard error is the root of a rounding: measured in it, any distance would be endless."""
    counts = np.random.default_rng(0).integers(30, 50, 130).astype(float)
    more = counts + np.where(np.arange(130) < 2, 9.0, 0.0)
    found = intervals.ratio_of_means(more, counts)
    assert found.low < found.value < found.high < 1.1


def test_a_large_suite_is_drawn_in_pieces(monkeypatch):
    sizes, drawn, x = [], intervals._drawn, np.random.default_rng(0).gamma(1.0, size=500)
    whole = intervals.mean(x, np.ones(500))
    monkeypatch.setattr(intervals, "_DRAWN_AT_ONCE", 1 << 16)
    monkeypatch.setattr(intervals, "_drawn", lambda *arguments: sizes.append(drawn(*arguments).shape) or drawn(*arguments))
    pieces = intervals.mean(x, np.ones(500))
    assert max(rows * images for rows, images in sizes) <= 1 << 16 and sum(rows for rows, _ in sizes) == intervals.RESAMPLES
    same(pieces, whole, 0.01)
    assert pieces == intervals.mean(x, np.ones(500))


def test_intervals_say_what_they_lack(monkeypatch):
    intervals._student.cache_clear()
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    for call in (intervals.mean, lambda x, n: intervals.difference_of_shares(x, 0 * x, n)):
        with pytest.raises(MachineError, match=r"\.\[regress\]"):
            call(np.array([1.0, 0.5, 0.0]), np.ones(3))


class MadeUpAggregate:
    """Images of one number each, whose figure is their mean."""

    def __init__(self, values):
        self.values, self.images = values, len(values)

    def resampled(self, picks):
        return MadeUpAggregate(self.values[picks])

    def figures(self):
        from cobra_edge.regress.report import Figure

        wide = Figure(self.values.mean(), self.values.mean() - 9, self.values.mean() + 9)
        return {"kld_mean": wide, "perplexity": Figure(1.0, 2.0, 3.0) if self.images < 9 else Figure(1.0, 1.0, 1.0)}


def test_coverage_counts_the_intervals_that_hold_the_truth():
    wide, beside = coverage(MadeUpAggregate(np.arange(9.0)), 5, 40)
    assert (wide.coverage, wide.width, wide.method, wide.value) == (1.0, 18.0, "bootstrap-t", 4.0)
    assert (beside.coverage, beside.below, beside.above, beside.values) == (0.0, 0.0, 1.0, 1)
    rows = structs.replace(wide, build="w4"), structs.replace(beside, build="w4", values=200)
    result = CoverageResult(model="cobra-mini", replicates=40, rows=rows, machine=MACHINE)
    shown = markdown([coverage_table(result, small=False)])
    assert "| `perplexity` | bootstrap-t | **0.0%** |" in shown and "| 100.0% (" in shown and "40 drawn suites" in shown


def test_pages_are_made_from_the_results():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- table: ") >= 1 and with_tables(text) == text, f"{page.name}: run make figures"
