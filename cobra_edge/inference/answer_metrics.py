"""Text and metrics of a finished answer, as the commands print them."""

from __future__ import annotations

import msgspec

from .session import Answer

CUT = "cut at the token limit"  # for answers that did not reach the end token


class AnswerMetrics(msgspec.Struct, frozen=True):
    """A finished answer; for the fields see `session.Answer`."""

    text: str
    finish: str
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    ttft_ms: float | None
    tpot_ms: float | None

    @classmethod
    def of(cls, answer: Answer) -> AnswerMetrics:
        """Return those of an answer that has ended or was stopped."""
        return cls(
            text=answer.text,
            finish=answer.finish,
            prompt_tokens=answer.prompt_tokens,
            visual_tokens=answer.visual_tokens,
            new_tokens=len(answer.tokens),
            ttft_ms=answer.ttft_ms,
            tpot_ms=answer.tpot_ms,
        )
