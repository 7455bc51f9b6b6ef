"""Lines and readings made by hand, for tests of what is computed from them."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from cobra_edge.regress.asked import AskedLine
from cobra_edge.regress.compared import ComparedLine
from cobra_edge.regress.suite import Line


def random_log_probs(positions: int, vocab: int, sharpness: float, seed: int = 0) -> np.ndarray:
    """Return log-probabilities (positions, vocab) float64; the sharper, the fewer tokens have them all."""
    logits = np.random.default_rng(seed).standard_normal((positions, vocab)) * sharpness
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def plain_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL of log-probabilities (positions, vocab), (positions,)."""
    return np.array([sum(np.exp(a) * (a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)])


def asked_line(number: int, task: str = "color", picture: int | None = 0, **line: Any) -> AskedLine:
    """Return a line of a three-token question and a two-token answer."""
    image = None if picture is None else f"{picture}.png"
    return AskedLine(number, Line(f"Question {number}?", "Red", task, image, **line), (7, 8, 9), [5, 0], picture)


def compared_line(number: int, picture: int | None = 0, **changes: Any) -> ComparedLine:
    """Return a line without drift; `changes` replace its fields."""
    plain = ComparedLine(
        number=number,
        picture=picture,
        prompt_kld=[0.0, 0.0],
        answer_kld=[0.0, 0.0],
        agrees=[True, True],
        right=[-0.1, -0.1],
        right_reference=[-0.1, -0.1],
        states=[(0.0, 1.0), (0.0, 4.0)],
        vision=None if picture is None else (0.0, 2.0),
        reply=[5],
        reference_reply=[5],
        text="Red",
        reference_text="Red",
        score=1.0,
        reference_score=1.0,
        tail=0.0,
        kept=8,
    )
    return msgspec.structs.replace(plain, **changes)
