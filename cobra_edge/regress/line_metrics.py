"""A build's reading of a line beside the reference's: a few hundred bytes a line, from which every figure is made."""

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
    """What became of one line.

    Attributes:
        number: in the suite.
        image: index of its image, or None.
        prompt_kld, answer_kld: KL(reference ‖ build) in nats, after each token that another one follows; the first of the
            answer's is after the question's last.
        agrees: of the answer's, the likeliest token is the reference's.
        right, right_reference: probability of each right token of the answer, build and reference; in nats, log p.
        states: of each layer, squared distance of the recurrent states after the line, and the reference's squared length.
        vision: the same of the image's embeddings, or None.
        reply, reference_reply: free answers, tokens.
        text, reference_text: what they say.
        score, reference_score: of the texts, by the task's metric.
        tail, prompt_tail: of the reference's distributions, the largest probability not kept, in the answer and the question.
        kept: how many of their tokens are kept at most.
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
        """The first token in which the free answers differ, from 0; None where they are alike."""
        if self.reply == self.reference_reply:
            return None
        pairs = zip(self.reply, self.reference_reply, strict=False)
        shorter = min(len(self.reply), len(self.reference_reply))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def measure_line(
    tokenized: TokenizedLine, reference: Prediction, build: Prediction, text_of: Callable[[Sequence[int]], str]
) -> LineMetrics:
    """Hold a build's reading of a line against the reference's.

    Args:
        asked: the line.
        reference: its log-probabilities whole, or the likely part.
        build: its log-probabilities whole.
        text_of: turns tokens into text.

    Raises:
        DriftError: the build's log-probabilities or states are not finite: there is no distance to measure.
    """
    log_probs = build.log_probs
    assert isinstance(log_probs, np.ndarray)
    if not (np.isfinite(log_probs).all() and np.isfinite(build.state).all()):
        raise DriftError(
            f"line {tokenized.number}: the build's answer is not finite where the reference's is; it overflows, take more bits"
        )
    first, targets = len(tokenized.prompt) - 1, np.array(tokenized.answer)  # where the answer begins to be foretold
    divergence, likeliest, right_reference = _against(reference.log_probs, log_probs, np.array(tokenized.tokens[1:]))
    top = reference.log_probs if isinstance(reference.log_probs, TopTokens) else None
    metric, texts = METRICS[tokenized.line.metric], [text_of(r.reply) for r in (build, reference)]
    return LineMetrics(
        number=tokenized.number,
        image=tokenized.image,
        prompt_kld=divergence[:first].tolist(),
        answer_kld=divergence[first:].tolist(),
        agrees=(log_probs[first:].argmax(-1) == likeliest[first:]).tolist(),
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
    """Return KLD, the reference's likeliest token and its log p of the right one, all (positions,)."""
    if isinstance(reference, TopTokens):
        return reference.divergence_of(log_probs), reference.likeliest(), reference.log_probs_of(targets)
    right = np.take_along_axis(reference, targets[:, None], -1)[:, 0]
    return divergence(reference, log_probs), reference.argmax(-1), right


def _distance(build: np.ndarray | None, reference: np.ndarray | None) -> tuple[float, float]:
    """Return the squared distance, and the reference's squared length."""
    assert build is not None and reference is not None
    wide = reference.astype(np.float64)
    return float(np.square(build - wide).sum()), float(np.square(wide).sum())
