"""The server holds to its own description, /openapi.json, whatever it is sent."""

from collections import Counter

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from schemathesis.generation import GenerationMode

from cobra_edge.serve.schemas import UNSUPPORTED

from .serve_case import MODEL, served

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
OPERATIONS = [
    "POST /v1/chat/completions",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
]
EXAMPLES = 40
QUESTION = {"role": "user", "content": "What is it?"}
seen: Counter[tuple[str, int, str]] = Counter()


@pytest.fixture(scope="module")
def url(mini_bundle):
    with served(mini_bundle("w4a16-g128")) as server:
        yield server.url


@pytest.fixture(scope="module")
def described(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


BOUNDED = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def exchange(case):
    response = case.call_and_validate(checks=CHECKS, timeout=60)
    kind = response.headers["content-type"][0].partition(";")[0]
    seen[case.operation.label, response.status_code, kind] += 1


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_may_be_sent_is_answered_as_described(described, operation):
    method, path = operation.split()

    @given(described[path][method].as_strategy())
    @settings(BOUNDED, max_examples=EXAMPLES)
    def each(case):
        exchange(case)
        # Nearly all of what is generated asks another model, or nothing, and ends there. So it is mended, and sent again.
        if path.endswith("{name}"):
            case.path_parameters["name"] = MODEL
            exchange(case)
        if method == "POST":
            case.body |= {"model": MODEL, "max_tokens": 2, "max_completion_tokens": None}
            exchange(case)
            known = {name: value for name, value in case.body.items() if name not in UNSUPPORTED}
            for stream in (False, True):
                case.body = known | {"messages": [QUESTION], "stream": stream, "stream_options": None}
                exchange(case)

    each()


def test_what_may_not_be_sent_is_refused_as_described(described):
    operation = described["/v1/chat/completions"]["POST"]

    @given(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    @settings(BOUNDED, max_examples=EXAMPLES)
    def each(case):
        exchange(case)

    each()


def body(more: str = "", content: str = '"What is it?"') -> str:
    return f'{{"model": "{MODEL}", "max_tokens": 2, "messages": [{{"role": "user", "content": {content}}}]{more}}}'


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"null",
        b"[]",
        b"\xff",
        body()[:-1],
        body(', "temperature": NaN'),
        body(', "temperature": Infinity'),
        body(', "temperature": 1e999'),
        body(', "top_p": NaN'),
        body(', "seed": ' + "9" * 5000),  # more digits than Python reads
        body(', "x": ' + "[" * 100_000 + "]" * 100_000),
        "[" * 100_000,
        body(content=r'"\ud800"'),  # halves of characters
        body(', "stop": "\\udfff"'),
        body(', "user": "\\udfff"'),
        body(', "model": "\\udfff"'),
        body(', "\\udfff": 1'),
        body(', "tools": ["\\udfff"]'),
        body(content=r'[{"type": "image_url", "image_url": {"url": "\ud800"}}]'),
        body(content=r'[{"type": "\ud800"}]'),
    ],
    ids=range(20),
)
def test_bodies_that_no_schema_thinks_of_are_refused(url, sent):
    response = httpx.post(f"{url}/v1/chat/completions", content=sent, headers={"Content-Type": "application/json"}, timeout=60)
    error = response.json()["error"]
    assert response.status_code == 400 and set(error) == {"message", "type", "param", "code"} and error["message"]


def test_all_that_is_described_was_asked_and_answered():
    assert {operation for operation, status, _ in seen if status == 200} == set(OPERATIONS)
    answers = (200, "application/json"), (200, "text/event-stream"), (400, "application/json"), (404, "application/json")
    assert all(seen[("POST /v1/chat/completions", *answer)] for answer in answers)
