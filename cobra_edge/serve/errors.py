"""What a client is told when it gets no answer, in the shape of OpenAI's errors.

Source: https://platform.openai.com/docs/guides/error-codes, and the `error` object of its API reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from starlette.responses import JSONResponse

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(eq=False)  # not frozen: Python notes the traceback in it
class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        status: of the HTTP response.
        message: what was got, what was expected, what to do.
        code: a word for programs, such as "context_length_exceeded".
        param: the field of the request that is to blame, such as "messages".
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


def refusal_response(refusal: Refusal, extra: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response that tells a client it is refused; `extra` are more headers."""
    return JSONResponse(refusal.body(), refusal.status, {**refusal.headers, **(extra or {})})
