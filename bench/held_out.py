"""The held-out suite as arrays: visual embeddings and tokens shared by all runners, and their drift and accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cobra_edge.regress import intervals
from cobra_edge.regress.intervals import Interval
from cobra_edge.regress.metrics import kl_divergence, negative_log_likelihood, top1_agreement

from .quality_result import KldComparison, SuiteFigures, TaskAccuracy

_DIGITS = 6  # significant digits of a result


@dataclass(frozen=True, eq=False)
class Questions:
    """A suite, teacher-forced: prompts with their answers.

    Attributes:
        embeddings: (images, n_visual, d_model) float32, each image as the decoder sees it.
        image: (lines,) int32, which image a line is about.
        task: of each line.
        tokens: of each line (n,) int32, its prompt and its answer.
        answer_from: (lines,) int32, the first of these tokens after which logits are wanted.
        targets: of each line (n - answer_from,) int32, its answer with the end token: what should be said there.
    """

    embeddings: np.ndarray
    image: np.ndarray
    task: tuple[str, ...]
    tokens: tuple[np.ndarray, ...]
    answer_from: np.ndarray
    targets: tuple[np.ndarray, ...]

    def by_image(self, of_lines: np.ndarray) -> np.ndarray:
        """Sum (lines,) over each image's lines; returns (images,) float64."""
        return np.bincount(self.image, of_lines, len(self.embeddings))

    @property
    def tasks(self) -> list[str]:
        """Every task once, sorted."""
        return sorted(set(self.task))


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
    def of(cls, logits: Sequence[np.ndarray], reference: Sequence[np.ndarray], questions: Questions) -> Answers:
        """Compare logits, of each line (n, vocab) float32, with those of the reference."""
        pairs = list(zip(reference, logits, strict=True))
        return cls(
            tuple(kl_divergence(a, b) for a, b in pairs),
            tuple(top1_agreement(a, b) for a, b in pairs),
            tuple(negative_log_likelihood(b, t) for b, t in zip(logits, questions.targets, strict=True)),
            np.array([bool((b.argmax(-1) == t).all()) for b, t in zip(logits, questions.targets, strict=True)]),
        )

    @property
    def kld_of_lines(self) -> np.ndarray:
        """The sum over each line, (lines,) float64."""
        return np.array([k.sum() for k in self.kld])


def figures(found: Answers, reference: Answers, questions: Questions) -> SuiteFigures:
    """Return drift and accuracy with intervals."""
    images = questions.by_image
    counts = images(np.array([len(k) for k in found.kld]))
    agrees = np.array([a.sum() for a in found.agrees])
    nll, before = (images(np.array([a.sum() for a in answers.nll])) for answers in (found, reference))
    groups = [
        np.concatenate([k for k, at in zip(found.kld, questions.image, strict=True) if at == index])
        for index in range(len(questions.embeddings))
    ]
    caption = [n for n, task in zip(found.nll, questions.task, strict=True) if task == "caption"]
    return SuiteFigures(
        lines=len(found.kld),
        images=len(questions.embeddings),
        answer_tokens=int(counts.sum()),
        kld_mean=rounded(intervals.mean(images(found.kld_of_lines), counts)),
        kld_p99=rounded(intervals.quantile(groups, 0.99)),
        top1_agreement=rounded(intervals.mean(images(agrees), counts)),
        perplexity_ratio=rounded(intervals.difference_of_means(nll, before, counts).map(lambda x: math.exp(min(x, 700.0)))),
        accuracy={task: _accuracy(found, reference, questions, task) for task in questions.tasks},
        caption_perplexity=_short(float(np.exp(np.concatenate(caption).mean()))) if caption else None,
    )


def _accuracy(found: Answers, reference: Answers, questions: Questions, task: str) -> TaskAccuracy:
    of_task = np.array([t == task for t in questions.task])
    right, before, counts = (questions.by_image(of_task & lines) for lines in (found.right, reference.right, of_task))
    difference = intervals.difference_of_means(right, before, counts)
    return TaskAccuracy(int(of_task.sum()), _short(float(right.sum() / counts.sum())), rounded(difference))


def against(ours: Answers, other: Answers, questions: Questions) -> KldComparison:
    """Compare the mean KLD of two runners on the same tokens."""
    a, b = (questions.by_image(answers.kld_of_lines) for answers in (ours, other))
    counts = questions.by_image(np.array([len(k) for k in ours.kld]))
    ratio = rounded(intervals.ratio_of_means(a, b)) if b.any() else None
    return KldComparison(rounded(intervals.difference_of_means(a, b, counts)), ratio)


def rounded(interval: Interval) -> Interval:
    """Return an interval with the significant digits of a result."""
    return interval.map(_short)


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
