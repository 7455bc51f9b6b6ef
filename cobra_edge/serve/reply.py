"""The response to a request: whole, or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..inference.logprobs import Logprob, TokenLogprobs
from ..inputs.text import TextCodec
from .answer_form import AnswerForm
from .generation import Finished
from .schemas import (
    AnswerCall,
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    Delta,
    Figures,
    FinishReason,
    Logprobs,
    PromptDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)


@dataclass(frozen=True)
class Reply:
    """The fields that all parts of one response have in common, and how its text is read.

    Attributes:
        model, fingerprint: of the model.
        include_usage: whether a stream ends with the usage.
        form: of the text.
        codec: of the model, for the texts of log-probabilities; None where none were asked for.
        dropped_images: of the request, that were not looked at.
        id, created: of the response.
    """

    model: str
    fingerprint: str
    include_usage: bool
    form: AnswerForm = field(default_factory=AnswerForm)
    codec: TextCodec | None = None
    dropped_images: int = 0
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _parts(self) -> dict[str, Any]:
        return {"id": self.id, "created": self.created, "model": self.model, "system_fingerprint": self.fingerprint}

    def whole(self, text: str, end: Finished) -> ChatCompletion:
        """Return a complete answer."""
        call = self._call(text)
        content = text if call is None else None
        message = AnswerMessage(content=content, tool_calls=None if call is None else [call])
        choice = Choice(message=message, logprobs=self._logprobs(end), finish_reason=self._reason(end, call))
        return ChatCompletion(**self._parts(), choices=[choice], usage=_usage(end), cobra_edge=self._figures(end))

    def chunk(self, delta: Delta) -> ChatChunk:
        """Return an event with a piece of the answer."""
        return ChatChunk(**self._parts(), choices=[ChunkChoice(delta=delta)])

    def pieces(self, text: str) -> Iterator[ChatChunk]:
        """Yield the events of a piece of text; of a call there are none before it is complete."""
        if not self.form.tools:
            yield self.chunk(Delta(content=text))

    def ending(self, text: str, end: Finished) -> Iterator[ChatChunk]:
        """Yield the last events of an answer; `text` is all of it."""
        call = self._call(text, index=0)
        if self.form.tools:
            yield self.chunk(Delta(content=text) if call is None else Delta(tool_calls=[call]))
        choice = ChunkChoice(delta=Delta(), logprobs=self._logprobs(end), finish_reason=self._reason(end, call))
        yield ChatChunk(**self._parts(), choices=[choice], cobra_edge=self._figures(end))
        if self.include_usage:
            yield ChatChunk(**self._parts(), choices=[], usage=_usage(end))

    def _call(self, text: str, index: Literal[0] | None = None) -> AnswerCall | None:
        called = self.form.call(text) if self.form.tools else None
        if called is None:
            return None
        name, arguments = called
        return AnswerCall(
            index=index, id=f"call_{self.id.removeprefix('chatcmpl-')}", function={"name": name, "arguments": arguments}
        )

    def _reason(self, end: Finished, call: AnswerCall | None) -> FinishReason:
        return end.reason if call is None else "tool_calls"

    def _logprobs(self, end: Finished) -> Logprobs | None:
        if self.codec is None:
            return None
        return Logprobs(content=[_token_logprob(self.codec, token) for token in end.logprobs])

    def _figures(self, end: Finished) -> Figures:
        return Figures(
            remembered=end.remembered,
            queue_ms=end.queue_ms,
            ttft_ms=end.ttft_ms,
            tpot_ms=end.tpot_ms,
            dropped_images=self.dropped_images,
        )


def _token_logprob(codec: TextCodec, found: TokenLogprobs) -> TokenLogprob:
    return TokenLogprob(**_told(codec, found.chosen), top_logprobs=_top(codec, found.top))


def _top(codec: TextCodec, found: Sequence[Logprob]) -> list[TopLogprob]:
    return [TopLogprob(**_told(codec, logprob)) for logprob in found]


def _told(codec: TextCodec, logprob: Logprob) -> dict[str, Any]:
    text = codec.decode([logprob.token])
    whole = "\ufffd" not in text  # else a part of a character, whose bytes the codec does not tell
    # JSON has no infinity: OpenAI's API has this number for what is all but impossible.
    return {"token": text, "logprob": max(logprob.logprob, -9999.0), "bytes": list(text.encode()) if whole else None}


def _usage(end: Finished) -> Usage:
    return Usage(
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.completion_tokens,
        total_tokens=end.prompt_tokens + end.completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=end.cached_tokens, image_tokens=end.image_tokens),
    )
