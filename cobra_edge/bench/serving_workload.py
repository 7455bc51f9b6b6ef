"""What clients ask: new images and known ones, conversations that go on, questions without an image; streamed or not."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from .serving_client import Question, Reply, image_url

KINDS = ("new image", "known image", "conversation", "text")
_PROMPTS = (
    "What is in the image?",
    "Describe the image.",
    "How many objects are there?",
    "Is there a red circle?",
    "Is there a green star?",
    "What shape is the blue object?",
)
_TURNS = 4  # after which a conversation begins anew


class Images:
    """New images for all clients together, none twice, and known ones, which are always the same."""

    def __init__(self, known: int) -> None:
        self.known = [image_url(number) for number in range(known)]
        self._next = known

    def new(self) -> str:
        """Return an image that was not returned before."""
        self._next += 1
        return image_url(self._next)


@dataclass
class SimulatedClient:
    """One client's questions, the same for the same seed as long as its answers are.

    Attributes:
        images: all clients'.
        random: its own.
        longest: the largest max_tokens that it asks for.
    """

    images: Images
    random: random.Random
    longest: int = 32
    _image: str | None = None
    _before: list[tuple[str, str]] = field(default_factory=list)

    def next(self) -> Question:
        """Return another question."""
        kind = self.random.choice(KINDS)
        if kind != "conversation" or not self._before or len(self._before) > _TURNS:
            self._before = []
            if kind == "new image":
                self._image = self.images.new()
            else:
                self._image = None if kind == "text" else self.random.choice(self.images.known)
        return Question(
            self.random.choice(_PROMPTS),
            self._image,
            tuple(self._before),
            stream=self.random.random() < 0.5,
            max_tokens=self.random.randint(1, self.longest),
        )

    def record(self, question: Question, reply: Reply) -> None:
        """Remember a whole answer, which the conversation may go on from."""
        if reply.answered:
            self._before = [*question.before, (question.prompt, reply.text)]
