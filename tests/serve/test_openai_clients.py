"""The server as OpenAI's own client knows one: answers are the session's, errors the client's exceptions."""

import asyncio
import base64
import io
import json
import socket
from typing import get_args, get_type_hints
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from openai.types.chat.chat_completion_content_part_image_param import ImageURL
from PIL import Image
from pydantic import ValidationError

import cobra_edge
from cobra_edge.decode.sampling import Sampling
from cobra_edge.serve.schemas import ChatRequest

from .serve_case import IMAGE, MODEL, client, data_uri, image_part, question, served

QUESTIONS = ["What is in the image?", "How many objects are there?", "Is there a red circle?"]
KEY = "a-key-of-this-test"


@pytest.fixture(scope="module")
def url(mini_bundle):
    with served(mini_bundle("w4a16-g128")) as server:
        yield server.url


@pytest.fixture(scope="module")
def session(mini_bundle):
    return cobra_edge.load(mini_bundle("w4a16-g128"))


@pytest.fixture(scope="module")
def ai(url):
    with client(url) as ai:
        yield ai


@pytest.fixture(scope="module")
def url_with_key(mini_bundle, tmp_path_factory):
    """Return the URL of a server that wants a key, and has room for one question at a time."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(f"{KEY}\n")
    with served(mini_bundle("w4a16-g128"), "--api-key-file", str(key), "--active", "1", "--waiting", "0") as server:
        yield server.url


def image_of(color):
    """Return the file of an image that no other test asks about."""
    file = io.BytesIO()
    Image.new("RGB", (112, 112), color).save(file, "PNG")
    return file.getvalue()


def ask(ai, *messages, **options):
    return ai.chat.completions.create(model=MODEL, messages=list(messages), **options)


def streamed(ai, *messages, **options):
    """Return the text of a streamed answer, and its chunks."""
    chunks = list(ask(ai, *messages, stream=True, **options))
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices), chunks


def expected(session, text, image=IMAGE, **options):
    answer = session.ask(image, text, **options)
    answer.read()
    return answer


@pytest.mark.parametrize("text", QUESTIONS)
def test_an_answer_is_the_sessions(ai, session, text):
    same = expected(session, text)
    got = ask(ai, question(text, image_part()))
    choice = got.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (same.text, "assistant", "stop")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (64 + same.prompt_tokens, len(same.tokens))
    assert got.usage.total_tokens == 64 + same.prompt_tokens + len(same.tokens)
    assert (got.object, got.model, len(got.choices)) == ("chat.completion", MODEL, 1)


def test_a_text_without_an_image(ai, session):
    same = expected(session, "Hello, who are you?", None)
    got = ask(ai, {"role": "user", "content": "Hello, who are you?"})
    assert got.choices[0].message.content == same.text
    assert (got.usage.prompt_tokens, got.usage.prompt_tokens_details.model_dump()["image_tokens"]) == (same.prompt_tokens, 0)


def test_a_stream_is_the_answer_in_pieces(ai, session):
    same = expected(session, QUESTIONS[0])
    text, chunks = streamed(ai, question(QUESTIONS[0], image_part()))
    assert text == same.text and len(chunks) >= 3  # pieces that were there together came as one
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, MODEL, chunks[0].system_fingerprint)
    }
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].model_extra["cobra_edge"]["ttft_ms"] > 0


def test_a_streams_usage_comes_last_where_it_is_wanted(ai):
    whole = ask(ai, question(QUESTIONS[1], image_part()))
    _, chunks = streamed(ai, question(QUESTIONS[1], image_part()), stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
        whole.usage.total_tokens,
    )
    assert usage.prompt_tokens_details.cached_tokens >= 64


def test_the_end_of_a_stream_is_said(url):
    body = {"model": MODEL, "messages": [question(QUESTIONS[1], image_part())], "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        events = response.read().decode().split("\n\n")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""] and all(json.loads(e.removeprefix("data: ")) for e in events[:-2])


@pytest.mark.parametrize("stop", ["square", "a small", " at the", ["nowhere", "cross", "star"], "A", "ge green sq"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string(ai, session, stop, stream):
    text = expected(session, QUESTIONS[0]).text
    shown = text[: min(at for s in ([stop] if isinstance(stop, str) else stop) if (at := text.find(s)) >= 0)]
    assert shown != text
    if stream:
        got, chunks = streamed(ai, question(QUESTIONS[0], image_part()), stop=stop)
        reason = chunks[-1].choices[0].finish_reason
    else:
        whole = ask(ai, question(QUESTIONS[0], image_part()), stop=stop)
        got, reason = whole.choices[0].message.content, whole.choices[0].finish_reason
    assert (got, reason) == (shown, "stop")


def test_a_stop_string_that_never_comes_changes_nothing(ai, session):
    got = ask(ai, question(QUESTIONS[0], image_part()), stop=["unicorn", "right.."])
    assert got.choices[0].message.content == expected(session, QUESTIONS[0]).text


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_at_its_limit(ai, session, limit, stream):
    same = expected(session, QUESTIONS[0], max_new_tokens=5)
    if stream:
        text, chunks = streamed(ai, question(QUESTIONS[0], image_part()), **{limit: 5})
        assert (text, chunks[-1].choices[0].finish_reason) == (same.text, "length")
    else:
        got = ask(ai, question(QUESTIONS[0], image_part()), **{limit: 5})
        assert (got.choices[0].message.content, got.choices[0].finish_reason) == (same.text, "length")
        assert got.usage.completion_tokens == 5


def test_a_seed_gives_the_same_answer_again(ai, session):
    def said(seed, **options):
        given = {"temperature": 2.0, "max_tokens": 24} | options
        return ask(ai, question(QUESTIONS[0], image_part()), seed=seed, **given).choices[0].message.content

    texts = [said(seed) for seed in range(4)]
    assert [said(seed) for seed in range(4)] == texts and len(set(texts)) > 1
    same = [expected(session, QUESTIONS[0], max_new_tokens=24, sampling=Sampling(2.0, 0, 1.0, seed)) for seed in range(4)]
    assert texts == [answer.text for answer in same]
    narrow = Sampling(1.5, 3, 0.9, 7)
    same = expected(session, QUESTIONS[0], max_new_tokens=24, sampling=narrow)
    assert said(7, temperature=1.5, top_p=0.9, extra_body={"top_k": 3}) == same.text
    greedy = expected(session, QUESTIONS[0], max_new_tokens=24).text
    assert {said(seed, temperature=0) for seed in range(3)} == {greedy}


def test_without_a_seed_answers_differ(ai):
    asked = question(QUESTIONS[0], image_part())
    texts = {ask(ai, asked, temperature=2.0, max_tokens=24).choices[0].message.content for _ in range(6)}
    assert len(texts) > 1


def test_the_models_are_one(ai):
    (model,) = ai.models.list().data
    assert (model.id, model.object) == (MODEL, "model") and ai.models.retrieve(MODEL) == model


def test_a_conversation_goes_on_from_what_was_read(ai, session):
    image = image_of("teal")
    messages, before, read = [], image, 0
    for turn, text in enumerate(QUESTIONS):
        messages.append(question(text, *([image_part(data_uri(image))] if not turn else [])))
        answer = before = expected(session, text, before)
        got = ask(ai, *messages)
        assert got.choices[0].message.content == answer.text
        # After the first turn only the new question was read, with the end token before it.
        assert got.usage.prompt_tokens_details.cached_tokens == read
        read = got.usage.total_tokens
        assert got.model_extra["cobra_edge"]["remembered"] == ("conversation" if turn else "nothing")
        messages.append({"role": "assistant", "content": got.choices[0].message.content})


def test_an_image_is_looked_at_once_and_the_answers_stay_the_same(ai):
    asked = question("What is in the image?", image_part(data_uri(image_of("maroon"))))
    options = {"temperature": 2.0, "seed": 3, "max_tokens": 32}  # a likely token would hide bits that differ
    first, *others = (ask(ai, asked, **options) for _ in range(3))
    assert (first.usage.prompt_tokens_details.cached_tokens, first.model_extra["cobra_edge"]["remembered"]) == (0, "nothing")
    for other in others:
        assert other.choices[0].message.content == first.choices[0].message.content
        assert (other.usage.prompt_tokens_details.cached_tokens, other.model_extra["cobra_edge"]["remembered"]) == (64, "image")
        assert other.usage.prompt_tokens == first.usage.prompt_tokens


def test_what_was_seen_is_remembered_after_a_restart(mini_bundle, tmp_path):
    asked, said = question(QUESTIONS[0], image_part()), []
    for _ in range(2):
        with served(mini_bundle("w4a16-g128"), "--state-dir", str(tmp_path / "states")) as server, client(server.url) as ai:
            said.append(ask(ai, asked, temperature=2.0, seed=3, max_tokens=32))
    assert [one.usage.prompt_tokens_details.cached_tokens for one in said] == [0, 64]
    assert said[0].choices[0].message.content == said[1].choices[0].message.content
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_sixteen_at_the_same_time(url, session):
    texts = [f"{QUESTIONS[i % 3]}{' Please.' * (i // 3)}" for i in range(16)]
    same = [expected(session, text, max_new_tokens=12).text for text in texts]

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120) as ai:

            async def one(index, text):
                request = {"model": MODEL, "messages": [question(text, image_part())], "max_tokens": 12}
                if index % 2:
                    return (await ai.chat.completions.create(**request)).choices[0].message.content
                said = ""
                async for chunk in await ai.chat.completions.create(**request, stream=True):
                    said += chunk.choices[0].delta.content or ""
                return said

            return await asyncio.gather(*(one(i, text) for i, text in enumerate(texts)))

    assert asyncio.run(all_of_them()) == same


# Errors


def assert_refused(error, status, code, param, word):
    assert (error.status_code, error.code, error.param) == (status, code, param)
    assert word in error.body["message"] and error.type == error.body["type"]


@pytest.mark.parametrize(
    ("options", "code", "param", "word"),
    [
        ({"messages": []}, "invalid_value", "messages", "is empty"),
        ({"messages": [{"role": "user", "content": ""}]}, "invalid_value", "messages", "empty"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "invalid_value", "messages", "begin with the user"),
        (
            {"messages": [question("a"), {"role": "assistant", "content": "b"}]},
            "invalid_value",
            "messages",
            "ends with an answer",
        ),
        ({"messages": [question("long " * 2000)]}, "context_length_exceeded", "messages", "tokens"),
        ({"messages": [question("long " * 2_000_000)]}, "context_length_exceeded", "messages", "10,000,000 characters"),
        (
            {"messages": [question("a", image_part("https://host.example/a.png"))]},
            "invalid_image_url",
            "messages",
            "--allow-image-host",
        ),
        ({"messages": [question("a", image_part("data:image/png;base64,AAAA"))]}, "invalid_image", "messages", "image"),
        ({"temperature": 3}, "invalid_value", "temperature", "expected at most 2, got 3"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens", "expected 1 or more, or -1"),
        ({"stop": ["a"] * 65}, "invalid_value", "stop", "more than 64"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 65}]},
            "invalid_value",
            "messages.0.content",
            "more than 64",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "invalid_value",
            "messages.0.content.0.text",
            "required",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "invalid_value",
            "messages.0.content",
            "a string or a list of parts, got 5",
        ),
        ({"messages": [{"content": "a"}]}, "invalid_value", "messages.0", 'unknown "role"'),
        ({"messages": [{"role": "critic", "content": "a"}]}, "invalid_value", "messages.0", '"critic"'),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]},
            "invalid_value",
            "messages.0.content.0",
            '"input_image": expected "text" or "image_url"; send an image as {"type": "image_url"',
        ),
        (
            {"messages": [{"role": "system", "content": [image_part()]}, question("a")]},
            "invalid_value",
            "messages.0.content.0.type",
            "in a user message",
        ),
        (
            {"messages": [{"role": "user", "content": {"type": "text", "text": "a"}}]},
            "invalid_value",
            "messages.0.content",
            "a list of parts, got an object",
        ),
        ({"n": 2}, "unsupported_value", "n", "n: only 1 is supported; a request has one answer"),
        ({"functions": [{"name": "f"}]}, "unsupported_value", "functions", "functions: only [] is supported; functions are"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", None, "stream_options"),
    ],
)
def test_the_message_of_a_bad_request(ai, options, code, param, word):
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(**({"model": MODEL, "messages": [question("What is it?")]} | options))
    assert_refused(caught.value, 400, code, param or caught.value.param, word)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("detail", [*get_args(get_type_hints(ImageURL)["detail"]), None])
def test_every_detail_that_the_client_knows_is_taken(detail):
    part = {"type": "image_url", "image_url": {"url": "data:,", "detail": detail}}
    asked = ChatRequest.model_validate({"model": MODEL, "messages": [question("a", part)]})
    assert asked.messages[0].content[1].image_url.detail == detail


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_of_many_errors_only_the_first_is_looked_for(role):
    messages = [{"role": role, "content": [{}] * 64}] * 1024
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"model": MODEL, "messages": messages})
    assert caught.value.error_count() <= 3  # no text, and no such part for want of two fields


@pytest.mark.parametrize("stream", [False, True])
def test_another_model_is_not_found(ai, stream):
    with pytest.raises(openai.NotFoundError) as caught:
        ai.chat.completions.create(model="gpt-4o", messages=[question("What is it?")], stream=stream)
    assert_refused(caught.value, 404, "model_not_found", "model", MODEL)
    with pytest.raises(openai.NotFoundError) as caught:
        ai.models.retrieve("gpt-4o")
    assert_refused(caught.value, 404, "model_not_found", "model", MODEL)


def test_what_is_not_served_is_not_found(ai):
    with pytest.raises(openai.NotFoundError) as caught:
        ai.embeddings.create(model=MODEL, input="a", encoding_format="float")
    assert_refused(caught.value, 404, "not_found", None, "/v1/embeddings")
    assert "base URL that ends in /v1" in caught.value.body["message"]


@pytest.mark.parametrize("base", ["", "/v1/", "/v1/v1", "/v1/chat/completions", "/api"])
def test_a_base_url_may_be_spelled_otherwise(url, base):
    with openai.OpenAI(base_url=url + base, api_key="any", max_retries=0) as ai:
        assert ask(ai, question(QUESTIONS[1], image_part()), max_tokens=1).choices[0].message.content == "4"
        assert ai.models.list().data[0].id == MODEL


def test_404_of_other_apis_names_the_supported_path(ai):
    for call in (
        lambda: ai.responses.create(model=MODEL, input="a"),
        lambda: ai.completions.create(model=MODEL, prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert "POST /v1/chat/completions" in caught.value.body["message"]


def test_method_not_allowed(url):
    response = httpx.get(f"{url}/v1/chat/completions")
    assert response.status_code == 405 and "use POST" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"max_tokens": -1}, {}),
        ({"max_completion_tokens": -1}, {}),
        ({"top_k": -1, "temperature": 1.5, "seed": 3}, {"sampling": Sampling(1.5, seed=3)}),
        ({"top_p": 0, "temperature": 2.0, "seed": 3}, {}),
        ({"stop": [f"unicorn {i}" for i in range(64)]}, {}),
    ],
)
def test_what_clients_mean_by_a_value(ai, session, given, same):
    own = {name: given[name] for name in given if name == "top_k"}
    got = ask(ai, question(QUESTIONS[0], image_part()), extra_body=own, **{n: v for n, v in given.items() if n not in own})
    assert got.choices[0].message.content == expected(session, QUESTIONS[0], **same).text


@pytest.mark.parametrize(
    "url_of",
    [
        lambda encoded: f"data:;base64,{encoded}",
        lambda encoded: f"data:application/octet-stream;base64,{encoded.rstrip('=')}",
        lambda encoded: encoded,
    ],
    ids=["no type", "unpadded", "base64 alone"],
)
@pytest.mark.parametrize("as_object", [True, False])
def test_an_image_as_clients_write_it(ai, url_of, as_object):
    address = url_of(base64.b64encode(IMAGE.read_bytes()).decode())
    part = {"type": "image_url", "image_url": {"url": address} if as_object else address}
    got = ask(ai, question(QUESTIONS[1], part))
    assert (got.choices[0].message.content, got.usage.prompt_tokens_details.model_dump()["image_tokens"]) == ("4", 64)


@pytest.mark.parametrize("place", ["images", "image_url", "attachments"])
def test_an_image_where_nobody_reads_it_is_refused_with_where_it_belongs(ai, place):
    message = {"role": "user", "content": "How many objects are there?", place: [data_uri()]}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(ai, message)
    assert_refused(caught.value, 400, "unknown_parameter", f"messages.0.{place}", "the content of a user message")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(ai, question("How many?"), extra_body={place: [data_uri()]})
    assert_refused(caught.value, 400, "unknown_parameter", place, "the content of a user message")


def test_another_host_is_refused(url):
    with client(url, default_headers={"Host": "rebound.example"}) as ai, pytest.raises(openai.PermissionDeniedError) as caught:
        ask(ai, question("What is it?"))
    assert_refused(caught.value, 403, "host_not_allowed", None, "rebound.example")


@pytest.mark.parametrize("stream", [False, True])
def test_deadline_exceeded(ai, stream):
    with pytest.raises(openai.InternalServerError) as caught:
        ask(ai, question(QUESTIONS[0], image_part()), extra_headers={"X-Deadline-Seconds": "0.000001"}, stream=stream)
    assert_refused(caught.value, 504, "deadline_exceeded", None, "1e-06 s")


def test_a_deadline_that_is_none_is_refused(ai):
    for given in ("soon", "-1", "0", "nan", "inf"):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(ai, question(QUESTIONS[0]), extra_headers={"X-Deadline-Seconds": given})
        assert_refused(caught.value, 400, "invalid_value", "x-deadline-seconds", given)


def test_a_body_that_is_too_large_is_refused(ai):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(ai, question("a" * (33 << 20)))
    assert_refused(caught.value, 413, "body_too_large", None, "bytes")


def test_a_wrong_key_is_refused(url_with_key):
    with client(url_with_key, "another-key") as ai:
        for call in (lambda: ask(ai, question("What is it?")), ai.models.list):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert_refused(caught.value, 401, "invalid_api_key", None, "Authorization")
    with client(url_with_key, KEY) as ai:
        assert ai.models.list().data[0].id == MODEL


def test_a_full_server_says_when_to_come_again(url_with_key):
    address = urlsplit(url_with_key)
    with client(url_with_key, KEY) as ai, socket.create_connection((address.hostname, address.port)) as slow:
        # A request whose body does not come has the only place.
        slow.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {KEY}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{".encode()
        )
        caught = None
        for _ in range(200):  # until the server has read that
            try:
                ask(ai, question("What is it?"), max_tokens=1)
            except openai.RateLimitError as error:
                caught = error
                break
        assert caught is not None
        assert_refused(caught, 429, "queue_full", None, "retry in")
        assert caught.type == "rate_limit_error" and 1 <= int(caught.response.headers["retry-after"]) <= 60
    with client(url_with_key, KEY).with_options(max_retries=5) as ai:  # the client obeys Retry-After
        assert ask(ai, question("What is it?"), max_tokens=1).usage.completion_tokens == 1
