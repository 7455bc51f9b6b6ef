"""Answers in a form, calls of tools, log-probabilities and several images, as OpenAI's client sees them."""

import json
import math
import re
from typing import Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

import cobra_edge
from cobra_edge.inputs.contact_sheet import contact_sheet
from cobra_edge.inputs.image import load_image
from cobra_edge.serve.answer_form import answer_form
from cobra_edge.serve.errors import ApiError
from cobra_edge.serve.schemas import ChatRequest

from .serve_case import IMAGE, MODEL, client, data_uri, image_part, question, served
from .test_openai_clients import ask, image_of, streamed


@pytest.fixture(scope="module")
def url(mini_bundle):
    with served(mini_bundle("w4a16-g128")) as server:
        yield server.url


@pytest.fixture(scope="module")
def ai(url):
    with client(url) as ai:
        yield ai


SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["shape", "count"],
    "additionalProperties": False,
}
WHAT = question("What is in the image?", image_part())


def tool(name, parameters=SCHEMA):
    return {"type": "function", "function": {"name": name, "description": "Count.", "parameters": parameters, "strict": True}}


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}},
        {"extra_body": {"guided_json": SCHEMA}},
        {"extra_body": {"guided_json": json.dumps(SCHEMA)}},
        {"extra_body": {"response_format": {"type": "json_object", "schema": SCHEMA}}},
    ],
    ids=["openai", "vllm", "vllm text", "llama.cpp"],
)
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_fits_its_schema(ai, options, temperature):
    got = ask(ai, WHAT, temperature=temperature, seed=1, **options).choices[0]
    jsonschema.validate(json.loads(got.message.content), SCHEMA)
    assert got.finish_reason == "stop"


def test_a_stream_is_the_same_text(ai):
    options = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}
    text, chunks = streamed(ai, WHAT, **options)
    assert text == ask(ai, WHAT, **options).choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_any_json_is_an_object_or_says_that_it_was_cut(ai):
    got = ask(ai, WHAT, response_format={"type": "json_object"}, max_tokens=64).choices[0]
    assert got.message.content.startswith("{")
    if got.finish_reason == "stop":
        assert isinstance(json.loads(got.message.content), dict)
    else:
        assert got.finish_reason == "length"


def test_choices_and_expressions_as_vllm_names_them(ai):
    assert ask(ai, WHAT, extra_body={"guided_choice": ["Left", "Right"]}).choices[0].message.content in ("Left", "Right")
    text = ask(ai, WHAT, extra_body={"guided_regex": "[0-9]{2} stars"}).choices[0].message.content
    assert re.fullmatch("[0-9]{2} stars", text)


def test_the_clients_parse_returns_its_model(ai):
    class Seen(BaseModel):
        shape: Literal["circle", "square"]
        sure: bool

    got = ai.chat.completions.parse(model=MODEL, messages=[WHAT], response_format=Seen, max_tokens=120)
    assert isinstance(got.choices[0].message.parsed, Seen)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "count"}}])
def test_a_tool_is_called(ai, stream, choice):
    options = {"tools": [tool("count")], "tool_choice": choice}
    if stream:
        text, chunks = streamed(ai, WHAT, **options)
        calls = [call for chunk in chunks for c in chunk.choices for call in c.delta.tool_calls or []]
        assert text == "" and len(calls) == 1 and calls[0].index == 0
        reason = chunks[-1].choices[0].finish_reason
    else:
        got = ask(ai, WHAT, **options).choices[0]
        assert got.message.content is None
        calls, reason = got.message.tool_calls, got.finish_reason
    assert reason == "tool_calls" and calls[0].function.name == "count" and calls[0].id.startswith("call_")
    jsonschema.validate(json.loads(calls[0].function.arguments), SCHEMA)


def test_of_several_tools_one_is_called_with_its_own_arguments(ai):
    item = {"$defs": {"Item": {"type": "object", "properties": {"at": {"enum": ["left", "right"]}}, "required": ["at"],
            "additionalProperties": False}}, "type": "object", "properties": {"item": {"$ref": "#/$defs/Item"}},
            "required": ["item"], "additionalProperties": False}  # fmt: skip
    schemas = {"count": SCHEMA, "locate": item}
    tools = [tool(name, schema) for name, schema in schemas.items()]
    seen = set()
    for seed in range(12):
        got = ask(ai, WHAT, tools=tools, tool_choice="required", temperature=2, seed=seed, max_tokens=200).choices[0]
        call = got.message.tool_calls[0].function
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])
        seen.add(call.name)
    assert seen == set(schemas)


def test_where_the_model_may_choose_it_answers_in_text(ai):
    free = ask(ai, WHAT).choices[0].message
    for choice in ("auto", "none", None):
        got = ask(ai, WHAT, tools=[tool("count")], **({} if choice is None else {"tool_choice": choice})).choices[0].message
        assert got.content == free.content and got.tool_calls is None


def test_a_call_that_is_cut_is_text(ai):
    got = ask(ai, WHAT, tools=[tool("count")], tool_choice="required", max_tokens=2).choices[0]
    assert got.finish_reason == "length" and got.message.tool_calls is None and got.message.content.startswith("{")


def test_log_probabilities_come_with_their_tokens(ai, mini_bundle):
    session = cobra_edge.load(mini_bundle("w4a16-g128"))
    answer = session.ask(IMAGE, "What is in the image?", top_logprobs=3)
    answer.read()
    got = ask(ai, WHAT, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(token.token for token in got) == answer.text
    assert [token.logprob for token in got] == pytest.approx([found.chosen.logprob for found in answer.logprobs])
    assert all(len(token.top_logprobs) == 3 and bytes(token.bytes).decode() == token.token for token in got)
    _, chunks = streamed(ai, WHAT, logprobs=True)
    last = chunks[-1].choices[0].logprobs.content
    assert [token.token for token in last] == [token.token for token in got] and last[0].top_logprobs == []
    assert ask(ai, WHAT).choices[0].logprobs is None and math.isfinite(got[0].logprob)


def test_the_newest_of_several_images_counts(ai):
    red = question("How many objects are there?", image_part(data_uri(image_of("red"))))
    both = [red, {"role": "assistant", "content": "0"}, question("What is in the image?", image_part())]
    got = ask(ai, *both)
    assert got.model_extra["cobra_edge"]["dropped_images"] == 1
    text = [question("How many objects are there?"), both[1], both[2]]
    assert got.choices[0].message.content == ask(ai, *text).choices[0].message.content
    assert ask(ai, WHAT).model_extra["cobra_edge"]["dropped_images"] == 0


def test_a_server_can_refuse_several_images(mini_bundle):
    with served(mini_bundle("w4a16-g128"), "--images", "one") as server, client(server.url) as ai:
        with pytest.raises(openai.BadRequestError, match="2 different images, expected one") as caught:
            ask(ai, question("a", image_part(), image_part(data_uri(image_of("red")))))
        assert caught.value.code == "too_many_images"


def test_several_images_can_be_seen_on_one_sheet(mini_bundle):
    colors, session = ["red", "blue", "green"], cobra_edge.load(mini_bundle("w4a16-g128"))
    files = [image_of(color) for color in colors]
    sheet = contact_sheet([load_image(file) for file in files], 3, 112)
    with served(mini_bundle("w4a16-g128"), "--images", "grid") as server, client(server.url) as ai:
        asked = question("What is in the image?", *(image_part(data_uri(file)) for file in files))
        assert ask(ai, asked).choices[0].message.content == session.ask(sheet, "What is in the image?").read()
        again = ask(ai, asked)  # from the cache
        assert (
            again.model_extra["cobra_edge"]["remembered"] == "image" and again.model_extra["cobra_edge"]["dropped_images"] == 0
        )
        damaged = question("What?", image_part(data_uri(files[0])), image_part(data_uri(files[1][:60])))
        with pytest.raises(openai.BadRequestError, match="image 2: truncated or damaged"):
            ask(ai, damaged)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_regex": "("}, "guided_regex", "guided_regex: regular expression: not supported"),
        ({"guided_json": "{"}, "guided_json", "guided_json: JSON schema: not JSON"),
        ({"guided_choice": []}, "guided_choice", "got 0 choices"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex and guided_choice: an answer has one"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}}, "response_format",
         'response_format: JSON schema: not supported: .*"not"'),
        ({"tools": [tool("a")], "tool_choice": {"type": "function", "function": {"name": "b"}}}, "tool_choice",
         "tool_choice: no tool 'b'; tools: a"),
        ({"tool_choice": "required"}, "tools", "tool_choice: is required, but there are no tools"),
        ({"tools": [tool("a", {"not": {}})], "tool_choice": "required"}, "tools", 'tools: JSON schema: not supported: .*"not"'),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(fields, param, message):
    chat = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "A?"}]} | fields)
    with pytest.raises(ApiError, match=message) as refused:
        answer_form(chat, lambda form: None)
    assert (refused.value.status, refused.value.param) == (400, param)
