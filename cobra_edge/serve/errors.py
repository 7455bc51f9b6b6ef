"""Error responses in the shape of OpenAI's API.

Source: https://platform.openai.com/docs/guides/error-codes, and the `error` object of its API reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from starlette.responses import JSONResponse

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(eq=False)  # not frozen: Python sets __traceback__
class ApiError(Exception):
    """An error that becomes an HTTP response.

    Attributes:
        status: HTTP status.
        message: what was got, what was expected, what to do.
        code: machine-readable, such as "context_length_exceeded".
        param: the request field at fault, such as "messages".
        headers: of the response, such as Retry-After.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def kind(self) -> str:
        """OpenAI's `type` of the error."""
        return _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def error_response(error: ApiError, extra: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response of an error; `extra` are more headers."""
    return JSONResponse(error.body(), error.status, {**error.headers, **(extra or {})})
