"""From the messages of a request to the decoder's input: an image and segments of tokens.

Prompts are always split at the same places, so that a cached state and a fresh one have the same bits. An answer is a segment
of its own, tokenized as the model was trained on answers (`given_answer`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..inputs.contact_sheet import MOST_IMAGES
from ..inputs.text import PromptTemplate, TextCodec, given_answer
from .errors import ApiError
from .limits import ImagePolicy
from .schemas import AssistantMessage, ImagePart, Message, SystemMessage, ToolMessage, UserMessage

Segment = tuple[int, ...]


@dataclass(frozen=True)
class Conversation:
    """The conversation of a request, before its image is fetched.

    Attributes:
        image_urls: URLs of the images that it is about, each once: none, one, or those of a contact sheet.
        segments: tokens of the turns: question, answer, end token and question, answer, ...; the last is a question.
        dropped_images: other images, which are not looked at.
    """

    image_urls: tuple[str, ...]
    segments: tuple[Segment, ...]
    dropped_images: int = 0


def read_conversation(
    messages: Sequence[Message],
    template: PromptTemplate,
    codec: TextCodec,
    max_characters: int,
    policy: ImagePolicy = "newest",
) -> Conversation:
    """Convert messages to a conversation. Longer texts are rejected before tokenization, which takes minutes for megabytes.

    System messages are put before the first question: the model was trained without them. Consecutive messages of one role are
    one turn; what a tool returned is the user's. The image may be in any question; the model reads it before all text.

    Raises:
        ApiError: too much text, no question, an empty one, or more images than the policy takes.
    """
    characters = characters_of(messages)
    if characters > max_characters:
        message = f"the conversation has {characters:,} characters, the maximum is {max_characters:,}; shorten it"
        raise ApiError(400, message, "context_length_exceeded", "messages")
    system = [_text(m) for m in messages if isinstance(m, SystemMessage)]
    turns = _turns([m for m in messages if not isinstance(m, SystemMessage)])
    if len(turns) % 2 == 0:
        where = "is empty" if not turns else "ends with an answer"
        raise ApiError(400, f"the conversation {where}; its last message must be the user's", "invalid_value", "messages")
    segments: list[Segment] = []
    for index, text in enumerate(turns):
        if index % 2:
            segments.append(tuple(codec.encode(given_answer(text))))
            continue
        question = "\n".join([*system, text]) if not index else text
        try:
            prompt = template.later_turn(question) if index else template.first_turn(question)
        except InputError as error:
            raise ApiError(
                400, f"messages: question {index // 2 + 1} is empty; ask something", "invalid_value", "messages"
            ) from error
        segments.append((*((codec.end_id,) if index else ()), *codec.encode(prompt)))
    urls, dropped = _images(messages, policy)
    return Conversation(urls, tuple(p for p in segments if p), dropped)


def characters_of(messages: Sequence[Message]) -> int:
    """Return the number of characters of all texts."""
    return sum(len(_text(message)) for message in messages)


def _text(message: Message) -> str:
    content = message.content or ""
    if isinstance(message, AssistantMessage) and message.tool_calls:
        return "\n".join(call.function.arguments for call in message.tool_calls)
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content if not isinstance(part, ImagePart))


def _turns(messages: Sequence[UserMessage | AssistantMessage | ToolMessage]) -> list[str]:
    """Return the texts of question, answer, question, ...; consecutive messages of one role are joined."""
    turns: list[str] = []
    role: str | None = None
    for message in messages:
        speaker = "assistant" if message.role == "assistant" else "user"
        if speaker == role:
            turns[-1] += "\n" + _text(message)
            continue
        if role is None and speaker == "assistant":
            raise ApiError(400, "the first message is an answer; begin with the user's", "invalid_value", "messages")
        role = speaker
        turns.append(_text(message))
    return turns


def _images(messages: Sequence[Message], policy: ImagePolicy) -> tuple[tuple[str, ...], int]:
    """Return the URLs of the images to look at, and the number of different ones that are dropped."""
    parts = (part for m in messages if isinstance(m, UserMessage) and not isinstance(m.content, str) for part in m.content)
    found = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    urls = tuple(dict.fromkeys(found))
    most = {"newest": len(urls), "grid": MOST_IMAGES, "one": 1}[policy]
    if len(urls) > most:
        expected = f"at most {most}" if policy == "grid" else "one: the model reads it before all text"
        raise ApiError(
            400,
            f"the conversation has {len(urls)} different images, expected {expected}; ask about each in its own conversation",
            "too_many_images",
            "messages",
        )
    return (tuple(found[-1:]), len(urls) - 1) if policy == "newest" and urls else (urls, 0)


def prefix_keys(image_digest: bytes | None, segments: Sequence[Segment]) -> Iterator[bytes]:
    """Yield the cache keys of all prefixes, the shortest first: after the image (or nothing), after each segment.

    Args:
        image_digest: SHA-256 of the image file; None for no image.
        segments: tokens of each.
    """
    key = hashlib.sha256(b"nothing" if image_digest is None else b"image" + image_digest).digest()
    yield key
    for segment in segments:
        key = longer_key(key, segment)
        yield key


def longer_key(key: bytes, segment: Sequence[int]) -> bytes:
    """Return the cache key of a prefix with one more segment."""
    return hashlib.sha256(key + np.array([len(segment), *segment], "<i4").tobytes()).digest()
