"""Figures of a row: a runner's answers to the held-out suite against the reference's, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np

from cobra_edge.regress import intervals
from cobra_edge.regress.intervals import Interval
from cobra_edge.regress.metrics import kl_divergence, negative_log_likelihood, top1_agreement
from cobra_edge.suite.tokenized import TokenizedSuite

_DIGITS = 6  # significant ones that are kept


def by_image(suite: TokenizedSuite, of_lines: np.ndarray) -> np.ndarray:
    """Sum values of lines (lines,) over the lines of each image; every line has one. Returns (images,) float64."""
    return np.bincount([line.image for line in suite.lines if line.image is not None], of_lines, len(suite.images))


@dataclass(frozen=True, eq=False)
class Answers:
    """Measures of each line of a suite against the reference.

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
        """Measure logits, of each line (n, vocab) float32, against the reference's."""
        pairs, targets = list(zip(reference, logits, strict=True)), [np.array(line.answer) for line in suite.lines]
        return cls(
            tuple(kl_divergence(a, b) for a, b in pairs),
            tuple(top1_agreement(a, b) for a, b in pairs),
            tuple(negative_log_likelihood(b, t) for b, t in zip(logits, targets, strict=True)),
            np.array([bool((b.argmax(-1) == t).all()) for b, t in zip(logits, targets, strict=True)]),
        )

    @property
    def kld_of_lines(self) -> np.ndarray:
        """Each line's sum, (lines,)."""
        return np.array([k.sum() for k in self.kld])


def figures(found: Answers, reference: Answers, suite: TokenizedSuite) -> dict[str, Any]:
    """Return a row's figures, each with its interval."""
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
    return {
        "lines": len(found.kld),
        "images": len(suite.images),
        "answer_tokens": int(counts.sum()),
        "kld_mean": kept(intervals.mean(images(found.kld_of_lines), counts)),
        "kld_p99": kept(intervals.quantile(groups, 0.99)),
        "top1_agreement": kept(intervals.mean(images(agrees), counts)),
        "perplexity_ratio": kept(intervals.difference_of_means(nll, before, counts).map(lambda x: math.exp(min(x, 700.0)))),
        "accuracy": {task: _accuracy(found, reference, suite, task) for task in sorted(set(tasks))},
        "caption_perplexity": _short(float(np.exp(np.concatenate(caption).mean()))) if caption else None,
    }


def _accuracy(found: Answers, reference: Answers, suite: TokenizedSuite, task: str) -> dict[str, Any]:
    """Return lines, right (a share) and its difference to the reference on the same lines."""
    asked = np.array([line.line.task == task for line in suite.lines])
    right, before, counts = (by_image(suite, asked & lines) for lines in (found.right, reference.right, asked))
    difference = intervals.difference_of_means(right, before, counts)
    return {"lines": int(asked.sum()), "right": _short(float(right.sum() / counts.sum())), "difference": kept(difference)}


def against(ours: Answers, other: Answers, suite: TokenizedSuite) -> dict[str, Any]:
    """Compare two runners' mean KLD on the same tokens: ours minus the other's, and ours over the other's."""
    a, b = (by_image(suite, answers.kld_of_lines) for answers in (ours, other))
    counts = by_image(suite, np.array([len(k) for k in ours.kld]))
    ratio = kept(intervals.ratio_of_means(a, b)) if b.any() else None
    return {"kld_difference": kept(intervals.difference_of_means(a, b, counts)), "kld_ratio": ratio}


def kept(interval: Interval) -> dict[str, float]:
    """Return an interval as a result keeps it."""
    return {name: _short(value) for name, value in msgspec.structs.asdict(interval).items()}


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
