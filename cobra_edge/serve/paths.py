"""Path normalization: variants of this API's paths are accepted, and 404 messages name the API that a path belongs to.

Clients join a base URL and a path. Users give base URLs without `/v1`, with it twice, or ending in `/chat/completions`; all
mean the same route.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

COMPLETIONS = "/v1/chat/completions"
MODELS = "/v1/models"
_VARIANTS = re.compile(r"(?:/api)?(?:/v1)*(?:/chat/completions)*(/chat/completions|/models(?:/.+?)?)/?")
_OTHER_APIS = (
    (r"(/v1)*/responses(/.*)?", "OpenAI's Responses API"),
    (r"(/v1)*/completions?", "text completion without a conversation"),
    (r"(/v1)*/messages(/.*)?", "Anthropic's Messages API"),
    (r"(/v1)*/embeddings?", "an API for embeddings"),
    (r"/api/.*", "Ollama's API"),
    (r"/generate(_stream)?", "the API of Text Generation Inference"),
)
_HERE = (
    f'this server has POST {COMPLETIONS}, with "model" and "messages", and GET {MODELS}; give OpenAI\'s clients a base URL '
    "that ends in /v1"
)


def canonical_path(path: str) -> str:
    """Return the path of the route that a path means, or the path itself."""
    found = _VARIANTS.fullmatch(path)
    return path if found is None else f"/v1{found[1]}"


def not_found_message(method: str, path: str) -> str:
    """Return the message for a path without a route."""
    other = next((name for pattern, name in _OTHER_APIS if re.fullmatch(pattern, path)), None)
    what = "no such path" if other is None else f"{other} is not supported"
    return f"{method} {path[:200]}: {what}; {_HERE}"


class CanonicalPathMiddleware:
    """ASGI middleware that normalizes the path, before the checks that depend on it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            scope["path"] = canonical_path(scope["path"])
        await self._app(scope, receive, send)
