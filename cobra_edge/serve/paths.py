"""Which route a path means: other spellings of this API's paths are taken, those of other APIs are told where this one's is.

Clients put a base URL and a path together. Base URLs are given without `/v1`, with it twice, or with `/chat/completions`
behind them; what they mean is the same.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

COMPLETIONS = "/v1/chat/completions"
MODELS = "/v1/models"
_SPELLING = re.compile(r"(?:/api)?(?:/v1)*(?:/chat/completions)*(/chat/completions|/models(?:/.+?)?)/?")
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
    """Return the path of the route that a path means: another spelling's, or the path itself."""
    found = _SPELLING.fullmatch(path)
    return path if found is None else f"/v1{found[1]}"


def nothing_here(method: str, path: str) -> str:
    """Return what is said of a path without a route."""
    other = next((name for pattern, name in _OTHER_APIS if re.fullmatch(pattern, path)), None)
    what = "there is nothing here" if other is None else f"{other} is not here"
    return f"{method} {path[:200]}: {what}; {_HERE}"


class CanonicalPathMiddleware:
    """Gives requests the path that they mean. It stands before all checks, which know of no other spellings."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; an ASGI app."""
        if scope["type"] == "http":
            scope["path"] = canonical_path(scope["path"])
        await self._app(scope, receive, send)
