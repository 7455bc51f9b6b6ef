"""The web page of the server: static files without external resources.

Its Content-Security-Policy allows only its own scripts and styles, and connections to this server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request, Response

_FILES = Path(__file__).parent / "page"
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Cache-Control": "no-cache",  # cached but revalidated: an updated server has an updated page
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_paths() -> dict[str, Path]:
    """Return the file of each path: "/", "/page/style.css", "/page/script.js" and the modules it imports."""
    files = sorted(file for file in _FILES.iterdir() if file.suffix in _TYPES)
    return {"/" if file.name == "index.html" else f"/page/{file.name}": file for file in files}


def page_router() -> APIRouter:
    """Return the routes of the page (GET and HEAD), which are not in the OpenAPI document."""
    router = APIRouter(include_in_schema=False)
    for path, file in page_paths().items():
        router.add_api_route(path, _endpoint(file), methods=["GET", "HEAD"], response_class=Response)
    return router


def _endpoint(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content, media_type = file.read_bytes(), _TYPES[file.suffix]
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = PAGE_HEADERS | {"ETag": tag}

    async def serve(request: Request) -> Response:
        known = {given.strip().removeprefix("W/") for given in request.headers.get("If-None-Match", "").split(",")}
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return serve
