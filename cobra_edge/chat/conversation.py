"""A conversation: its image, its turns, and the cached states of recent images."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from ..decode.decoder import DecoderState
from ..decode.sampling import Sampling
from ..inference.answer_metrics import AnswerMetrics
from ..inference.session import Answer, Session
from ..inputs.image import image_bytes, load_image

CACHED_IMAGES = 8  # a state of the 3.5B model takes 26 MB
NOTHING, IMAGE, CONVERSATION = "nothing", "image", "conversation"


@dataclass(frozen=True)
class CurrentImage:
    """Path of the image and hash of its file."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        remembered: the cached prefix: "nothing", "image", or "conversation" (image included).
    """

    question: str
    answer: AnswerMetrics
    remembered: str


class Conversation:
    """Consecutive questions about at most one image; another image begins a new conversation."""

    def __init__(self, session: Session, sampling: Sampling, max_new_tokens: int) -> None:
        """Begin without image and turns."""
        self.session, self.sampling, self.max_new_tokens = session, sampling, max_new_tokens
        self.image: CurrentImage | None = None
        self.turns: list[Turn] = []
        self._last: Answer | None = None
        self._states: OrderedDict[str, DecoderState] = OrderedDict()  # by hash of the image, the least recently used first

    @property
    def reuse(self) -> str:
        """What the next question reuses: "nothing", "image" or "conversation"."""
        if self._last is not None:
            return CONVERSATION
        return NOTHING if self.image is None else IMAGE

    def show(self, file: Path) -> bool:
        """Encode an image and begin a new conversation about it; on an error nothing changes.

        Returns:
            Whether the state of the same content was cached.

        Raises:
            InputError: the image is unreadable, or the model has no vision encoder.
        """
        content = image_bytes(file)
        sha256 = hashlib.sha256(content).hexdigest()
        known = sha256 in self._states
        if not known:
            self._states[sha256] = self.session.look(load_image(content, name=str(file)))
        self._states.move_to_end(sha256)
        if len(self._states) > CACHED_IMAGES:
            self._states.popitem(last=False)
        self.image = CurrentImage(file, sha256)
        self.reset()
        return known

    def reset(self) -> None:
        """Begin a new conversation about the same image."""
        self.turns, self._last = [], None

    def ask(self, question: str) -> Answer:
        """Ask a question; iterate over the answer, then pass it to `keep`.

        Raises:
            InputError: the question is empty or too long; the conversation is unchanged.
        """
        start: Answer | DecoderState | None = self._last
        if start is None and self.image is not None:
            start = self._states[self.image.sha256]
        return self.session.ask(start, question, max_new_tokens=self.max_new_tokens, sampling=self.sampling)

    def keep(self, question: str, answer: Answer) -> Turn:
        """Append a finished or stopped answer to the conversation."""
        turn = Turn(question, AnswerMetrics.of(answer), self.reuse)
        self.turns.append(turn)
        self._last = answer
        return turn
