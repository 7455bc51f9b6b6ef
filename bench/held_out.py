"""The held-out suite as numbers: one set of visual embeddings and tokens for every runner, and what a row says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from cobra_edge.regress import intervals
from cobra_edge.regress.intervals import Interval
from cobra_edge.regress.metrics import kl_divergence, negative_log_likelihood, top1_agreement

_DIGITS = 6  # significant ones that are kept


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
    """What became of the questions: measures of each line against the reference.

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
        """Measure logits, of each line (n, vocab) float32, against the reference's."""
        pairs = list(zip(reference, logits, strict=True))
        return cls(
            tuple(kl_divergence(a, b) for a, b in pairs),
            tuple(top1_agreement(a, b) for a, b in pairs),
            tuple(negative_log_likelihood(b, t) for b, t in zip(logits, questions.targets, strict=True)),
            np.array([bool((b.argmax(-1) == t).all()) for b, t in zip(logits, questions.targets, strict=True)]),
        )

    @property
    def kld_of_lines(self) -> np.ndarray:
        """Each line's sum, (lines,)."""
        return np.array([k.sum() for k in self.kld])


def figures(found: Answers, reference: Answers, questions: Questions) -> dict[str, Any]:
    """Return a row's figures, each with its interval."""
    images = questions.by_image
    counts = images(np.array([len(k) for k in found.kld]))
    agrees = np.array([a.sum() for a in found.agrees])
    nll, before = (images(np.array([a.sum() for a in answers.nll])) for answers in (found, reference))
    groups = [
        np.concatenate([k for k, at in zip(found.kld, questions.image, strict=True) if at == index])
        for index in range(len(questions.embeddings))
    ]
    caption = [n for n, task in zip(found.nll, questions.task, strict=True) if task == "caption"]
    return {
        "lines": len(found.kld),
        "images": len(questions.embeddings),
        "answer_tokens": int(counts.sum()),
        "kld_mean": kept(intervals.mean(images(found.kld_of_lines), counts)),
        "kld_p99": kept(intervals.quantile(groups, 0.99)),
        "top1_agreement": kept(intervals.mean(images(agrees), counts)),
        "perplexity_ratio": kept(intervals.difference_of_means(nll, before, counts).map(lambda x: math.exp(min(x, 700.0)))),
        "accuracy": {task: _accuracy(found, reference, questions, task) for task in questions.tasks},
        "caption_perplexity": _short(float(np.exp(np.concatenate(caption).mean()))) if caption else None,
    }


def _accuracy(found: Answers, reference: Answers, questions: Questions, task: str) -> dict[str, Any]:
    """Return lines, right (a share) and its difference to the reference on the same lines."""
    asked = np.array([t == task for t in questions.task])
    right, before, counts = (questions.by_image(asked & lines) for lines in (found.right, reference.right, asked))
    difference = intervals.difference_of_means(right, before, counts)
    return {"lines": int(asked.sum()), "right": _short(float(right.sum() / counts.sum())), "difference": kept(difference)}


def against(ours: Answers, other: Answers, questions: Questions) -> dict[str, Any]:
    """Compare two runners' mean KLD on the same tokens: ours minus the other's, and ours over the other's."""
    a, b = (questions.by_image(answers.kld_of_lines) for answers in (ours, other))
    counts = questions.by_image(np.array([len(k) for k in ours.kld]))
    ratio = kept(intervals.ratio_of_means(a, b)) if b.any() else None
    return {"kld_difference": kept(intervals.difference_of_means(a, b, counts)), "kld_ratio": ratio}


def kept(interval: Interval) -> dict[str, float]:
    """Return an interval as a result keeps it."""
    return {name: _short(value) for name, value in msgspec.structs.asdict(interval).items()}


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
