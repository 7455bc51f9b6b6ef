"""The middleware of the server, called as ASGI apps, without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import anyio
import pytest

from cobra_edge.errors import InputError
from cobra_edge.serve.address_policy import client_network, client_of
from cobra_edge.serve.limits import Limits
from cobra_edge.serve.middleware.admission import Admission
from cobra_edge.serve.middleware.body import BodyMiddleware, BodyReader
from cobra_edge.serve.middleware.host import allowed_hosts
from cobra_edge.serve.middleware.stack import with_middleware

LIMITS = Limits(body_bytes=100, body_seconds=0.2)
JSON = ("content-type", "application/json")
LOOPBACK = allowed_hosts("127.0.0.1", [], has_key=False)


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


class Route:
    """An app that notes what reaches it and answers with `headers`."""

    def __init__(self, headers: Iterable[tuple[str, str]] = ()) -> None:
        self.headers = [(n.encode(), v.encode()) for n, v in headers]
        self.seen: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            self.seen.append(b"lifespan")
            return
        self.seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        await send({"type": "http.response.body", "body": b"answered"})


def asked(
    app: Any,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    headers: Iterable[tuple[str, str]] = (JSON,),
    parts: Iterable[bytes] = (b"{}",),
    pause: float = 0.0,
    leaves: bool = False,
    address: str = "192.0.2.1",
) -> Response | None:
    """Send a request whose body comes in parts, with a pause before each; None where no response came."""
    sent: list[dict[str, Any]] = []
    coming = list(parts)

    async def receive() -> dict[str, Any]:
        await anyio.sleep(pause)
        if not coming:
            assert leaves, "more was read than the body has"
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": coming.pop(0), "more_body": bool(coming) or leaves}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in headers]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": raw,
        "query_string": b"",
        "http_version": "1.1",
        "client": (address, 5),
    }
    anyio.run(app, scope, receive, send)
    if not sent:
        return None
    got = {n.decode().lower(): v.decode() for n, v in sent[0]["headers"]}
    return Response(sent[0]["status"], got, b"".join(m["body"] for m in sent[1:]))


def refused(response: Response | None, status: int, code: str) -> str:
    """Check the shape of an error response and return its message."""
    assert response is not None
    assert (response.status, response.error["code"]) == (status, code)
    assert set(response.error) == {"message", "type", "param", "code"}
    assert response.headers["connection"] == "close"
    assert response.headers["content-type"] == "application/json"
    return response.error["message"]


def test_a_body_arrives_whole_however_it_was_cut():
    route = Route()
    response = asked(with_middleware(route, LIMITS), parts=[b'{"a"', b"", b":1", b"}"])
    assert response is not None and (response.status, response.body) == (200, b"answered")
    assert route.seen == [b'{"a":1}']


def test_a_route_receives_the_disconnect_after_the_body():
    messages = []

    async def route(scope: Any, receive: Any, send: Any) -> None:
        messages.extend([await receive(), await receive()])

    left = [{"type": "http.request", "body": b"{}", "more_body": False}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return left.pop(0)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    anyio.run(with_middleware(route, LIMITS), scope, receive, None)
    assert [m["type"] for m in messages] == ["http.request", "http.disconnect"]


def test_a_body_of_exactly_the_limit_is_read():
    route = Route()
    asked(with_middleware(route, LIMITS), headers=[JSON, ("content-length", "100")], parts=[b"x" * 60, b"x" * 40])
    assert route.seen == [b"x" * 100]


def test_a_body_declared_too_large_is_refused_unread():
    route = Route()
    response = asked(with_middleware(route, LIMITS), headers=[JSON, ("content-length", "101")], parts=[b"x" * 101])
    assert "101 bytes, the maximum is 100" in refused(response, 413, "body_too_large")
    assert not route.seen


def test_a_body_that_grows_too_large_is_refused_where_it_does():
    route = Route()
    response = asked(with_middleware(route, LIMITS), parts=[b"x" * 60, b"x" * 41])
    assert "scale the image down" in refused(response, 413, "body_too_large")
    assert not route.seen


def test_a_body_of_too_many_values_is_refused_before_it_is_parsed():
    route = Route()
    body_reader = BodyReader(replace(LIMITS, body_values=4))
    response = asked(BodyMiddleware(route, body_reader), parts=[b'{"a": [1, 2]', b', "b": 3}'])
    assert response is not None and response.status == 200 and len(route.seen) == 1
    for more in (b'{"a": [1, 2], "b": 3, "c": 4}', b'{"a": [1, 2], "b": []}', b'{"a": [1, 2], "b": {}}'):
        assert "more than 4 brackets" in refused(asked(BodyMiddleware(route, body_reader), parts=[more]), 413, "body_too_large")
    assert len(route.seen) == 1 and body_reader.size_bytes == 0


def test_a_body_that_takes_too_long_in_all_is_refused():
    route = Route()
    response = asked(with_middleware(route, LIMITS), parts=[b"x"] * 50, pause=0.05)
    assert "within 0.2 seconds" in refused(response, 408, "body_timeout")
    assert not route.seen


def test_a_disconnect_during_the_body_gets_no_response():
    route = Route()
    assert asked(with_middleware(route, LIMITS), leaves=True) is None
    assert not route.seen


def test_a_body_counts_until_its_request_is_at_its_end():
    inside: list[int] = []

    async def route(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        inside.append(body_reader.size_bytes)
        raise RuntimeError

    body_reader = BodyReader(LIMITS)
    with pytest.raises(RuntimeError):
        asked(BodyMiddleware(route, body_reader), parts=[b"x" * 60])
    assert (inside, body_reader.size_bytes) == ([60], 0)


def test_the_limit_of_all_bodies_counts_only_those_in_progress():
    route = Route()
    app = with_middleware(route, replace(LIMITS, body_bytes=100, bodies_bytes=150))
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", b"application/json")]}

    async def held(left: anyio.Event) -> None:
        async def receive() -> dict[str, Any]:
            if not begun.is_set():
                begun.set()
                return {"type": "http.request", "body": b"x" * 90, "more_body": True}
            await left.wait()
            return {"type": "http.disconnect"}

        begun = anyio.Event()
        await app(scope, receive, None)

    async def second() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"x" * 80, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return sent

    async def both() -> tuple[int, int]:
        left = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(held, left)
            await anyio.wait_all_tasks_blocked()
            while_held = await second()
            left.set()
        assert (b"retry-after", b"1") in while_held[0]["headers"]
        return while_held[0]["status"], (await second())[0]["status"]

    assert anyio.run(both) == (503, 200)


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_is_taken(kind: str):
    response = asked(with_middleware(Route(), LIMITS), headers=[("content-type", kind)])
    assert response is not None and response.status == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp"]
)
def test_simple_cross_origin_posts_are_rejected(kind: str):
    route = Route()
    message = refused(asked(with_middleware(route, LIMITS), headers=[("content-type", kind)]), 415, "unsupported_media_type")
    assert kind in message and not route.seen


def test_a_post_without_a_content_type_is_rejected():
    refused(asked(with_middleware(Route(), LIMITS), headers=[]), 415, "unsupported_media_type")


KEY = "correct-hörse"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/metrics", "/metrics/"])
@pytest.mark.parametrize(
    "shown",
    [
        [],
        ["Bearer wrong"],
        ["Bearer"],
        ["Bearer "],
        [f"Basic {KEY}"],
        [KEY],
        ["Bearer correct-h"],
        [f"Bearer {KEY.encode().decode('latin-1')}x"],
        [f"Bearer {KEY.encode().decode('latin-1')}"] * 2,
    ],
)
def test_without_the_key_nothing_is_answered(path: str, shown: list[str]):
    route = Route()
    headers = [("authorization", s) for s in shown]
    response = asked(with_middleware(route, LIMITS, key=KEY), "GET", path, headers, parts=[])
    message = refused(response, 401, "invalid_api_key")
    assert response is not None and response.headers["www-authenticate"] == "Bearer"
    assert "hörse" not in message and not route.seen
    assert response.error["type"] == "authentication_error"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_key_requests_are_answered(scheme: str):
    shown = f"{scheme} {KEY.encode().decode('latin-1')}"
    response = asked(with_middleware(Route(), LIMITS, key=KEY), headers=[JSON, ("authorization", shown)])
    assert response is not None and response.status == 200


@pytest.mark.parametrize("path", ["/", "/page/script.js", "/healthz", "/readyz", "/openapi.json"])
def test_the_page_and_the_probes_need_no_key(path: str):
    response = asked(with_middleware(Route(), LIMITS, key=KEY), "GET", path, [])
    assert response is not None and response.status == 200


def test_an_empty_key_is_refused_at_the_start():
    with pytest.raises(InputError, match="the API key is empty"):
        with_middleware(Route(), LIMITS, key="")


HOSTS = [
    "localhost",
    "localhost:8000",
    "LOCALHOST.",
    "127.0.0.1",
    "127.0.0.1:1",
    "[::1]",
    "[::1]:8000",
    "10.0.0.7:8000",
    "[fe80::2]",
]


@pytest.mark.parametrize("host", HOSTS)
def test_on_loopback_own_names_and_addresses_are_accepted(host: str):
    response = asked(with_middleware(Route(), LIMITS, hosts=LOOPBACK), headers=[JSON, ("host", host)])
    assert response is not None and response.status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "robot", "1.2.3", ""]
)
def test_on_loopback_other_names_are_rejected(host: str):
    route = Route()
    response = asked(with_middleware(route, LIMITS, hosts=LOOPBACK), headers=[JSON, ("host", host)])
    assert "--allowed-host" in refused(response, 403, "host_not_allowed")
    assert not route.seen


@pytest.mark.parametrize(
    ("bound", "named", "has_key", "expected"),
    [
        ("127.0.0.1", ["Robot.local."], True, {"localhost", "127.0.0.1", "::1", "robot.local"}),
        ("127.0.0.5", [], True, {"localhost", "127.0.0.1", "::1", "127.0.0.5"}),
        ("::1", [], False, {"localhost", "127.0.0.1", "::1"}),
        ("0.0.0.0", [], True, None),
        ("0.0.0.0", [], False, {"localhost", "127.0.0.1", "::1", "0.0.0.0"}),
        ("10.0.0.7", ["robot"], True, {"localhost", "127.0.0.1", "::1", "10.0.0.7", "robot"}),
    ],
)
def test_allowed_hosts_depend_on_the_address(bound: str, named: list[str], has_key: bool, expected: set[str] | None):
    assert allowed_hosts(bound, named, has_key=has_key) == expected


@pytest.mark.parametrize("named", ["http://edge.example/", "*", "*.example", "", "two names", "edge..example"])
def test_an_invalid_host_name_is_rejected_at_startup(named: str):
    with pytest.raises(InputError, match="--allowed-host"):
        allowed_hosts("127.0.0.1", [named], has_key=False)


def test_any_name_is_accepted_without_a_list():
    response = asked(with_middleware(Route(), LIMITS, hosts=None), headers=[JSON, ("host", "evil.example")])
    assert response is not None and response.status == 200


def all_outcomes() -> list[tuple[str, Callable[[], Response | None]]]:
    return [
        ("answered", lambda: asked(with_middleware(Route(), LIMITS))),
        ("413", lambda: asked(with_middleware(Route(), LIMITS), parts=[b"x" * 101])),
        ("415", lambda: asked(with_middleware(Route(), LIMITS), headers=[])),
        ("401", lambda: asked(with_middleware(Route(), LIMITS, key="k"))),
        ("403", lambda: asked(with_middleware(Route(), LIMITS, hosts=LOOPBACK))),
    ]


@pytest.mark.parametrize(("name", "ask"), all_outcomes())
def test_every_response_has_the_security_headers(name: str, ask: Callable[[], Response | None]):
    response = ask()
    assert response is not None
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cross-origin-resource-policy"] == "same-origin"
    assert response.headers["cache-control"] == "no-store"
    assert not [h for h in response.headers if h.startswith("access-control")]


def test_headers_set_by_a_route_are_kept():
    route = Route([("referrer-policy", "origin"), ("cache-control", "max-age=60")])
    response = asked(with_middleware(route, LIMITS), "GET", "/v1/models", [])
    assert response is not None
    assert (response.headers["referrer-policy"], response.headers["cache-control"]) == ("origin", "max-age=60")


def test_the_page_may_be_kept():
    response = asked(with_middleware(Route(), LIMITS), "GET", "/", [])
    assert response is not None and "cache-control" not in response.headers


def test_a_websocket_is_closed_and_a_lifespan_passes():
    route, sent = Route(), []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app = with_middleware(route, LIMITS, key="k")
    anyio.run(app, {"type": "websocket", "path": "/v1/x", "headers": []}, None, send)
    assert sent == [{"type": "websocket.close"}] and not route.seen
    anyio.run(app, {"type": "lifespan"}, None, None)
    assert route.seen == [b"lifespan"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 415),
        ([JSON, ("host", "evil.example")], 403),
        ([JSON], 401),
        ([JSON, ("authorization", "Bearer key")], 429),
    ],
)
def test_the_checks_run_before_admission(headers: list[tuple[str, str]], status: int):
    full = Admission(1)
    full.enter("them")
    given = headers if any(name == "host" for name, _ in headers) else [*headers, ("host", "localhost")]
    key = ("authorization", "Bearer key")
    shown = [*given, key] if status in (415, 403) else given
    response = asked(with_middleware(Route(), LIMITS, key="key", hosts=LOOPBACK, admission=full), headers=shown)
    assert response is not None and response.status == status
    assert response.headers["connection"] == "close" and response.headers["x-content-type-options"] == "nosniff"


def test_slots_are_released_however_a_request_ends():
    admission = Admission(1)
    app = with_middleware(Route(), LIMITS, admission=admission)
    for parts, status in (([b"x" * 101], 413), ([b"x"], 200), ([b"x"], 200)):
        response = asked(app, parts=parts)
        assert response is not None and (response.status, admission.in_use) == (status, 0)
    admission.enter("them")
    probe = asked(app, "GET", "/healthz", [])  # needs no place
    assert probe is not None and probe.status == 200


@pytest.mark.parametrize("path", ["/chat/completions", "/api/v1/chat/completions/", "/v1/v1/chat/completions", "/models"])
def test_other_spellings_of_a_path_pass_the_same_checks(path: str):
    route = Route()
    app = with_middleware(route, LIMITS, key="key")
    refused(asked(app, path=path), 401, "invalid_api_key")
    assert not route.seen
    response = asked(app, path=path, headers=[JSON, ("authorization", "Bearer key")])
    assert response is not None and (response.status, response.headers["cache-control"]) == (200, "no-store")


def test_the_slots_of_one_address_are_limited():
    admission = Admission(3, 2)
    app = with_middleware(Route(), LIMITS, admission=admission)
    entered = [admission.enter("192.0.2.1") for _ in range(2)]
    message = refused(asked(app, address="192.0.2.1"), 429, "queue_full")
    assert "2 requests from your address" in message
    response = asked(app, address="192.0.2.2")
    assert response is not None and response.status == 200
    admission.leave("192.0.2.1", entered[0], answered=False)
    response = asked(app, address="192.0.2.1")
    assert response is not None and (response.status, admission.in_use) == (200, 1)


def test_the_memory_of_one_address_is_limited():
    body_reader = BodyReader(replace(LIMITS, bodies_bytes=400))
    assert body_reader.shares.per_address == 300
    body_reader.shares.take("192.0.2.1", 250)
    message = refused(
        asked(BodyMiddleware(Route(), body_reader), parts=[b"x" * 51], address="192.0.2.1"), 429, "too_many_bodies"
    )
    assert "from your address" in message
    response = asked(BodyMiddleware(Route(), body_reader), parts=[b"x" * 51], address="192.0.2.2")
    assert response is not None and (response.status, body_reader.size_bytes) == (200, 250)


@pytest.mark.parametrize(("active", "waiting", "share"), [(4, 32, 27), (1, 0, 4), (1, 1, 4), (2, 4, 4), (64, 4096, 3120)])
def test_the_share_of_an_address_leaves_a_quarter_to_others_and_suffices_for_a_browser(active: int, waiting: int, share: int):
    assert Limits(active=active, waiting=waiting).slots_per_address == share
    assert Limits(active=active, waiting=waiting, requests_per_address=5).slots_per_address == 5


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::9", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("a-socket", "a-socket"),
    ],
)
def test_the_network_of_a_client(host: str, network: str):
    assert client_network(host) == network
    assert client_of({"client": (host, 1)}) == network and client_of({"client": None}) == client_of({}) == ""
