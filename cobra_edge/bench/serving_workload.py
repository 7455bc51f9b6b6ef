"""The workload of simulated clients: new and known images, conversations, questions without an image; streamed or not."""

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
_TURNS = 4  # after which a new conversation starts


class Images:
    """Images shared by all clients: known ones, and new ones, which are never repeated."""

    def __init__(self, known: int) -> None:
        self.known = [image_url(number) for number in range(known)]
        self._next = known

    def new(self) -> str:
        """Return an image that was not used before."""
        self._next += 1
        return image_url(self._next)


@dataclass
class SimulatedClient:
    """The requests of one client; deterministic for a seed, as long as the answers are.

    Attributes:
        images: shared by all clients.
        random: its own.
        longest: the largest max_tokens of a request.
    """

    images: Images
    random: random.Random
    longest: int = 32
    _image: str | None = None
    _before: list[tuple[str, str]] = field(default_factory=list)

    def next(self) -> Question:
        """Return the next request."""
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
        """Add a complete answer to the conversation."""
        if reply.answered:
            self._before = [*question.before, (question.prompt, reply.text)]
