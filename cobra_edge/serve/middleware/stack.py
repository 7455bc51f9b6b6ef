"""The middleware stack, the cheapest check first: a slot is taken after the checks, a body is read with a slot."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp

from ..limits import Limits
from ..paths import CanonicalPathMiddleware
from .admission import Admission, AdmissionMiddleware
from .auth import key_check
from .body import BodyMiddleware, BodyReader
from .checks import Check, ChecksMiddleware, json_only
from .host import host_check
from .response_headers import ResponseHeadersMiddleware


def with_middleware(
    app: ASGIApp,
    limits: Limits,
    key: str | None = None,
    hosts: Collection[str] | None = None,
    admission: Admission | None = None,
) -> ASGIApp:
    """Wrap an app in the middleware stack.

    Args:
        app: the routes.
        limits: of bodies.
        key: API key of requests to /v1/ and /metrics; None for none.
        hosts: accepted Host names, from `allowed_hosts`; None for any.
        admission: slots for requests; None for no limit.
    """
    checks: list[Check] = []
    if hosts is not None:
        checks.append(host_check(hosts))
    if key is not None:
        checks.append(key_check(key))
    checks.append(json_only)
    stack: ASGIApp = BodyMiddleware(app, BodyReader(limits))
    if admission is not None:
        stack = AdmissionMiddleware(stack, admission)
    return CanonicalPathMiddleware(ResponseHeadersMiddleware(ChecksMiddleware(stack, checks)))
