"""Limits of a server, for one client and for all clients together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Which of several images a conversation is about: the newest; all, on a contact sheet; or none, and the request is refused.
ImagePolicy = Literal["newest", "grid", "one"]
IMAGE_POLICIES: tuple[ImagePolicy, ...] = ("newest", "grid", "one")
# A browser opens six connections to a server, and may have several tabs.
MIN_CONNECTIONS = 8
MIN_REQUESTS = 4


@dataclass(frozen=True)
class Limits:
    """Limits that keep a server alive whatever clients send.

    Attributes:
        body_bytes: size of a request's body; base64 makes an image a third larger than its file.
        body_values: JSON values in a body, counted as brackets and commas; a base64 image has none.
        bodies_bytes: size of the bodies of all requests that are received, queued or running. One with an image takes three
            times its size: the body, its text, and the image file.
        image_bytes: size of an image file.
        image_pixels: pixels of a decoded image.
        prompt_tokens: length of a prompt, visual tokens included; None for the model's limit.
        new_tokens: length of an answer, whatever a client asks for; None for the model's limit.
        default_new_tokens: length of an answer by default.
        active: answers decoded concurrently, in time slices.
        waiting: further requests, which are read or queued; requests beyond capacity get 429.
        deadline_seconds: from a request's arrival to the end of its answer.
        header_seconds: to receive a request's head.
        body_seconds: to receive a request's body.
        decode_seconds: CPU time to decode an image.
        fetch_seconds: to fetch an image from its URL.
        send_seconds: to send one chunk of an answer.
        connections: open connections.
        connections_per_address: open connections of one address. A browser opens six.
        requests_per_address: running or queued requests of one address; None for three quarters of active + waiting.
    """

    body_bytes: int = 16 << 20
    body_values: int = 1 << 18
    bodies_bytes: int = 256 << 20
    image_bytes: int = 10 << 20
    image_pixels: int = 32_000_000
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    default_new_tokens: int = 256
    active: int = 4
    waiting: int = 32
    deadline_seconds: float = 300.0
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    decode_seconds: float = 20.0
    fetch_seconds: float = 15.0
    send_seconds: float = 30.0
    connections: int = 256
    connections_per_address: int = 64
    requests_per_address: int | None = None

    @property
    def slots(self) -> int:
        """Requests that may run or wait."""
        return self.active + self.waiting

    @property
    def slots_per_address(self) -> int:
        """Requests of one address: by default a quarter is left to others, but one browser has enough."""
        return self.requests_per_address or max(MIN_REQUESTS, self.slots * 3 // 4)

    @property
    def bodies_bytes_per_address(self) -> int:
        """Share of `bodies_bytes` of one address: a quarter is left to others, but one body fits."""
        return max(self.body_bytes, self.bodies_bytes * 3 // 4)
