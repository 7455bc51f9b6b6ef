"""API key: bearer authentication of requests to the API and the metrics."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import Scope

from ...errors import InputError
from ..errors import ApiError
from .checks import Check


def key_check(key: str) -> Check:
    """Return the check that requests to /v1/ and /metrics carry the API key; the comparison takes constant time.

    Raises:
        InputError: the key is empty.
    """
    if not key:
        raise InputError("the API key is empty; give one, or leave the option out")
    expected = key.encode()

    def check(scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        if not (path.startswith("/v1/") or path.startswith("/metrics")):
            return
        given = headers.getlist("authorization")
        kind, _, got = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        # Starlette decodes headers as latin-1
        if kind.lower() != "bearer" or not hmac.compare_digest(got.strip().encode("latin-1"), expected):
            what = "wrong API key" if given else "no API key"
            message = f"{what}; send the header `Authorization: Bearer KEY` with the key that the server was started with"
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    return check
