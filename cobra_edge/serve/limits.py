"""How much one client, and all of them together, may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass

# Less would keep a browser from working: it opens six connections to a server, and has several tabs.
MIN_CONNECTIONS = 8
MIN_REQUESTS = 4


@dataclass(frozen=True)
class Limits:
    """Bounds that keep a server alive whatever clients send.

    Attributes:
        body_bytes: of a request; an image in it is a third larger than its file.
        body_values: of a request, as JSON has them; its brackets and commas are counted, which an image has none of.
        bodies_bytes: of all requests that are being received, wait or are answered at the same time. One with an image takes
            three times its size meanwhile: as it came, as text, and as the image's file.
        image_bytes: of an image's file.
        image_pixels: of a decoded image.
        prompt_tokens: read before an answer, the image's included; None for what the model takes.
        new_tokens: of an answer, whatever a client asks for; None for what the model takes.
        default_new_tokens: of an answer whose request says nothing.
        active: answers decoded in turns.
        waiting: further requests that are read or wait for their turn; beyond, clients are told to come again.
        deadline_seconds: from a request's arrival to the end of its answer.
        header_seconds: to send a request's head.
        body_seconds: to send its body.
        decode_seconds: of work to decode an image.
        fetch_seconds: to fetch an image that a request names by its address.
        send_seconds: to take one piece of an answer.
        connections: open at the same time.
        connections_per_address: of one address. A browser opens six.
        requests_per_address: of one address that are inside, of active + waiting; None for three quarters of them.
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
        """How many questions may be inside."""
        return self.active + self.waiting

    @property
    def slots_per_address(self) -> int:
        """How many of them may be one address's: by default what leaves a quarter to others, but enough for one browser."""
        return self.requests_per_address or max(MIN_REQUESTS, self.slots * 3 // 4)

    @property
    def bodies_bytes_per_address(self) -> int:
        """How much of `bodies_bytes` may be one address's: what leaves a quarter to others, but enough for one body."""
        return max(self.body_bytes, self.bodies_bytes * 3 // 4)
