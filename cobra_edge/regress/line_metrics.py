"""Metrics of one line, build compared with reference: a few hundred bytes, from which all figures are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from ..errors import DriftError
from ..suite.scoring import METRICS
from ..suite.tokenized import TokenizedLine
from .metrics import divergence
from .predictions import Prediction
from .top_tokens import TopTokens


class LineMetrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Metrics of one line.

    Attributes:
        number: of the line in the suite.
        image: index of its image, or None.
        prompt_kld, answer_kld: KL(reference ‖ build) in nats of each next-token distribution; those that predict a token of the
            answer belong to `answer_kld`.
        agrees: per answer token, whether both have the same most probable token.
        right, right_reference: log p of each given answer token, by the build and by the reference.
        states: per layer, squared distance of the final recurrent states, and squared norm of the reference's.
        vision: the same for the visual embeddings, or None.
        reply, reference_reply: tokens of the greedy replies.
        text, reference_text: the replies, decoded.
        score, reference_score: of the replies, by the metric of the task.
        tail, prompt_tail: largest probability not kept of a reference distribution, in the answer and in the question.
        kept: largest number of tokens kept of a reference distribution.
    """

    number: int
    image: int | None
    prompt_kld: list[float]
    answer_kld: list[float]
    agrees: list[bool]
    right: list[float]
    right_reference: list[float]
    states: list[tuple[float, float]]
    vision: tuple[float, float] | None
    reply: list[int]
    reference_reply: list[int]
    text: str
    reference_text: str
    score: float
    reference_score: float
    tail: float
    prompt_tail: float
    kept: int

    @property
    def diverges_at(self) -> int | None:
        """Index of the first token in which the replies differ; None if they are equal."""
        if self.reply == self.reference_reply:
            return None
        pairs = zip(self.reply, self.reference_reply, strict=False)
        shorter = min(len(self.reply), len(self.reference_reply))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def measure_line(
    tokenized: TokenizedLine, reference: Prediction, build: Prediction, text_of: Callable[[Sequence[int]], str]
) -> LineMetrics:
    """Compare a build's prediction of a line with the reference's.

    Args:
        tokenized: the line.
        reference: with all log-probabilities, or TopTokens.
        build: with all log-probabilities.
        text_of: decodes tokens.

    Raises:
        DriftError: log-probabilities or states of the build are not finite.
    """
    log_probs = build.log_probs
    assert isinstance(log_probs, np.ndarray)
    if not (np.isfinite(log_probs).all() and np.isfinite(build.state).all()):
        raise DriftError(f"line {tokenized.number}: the build's logits or states are not finite; it overflows, use more bits")
    first, targets = len(tokenized.prompt) - 1, np.array(tokenized.answer)  # `first` predicts the first answer token
    divergence, most_probable, right_reference = _against(reference.log_probs, log_probs, np.array(tokenized.tokens[1:]))
    top = reference.log_probs if isinstance(reference.log_probs, TopTokens) else None
    metric, texts = METRICS[tokenized.line.metric], [text_of(r.reply) for r in (build, reference)]
    return LineMetrics(
        number=tokenized.number,
        image=tokenized.image,
        prompt_kld=divergence[:first].tolist(),
        answer_kld=divergence[first:].tolist(),
        agrees=(log_probs[first:].argmax(-1) == most_probable[first:]).tolist(),
        right=np.take_along_axis(log_probs[first:], targets[:, None], -1)[:, 0].tolist(),
        right_reference=right_reference[first:].tolist(),
        states=[_distance(a, b) for a, b in zip(build.state, reference.state, strict=True)],
        vision=None if tokenized.image is None else _distance(build.embeddings, reference.embeddings),
        reply=list(build.reply),
        reference_reply=list(reference.reply),
        text=texts[0],
        reference_text=texts[1],
        score=metric.score(texts[0], tokenized.line),
        reference_score=metric.score(texts[1], tokenized.line),
        tail=0.0 if top is None else float(top.tails[first:].max(initial=0)),
        prompt_tail=0.0 if top is None else float(top.tails[:first].max(initial=0)),
        kept=0 if top is None else int(np.diff(top.offsets).max(initial=0)),
    )


def _against(
    reference: np.ndarray | TopTokens, log_probs: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return KLD float64, the reference's most probable token int and its log p of the target float64, all (positions,)."""
    if isinstance(reference, TopTokens):
        return reference.divergence_of(log_probs), reference.most_probable(), reference.log_probs_of(targets)
    right = np.take_along_axis(reference, targets[:, None], -1)[:, 0]
    return divergence(reference, log_probs), reference.argmax(-1), right


def _distance(build: np.ndarray | None, reference: np.ndarray | None) -> tuple[float, float]:
    """Return the squared distance, and the squared norm of the reference."""
    assert build is not None and reference is not None
    wide = reference.astype(np.float64)
    return float(np.square(build - wide).sum()), float(np.square(wide).sum())
