"""One request to a server, timed by the client, and whether its answer is complete."""

from __future__ import annotations

import base64
import io
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import MachineError
from ..formats.package_data import MINI

if TYPE_CHECKING:
    import httpx

NO_RESPONSE = 0  # in place of a status
_IMAGES = sorted((MINI / "heldout").glob("*.png"))
_BITS = 32
PHOTOGRAPH = (1280, 720)  # pixels


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        prompt: the question.
        image: a data URL, or None.
        before: earlier questions and answers of the same conversation.
        stream: whether the answer is streamed.
        max_tokens: of the answer.
    """

    prompt: str
    image: str | None = None
    before: tuple[tuple[str, str], ...] = ()
    stream: bool = True
    max_tokens: int = 8

    def body(self, model: str) -> dict[str, Any]:
        """Return the request's JSON."""
        turns = [(role, text) for pair in self.before for role, text in zip(("user", "assistant"), pair, strict=True)]
        messages: list[dict[str, Any]] = [{"role": r, "content": text} for r, text in (*turns, ("user", self.prompt))]
        if self.image is not None:
            seen = {"type": "image_url", "image_url": {"url": self.image}}
            messages[0]["content"] = [seen, {"type": "text", "text": messages[0]["content"]}]
        body = {"model": model, "messages": messages, "max_tokens": self.max_tokens, "temperature": 0}
        return body | ({"stream": True, "stream_options": {"include_usage": True}} if self.stream else {})


@dataclass
class Reply:
    """One reply.

    Attributes:
        status: HTTP status; NO_RESPONSE without a response.
        latency_ms: from sending the request to the end of the answer.
        ttft_ms: from sending the request to the first text of a streamed answer, or to its end if it has no text.
        server_ttft_ms: the same, as reported by the server.
        text, prompt_tokens, new_tokens: of the answer.
        remembered: what the server took from its prefix cache: "nothing", "image" or "conversation".
        retry_after: seconds to wait before a retry.
        failure: why the reply is incomplete; None if it is complete, refusals included.
        began, ended: on `time.perf_counter`.
    """

    status: int = NO_RESPONSE
    latency_ms: float = 0.0
    ttft_ms: float | None = None
    server_ttft_ms: float | None = None
    text: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    remembered: str = ""
    retry_after: float | None = None
    failure: str | None = None
    began: float = 0.0
    ended: float = 0.0

    @property
    def answered(self) -> bool:
        """Whether it is a complete answer."""
        return self.status == 200 and self.failure is None


def client(url: str, connections: int, *, keep_alive: bool = True) -> httpx.AsyncClient:
    """Return an HTTP client without a timeout. Raises MachineError without httpx."""
    try:
        import httpx
    except ImportError as error:
        raise MachineError("bench serve needs httpx; install it with: pip install httpx") from error
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections if keep_alive else 0)
    # The server is on this machine: proxies of the environment do not apply.
    return httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False)


async def ask(client: httpx.AsyncClient, model: str, question: Question) -> Reply:
    """Send a request and read the reply to its end; errors are recorded in the reply."""
    import httpx

    content = json.dumps(question.body(model)).encode()
    headers = {"Content-Type": "application/json"}
    reply = Reply(began=time.perf_counter())
    try:
        async with client.stream("POST", "/v1/chat/completions", content=content, headers=headers) as response:
            reply.status = response.status_code
            wait = response.headers.get("Retry-After")
            reply.retry_after = float(wait) if wait is not None and wait.isdigit() else None
            if question.stream and reply.status == 200:
                await _read_stream(response, reply)
            else:
                _read_whole(await response.aread(), reply)
    except httpx.TransportError as error:
        reply.failure = f"{type(error).__name__}: {error}"
    except (ValueError, LookupError, TypeError) as error:
        reply.failure = f"the reply is neither an answer nor an error ({type(error).__name__}: {error})"
    reply.ended = time.perf_counter()
    reply.latency_ms = (reply.ended - reply.began) * 1e3
    if question.stream and reply.answered and reply.ttft_ms is None:
        reply.ttft_ms = reply.latency_ms
    return reply


async def _read_stream(response: httpx.Response, reply: Reply) -> None:
    """Read server-sent events to the last."""
    finished = done = False
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            done = True
            continue
        event = json.loads(data)
        if "error" in event:
            reply.failure = f"an error in the stream: {event['error'].get('message')}"
            return
        _note(event, reply)
        for choice in event.get("choices", ()):
            piece = choice.get("delta", {}).get("content")
            if piece and reply.ttft_ms is None:
                reply.ttft_ms = (time.perf_counter() - reply.began) * 1e3
            reply.text += piece or ""
            finished = finished or choice.get("finish_reason") is not None
    if not (finished and done):
        reply.failure = f"a stream without its {'[DONE]' if finished else 'finish_reason'}"


def _read_whole(content: bytes, reply: Reply) -> None:
    """Read an answer or an error that is one JSON object."""
    body = json.loads(content)
    if reply.status != 200:
        reply.text = str(body["error"]["message"])
        return
    _note(body, reply)
    reply.text = body["choices"][0]["message"]["content"] or ""


def _note(event: dict[str, Any], reply: Reply) -> None:
    """Record token counts and the server's own measurements."""
    if usage := event.get("usage"):
        reply.prompt_tokens, reply.new_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if own := event.get("cobra_edge"):
        reply.server_ttft_ms, reply.remembered = own["ttft_ms"], own["remembered"]


def image_url(number: int) -> str:
    """Return an image as a data URL; images of different numbers differ in the lowest bits of their first row.

    Raises:
        ValueError: the number is not below 2**32.
    """
    if not 0 <= number < 1 << _BITS:
        raise ValueError(f"image {number}, expected 0 to 2**{_BITS} - 1")
    with Image.open(_IMAGES[number % len(_IMAGES)]) as opened:
        image = opened.convert("RGB")
    for place in range(_BITS):
        red, green, blue = image.getpixel((place, 0))  # type: ignore[misc]
        image.putpixel((place, 0), (red & ~1 | number >> place & 1, green, blue))
    return _data_url(image, "PNG")


def photograph_url(number: int) -> str:
    """Return a JPEG of a photograph's size as a data URL; files of different numbers differ."""
    with Image.open(_IMAGES[number % len(_IMAGES)]) as opened:
        image = opened.convert("RGB").resize(PHOTOGRAPH)
    return _data_url(image, "JPEG", quality=90, comment=str(number).encode())


def _data_url(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()
