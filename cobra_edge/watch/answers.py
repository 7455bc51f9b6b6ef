"""Answers about the newest frames, with latencies."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec

from ..errors import InputError
from ..frames.source import Frame, Newest
from ..frames.unreadable import Unreadable, UnreadableImages
from ..inference.session import Session


class FrameAnswer(msgspec.Struct, frozen=True):
    """The answer about one frame.

    Attributes:
        frame: frame number.
        name: file name, or None.
        answer: the text.
        finish: "end" at the model's end token, "length" at the limit.
        first_token_ms, answer_ms: from the frame's capture to the answer's first token (None for no token) and to its end.
        dropped: frames dropped since the last answered one.
    """

    frame: int
    name: str | None
    answer: str
    finish: str
    first_token_ms: float | None
    answer_ms: float
    dropped: int


def frame_answers(
    session: Session, prompt: str, newest: Newest[Frame], max_new_tokens: int, unreadable: UnreadableImages
) -> Iterator[FrameAnswer]:
    """Yield the answer to the prompt about the newest frame, until the source ends.

    No frame or state is kept after its answer. An unreadable image goes to `unreadable` and counts as dropped.

    Raises:
        InputError: the prompt is empty or too long.
        MachineError: the source is lost, or not enough memory.
    """
    last = 0
    while (frame := newest.take()) is not None:
        number, name, captured = frame.number, frame.name, frame.captured
        try:
            state = session.look(frame.image())
        except InputError as error:
            unreadable.add(Unreadable(number, name, str(error)))
            continue
        finally:
            del frame  # memory holds one frame beside the model
        asked = time.perf_counter()
        answer = session.ask(state, prompt, max_new_tokens=max_new_tokens)
        text = answer.read()
        done = time.perf_counter()
        first_ms = None if answer.ttft_ms is None else (asked - captured) * 1e3 + answer.ttft_ms
        yield FrameAnswer(number, name, text, answer.finish, first_ms, (done - captured) * 1e3, number - last - 1)
        last = number
        del state, answer
