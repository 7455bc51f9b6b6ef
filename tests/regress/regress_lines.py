"""Lines, suites and runs for tests of `regress`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.regress.line_metrics import LineMetrics
from cobra_edge.regress.runner import Run
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import HELDOUT
from cobra_edge.suite.tokenized import TokenizedLine


def random_log_probs(positions: int, vocab: int, sharpness: float, seed: int = 0) -> np.ndarray:
    """Return log-probabilities (positions, vocab) float64; the sharper, the fewer tokens have them all."""
    logits = np.random.default_rng(seed).standard_normal((positions, vocab)) * sharpness
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def plain_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL of log-probabilities (positions, vocab), (positions,)."""
    return np.array([sum(np.exp(a) * (a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)])


def tokenized_line(number: int, task: str = "color", image: int | None = 0, **line: Any) -> TokenizedLine:
    """Return a line of a three-token question and a two-token answer."""
    file = None if image is None else f"{image}.png"
    return TokenizedLine(number, Line(f"Question {number}?", "Red", task, file, **line), (7, 8, 9), [5, 0], image)


def line_metrics(number: int, image: int | None = 0, **changes: Any) -> LineMetrics:
    """Return a line without drift; `changes` replace its fields."""
    plain = LineMetrics(
        number=number,
        image=image,
        prompt_kld=[0.0, 0.0],
        answer_kld=[0.0, 0.0],
        agrees=[True, True],
        right=[-0.1, -0.1],
        right_reference=[-0.1, -0.1],
        states=[(0.0, 1.0), (0.0, 4.0)],
        vision=None if image is None else (0.0, 2.0),
        reply=[5],
        reference_reply=[5],
        text="Red",
        reference_text="Red",
        score=1.0,
        reference_score=1.0,
        tail=0.0,
        prompt_tail=0.0,
        kept=8,
    )
    return msgspec.structs.replace(plain, **changes)


def run_of(bundle: Path, baseline: str | Path = "fp16", **changes: Any) -> Run:
    """Return a run of a bundle on one thread, without attribution; `changes` replace its fields."""
    plain = Run(bundle, str(baseline), None, None, False, "cpu", "auto", "auto", DecoderOptions(threads=1), 0, "c0ffee")
    return replace(plain, **changes)


def write_lines(directory: Path, lines: Sequence[Line | bytes]) -> Path:
    """Write a suite of lines, or of bytes as they are, beside cobra-mini's held-out images."""
    directory.mkdir(exist_ok=True)
    if not (directory / "heldout").exists():
        (directory / "heldout").symlink_to(HELDOUT.with_suffix(""))
    texts = [line if isinstance(line, bytes) else msgspec.json.encode(line) for line in lines]
    (directory / "suite.jsonl").write_bytes(b"".join(text + b"\n" for text in texts))
    return directory / "suite.jsonl"
