"""Drift and accuracy of a runner on the held-out suite, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cobra_edge.regress import intervals
from cobra_edge.regress.intervals import Interval
from cobra_edge.regress.metrics import kl_divergence, negative_log_likelihood, top1_agreement
from cobra_edge.suite.tokenized import TokenizedSuite

from .quality_result import KldComparison, SuiteFigures, TaskAccuracy

_DIGITS = 6  # significant digits of a result


def by_image(suite: TokenizedSuite, of_lines: np.ndarray) -> np.ndarray:
    """Sum values of lines (lines,) over the lines of each image; every line has one. Returns (images,) float64."""
    return np.bincount([line.image for line in suite.lines if line.image is not None], of_lines, len(suite.images))


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a runner, compared with the reference.

    Attributes:
        kld: of each line (n,) float64, nats.
        agrees: of each line (n,) bool, the likeliest token is the reference's.
        nll: of each line (n,) float64, -log p of each token of the true answer.
        right: (lines,) bool, greedy decoding gives exactly the answer.
    """

    kld: tuple[np.ndarray, ...]
    agrees: tuple[np.ndarray, ...]
    nll: tuple[np.ndarray, ...]
    right: np.ndarray

    @classmethod
    def of(cls, logits: Sequence[np.ndarray], reference: Sequence[np.ndarray], suite: TokenizedSuite) -> Answers:
        """Compare logits, of each line (n, vocab) float32, with those of the reference."""
        pairs, targets = list(zip(reference, logits, strict=True)), [np.array(line.answer) for line in suite.lines]
        return cls(
            tuple(kl_divergence(a, b) for a, b in pairs),
            tuple(top1_agreement(a, b) for a, b in pairs),
            tuple(negative_log_likelihood(b, t) for b, t in zip(logits, targets, strict=True)),
            np.array([bool((b.argmax(-1) == t).all()) for b, t in zip(logits, targets, strict=True)]),
        )

    @property
    def kld_of_lines(self) -> np.ndarray:
        """The sum over each line, (lines,) float64."""
        return np.array([k.sum() for k in self.kld])


def figures(found: Answers, reference: Answers, suite: TokenizedSuite) -> SuiteFigures:
    """Return drift and accuracy with intervals."""
    images = partial(by_image, suite)
    tasks = [line.line.task for line in suite.lines]
    counts = images(np.array([len(k) for k in found.kld]))
    agrees = np.array([a.sum() for a in found.agrees])
    nll, before = (images(np.array([a.sum() for a in answers.nll])) for answers in (found, reference))
    groups = [
        np.concatenate([k for k, line in zip(found.kld, suite.lines, strict=True) if line.image == index])
        for index in range(len(suite.images))
    ]
    caption = [n for n, task in zip(found.nll, tasks, strict=True) if task == "caption"]
    return SuiteFigures(
        lines=len(found.kld),
        images=len(suite.images),
        answer_tokens=int(counts.sum()),
        kld_mean=rounded(intervals.mean(images(found.kld_of_lines), counts)),
        kld_p99=rounded(intervals.quantile(groups, 0.99)),
        top1_agreement=rounded(intervals.mean(images(agrees), counts)),
        perplexity_ratio=rounded(intervals.difference_of_means(nll, before, counts).map(lambda x: math.exp(min(x, 700.0)))),
        accuracy={task: _accuracy(found, reference, suite, task) for task in sorted(set(tasks))},
        caption_perplexity=_short(float(np.exp(np.concatenate(caption).mean()))) if caption else None,
    )


def _accuracy(found: Answers, reference: Answers, suite: TokenizedSuite, task: str) -> TaskAccuracy:
    of_task = np.array([line.line.task == task for line in suite.lines])
    right, before, counts = (by_image(suite, of_task & lines) for lines in (found.right, reference.right, of_task))
    difference = intervals.difference_of_means(right, before, counts)
    return TaskAccuracy(int(of_task.sum()), _short(float(right.sum() / counts.sum())), rounded(difference))


def against(ours: Answers, other: Answers, suite: TokenizedSuite) -> KldComparison:
    """Compare the mean KLD of two runners on the same tokens."""
    a, b = (by_image(suite, answers.kld_of_lines) for answers in (ours, other))
    counts = by_image(suite, np.array([len(k) for k in ours.kld]))
    ratio = rounded(intervals.ratio_of_means(a, b)) if b.any() else None
    return KldComparison(rounded(intervals.difference_of_means(a, b, counts)), ratio)


def rounded(interval: Interval) -> Interval:
    """Return an interval with the significant digits of a result."""
    return interval.map(_short)


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
