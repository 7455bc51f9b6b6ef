"""A conversation: the image it is about, what was said, and the images that are remembered."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from ..decode.decoder import DecoderState
from ..decode.sampling import Sampling
from ..inference.answer_metrics import AnswerFigures
from ..inference.session import Answer, Session
from ..inputs.image import image_bytes, load_image

REMEMBERED_IMAGES = 8  # a state of the 3.5B takes 26 MB
NOTHING, IMAGE, CONVERSATION = "nothing", "image", "conversation"


@dataclass(frozen=True)
class ShownImage:
    """An image by the path it was given by, and the hash of its file's content."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Turn:
    """A question and the answer it got.

    Attributes:
        remembered: what had not to be read again for it: "nothing", "image", or "conversation", with its image.
    """

    question: str
    answer: AnswerFigures
    remembered: str


class Conversation:
    """Questions that follow each other, about at most one image; another image begins another conversation."""

    def __init__(self, session: Session, sampling: Sampling, max_new_tokens: int) -> None:
        """Begin with nothing seen and nothing said."""
        self.session, self.sampling, self.max_new_tokens = session, sampling, max_new_tokens
        self.image: ShownImage | None = None
        self.turns: list[Turn] = []
        self._last: Answer | None = None
        self._states: OrderedDict[str, DecoderState] = OrderedDict()  # by hash of the image, least recently shown first

    @property
    def remembers(self) -> str:
        """What the next question goes on from."""
        if self._last is not None:
            return CONVERSATION
        return NOTHING if self.image is None else IMAGE

    def show(self, file: Path) -> bool:
        """Look at an image and begin anew with it; where it cannot be looked at all stays as it was.

        Returns:
            Whether it was remembered: the same content was looked at before, and was not forgotten for others since.

        Raises:
            InputError: the image is unreadable, or the model has no eyes.
        """
        content = image_bytes(file)
        sha256 = hashlib.sha256(content).hexdigest()
        known = sha256 in self._states
        if not known:
            self._states[sha256] = self.session.look(load_image(content, name=str(file)))
        self._states.move_to_end(sha256)
        if len(self._states) > REMEMBERED_IMAGES:
            self._states.popitem(last=False)
        self.image = ShownImage(file, sha256)
        self.reset()
        return known

    def reset(self) -> None:
        """Forget what was said; the image stays."""
        self.turns, self._last = [], None

    def ask(self, question: str) -> Answer:
        """Read a question, and return its answer to be iterated over and then given to `keep`.

        Raises:
            InputError: it is empty, or longer than what the model still takes; the conversation stays as it was.
        """
        start: Answer | DecoderState | None = self._last
        if start is None and self.image is not None:
            start = self._states[self.image.sha256]
        return self.session.ask(start, question, max_new_tokens=self.max_new_tokens, sampling=self.sampling)

    def keep(self, question: str, answer: Answer) -> Turn:
        """Take an answer that has ended, or was stopped, into the conversation."""
        turn = Turn(question, AnswerFigures.of(answer), self.remembers)
        self.turns.append(turn)
        self._last = answer
        return turn
