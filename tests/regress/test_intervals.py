"""95 % intervals: against naive references, closed forms and the truth, which they must hold as often as they say."""

import math
from functools import partial

import numpy as np
import pytest
from msgspec import structs
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, binomtest, norm, skew, t, ttest_1samp

from bench.figures import PAGES, RESULTS, with_tables
from bench.heavy_tails import LIKE_OURS, TailedSuite
from bench.interval_coverage_result import DOMINATED, CoverageResult, coverage_table, images_needed, needed_table, tails_table
from bench.interval_coverage_run import coverage
from cobra_edge.bench.results import read_result
from cobra_edge.bench.tables import markdown
from cobra_edge.errors import InputError
from cobra_edge.regress import intervals
from cobra_edge.regress.aggregate import IMAGES_NEEDED
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


def hall(distance, skewness, n):
    """Hall's transformation of a studentized distance, as in his paper."""
    g = skewness / math.sqrt(n)
    return distance + g * (distance**2 / 3 + 1 / 6) + g**2 * distance**3 / 27


def by_search(a, b, positive):
    """The interval of sum(a) / sum(b) whose ends a test would just not refuse, found by search."""
    n, value, error = len(a), a.sum() / b.sum(), linear_error(a, b)
    quantile, skewness = t.ppf(0.975, n - 1), skew(a - value * b)
    ends = [brentq(lambda x, q=q: hall(x, skewness, n) - q, -99, 99) for q in (quantile, -quantile)]
    below, above = max(quantile, ends[0]), max(quantile, -ends[1])
    if not positive:
        return Interval(value, value - below * error, value + above * error)
    factor = math.exp(quantile * error / value)
    return Interval(value, value / factor, max(value * factor, value + above * error))


def same(found, expected, rel=1e-6):
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high), rel=rel)


@pytest.mark.parametrize("images", [3, 8, 40])
def test_means_and_ratios_are_what_hall_s_test_does_not_refuse(images):
    counts, a, b = clusters(np.random.default_rng(7), images)
    same(intervals.mean(a, counts), by_search(a, counts, True))
    same(intervals.difference_of_means(a, b, counts), by_search(a - b, counts, False))
    same(intervals.mean(b - a, counts, positive=False), by_search(b - a, counts, False))
    same(intervals.ratio_of_means(a, b), by_search(a, b, True))
    same(intervals.root_ratio(a, b), by_search(a, b, True).map(math.sqrt))


@pytest.mark.parametrize("images", [8, 16, 130])
def test_no_bound_explodes(images):
    """One image that is all of the drift is the worst case."""
    values = np.zeros(images)
    values[0] = 1.0
    found, quantile = intervals.mean(values, np.ones(images)), t.ppf(0.975, images - 1)
    assert found.high <= found.value * math.exp(quantile) * (1 + 1e-9) and found.low > 0
    for seed in range(50):
        values = np.random.default_rng(seed).pareto(0.5, images)
        found = intervals.mean(values, np.ones(images))
        assert found.value < found.high <= found.value * math.exp(quantile) * (1 + 1e-9)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 31, 129, 4001])
def test_student_s_quantile(freedom):
    assert intervals._student(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=1e-12)


def test_bounds_of_a_measure_cut_its_interval():
    assert Interval(0.5, -0.2, 1.7).within(0, 1) == Interval(0.5, 0, 1) and Interval(0, -0.5, 0.5).within(-1, 1).high == 0.5


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
    """With Student's t for Z: Wilson's at another confidence."""
    confidence = 1 - 2 * norm.sf(t.ppf(0.975, 19))
    known = binomtest(right, 60).proportion_ci(confidence, method="wilson")
    found = intervals.share(np.full(20, right / 20), np.full(20, 3.0))
    assert (found.low, found.high) == pytest.approx((known.low, known.high)) and found.high - found.low > 0.05


def test_a_share_holds_what_a_score_test_would_not_refuse():
    random = np.random.default_rng(2)
    counts = random.integers(1, 9, 30).astype(float)
    right = random.binomial(counts.astype(int), random.beta(4, 1, 30)).astype(float)
    p = right.sum() / counts.sum()
    per_line = linear_error(right, counts) ** 2 / (p * (1 - p))

    def refusal(truth):
        return (p - truth) ** 2 - t.ppf(0.975, 29) ** 2 * truth * (1 - truth) * per_line

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

    limit = t.ppf(0.975, 39)
    for q, found in zip((0.2, 0.5, 0.9), intervals.quantiles(groups, [0.2, 0.5, 0.9]), strict=True):
        low = min(v for v in values if refused(q, np.array([(g <= v).sum() for g in groups], float)) >= -limit)
        high = max(v for v in values if refused(q, np.array([(g < v).sum() for g in groups], float)) <= limit)
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
    assert (wide.coverage, wide.width, wide.method, wide.value, wide.suites) == (1.0, 18.0, "Hall", 4.0, 40)
    assert (beside.coverage, beside.below, beside.above, beside.values, beside.reach) == (0.0, 0.0, 1.0, 1, 3.0)
    rows = structs.replace(wide, build="w4"), structs.replace(beside, build="w4", values=200)
    tails = (structs.replace(wide, build=LIKE_OURS, images=16, values=200),)
    result = CoverageResult(model="cobra-mini", replicates=40, rows=rows, tails=tails, machine=MACHINE)
    shown = markdown([coverage_table(result), tails_table(result), needed_table(result)])
    assert "| `perplexity` | Hall | **0.0%** |" in shown and "| 100.0% (" in shown and "40 drawn suites" in shown


def test_a_suite_without_a_measure_does_not_count():
    class Empty(MadeUpAggregate):
        def resampled(self, picks):
            return Empty(self.values[picks])

        def figures(self):
            return super().figures() if 8.0 in self.values else {}

    wide, _ = coverage(Empty(np.arange(9.0)), 5, 200)
    assert 40 < wide.suites < 160 and wide.coverage == 1.0  # 5 of 9 with replacement hold a given one in 44 %


def test_heavy_tails_are_known_to_be_drawn_too_seldom():
    hard = np.where(np.arange(400) < 20, 20.0, 1.0)[:, None] * np.ones((400, 3))
    mean = coverage(TailedSuite(hard), 8, 100)[0]
    assert (mean.measure, mean.value) == ("kld_mean", pytest.approx(1.95)) and mean.below > 0.4 and mean.above == 0


@pytest.mark.parametrize("kind", [kind for kind in IMAGES_NEEDED if kind not in DOMINATED])
def test_images_needed_are_those_measured(kind):
    """From as many images on, the measured coverage is 90 % or more: `python -m bench.interval_coverage`."""
    result = read_result(RESULTS / "interval-coverage.json", CoverageResult)
    assert images_needed(result, kind) == IMAGES_NEEDED[kind]


def test_pages_are_made_from_the_results():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- table: ") >= 1 and with_tables(text) == text, f"{page.name}: run make figures"
