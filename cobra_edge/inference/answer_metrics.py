"""What is told of an answer that has ended: the same fields wherever a command prints or keeps one."""

from __future__ import annotations

import msgspec

from .session import Answer

CUT = "cut at its limit of tokens"  # what is said of an answer that did not come to its end


class AnswerFigures(msgspec.Struct, frozen=True):
    """An ended answer; what each field means is said at `session.Answer`."""

    text: str
    finish: str
    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    ttft_ms: float | None
    tpot_ms: float | None

    @classmethod
    def of(cls, answer: Answer) -> AnswerFigures:
        """Take them from an answer that was read to its end, or stopped."""
        return cls(
            text=answer.text,
            finish=answer.finish,
            prompt_tokens=answer.prompt_tokens,
            visual_tokens=answer.visual_tokens,
            new_tokens=len(answer.tokens),
            ttft_ms=answer.ttft_ms,
            tpot_ms=answer.tpot_ms,
        )
