"""Unknown fields: those that could carry an image or text are rejected, at every level."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from cobra_edge.serve.request_fields import (
    IGNORED_IMAGE_URL_FIELDS,
    IGNORED_MESSAGE_FIELDS,
    IGNORED_PART_FIELDS,
    IGNORED_REQUEST_FIELDS,
    UNKNOWN_FIELD,
)
from cobra_edge.serve.schemas import ChatRequest

TEXT = {"type": "text", "text": "How many?"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
BASE64 = "iVBORw0KGgoAAAANSUhEUg"
LEVELS = ("", "messages.0", "messages.0.content.0", "messages.0.content.1", "messages.0.content.1.image_url")


def request(level: str = "", role: str = "user", **fields):
    """Return a request with more fields at a level of it."""

    def at(place: str):
        return fields if place == level else {}

    image = IMAGE | {"image_url": IMAGE["image_url"] | at(LEVELS[4])} | at(LEVELS[3])
    content = [TEXT | at(LEVELS[2]), *([image] if role == "user" else [])]
    return {"model": "m", "messages": [{"role": role, "content": content} | at(LEVELS[1])]} | at("")


def refused_at(body) -> str:
    """Return the place of the first unknown field that a request is refused for."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(body)
    (error,) = (e for e in caught.value.errors() if e["type"] == UNKNOWN_FIELD)
    assert "an image belongs in the content of a user message" in error["msg"]
    return error["ctx"]["field"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", [BASE64]),
        ("image", BASE64),
        ("image_data", [{"data": BASE64, "id": 12}]),
        ("attachments", [{"url": "https://example.org/a.png"}]),
        ("files", {"a": BASE64}),
        ("source", {"type": "base64", "data": BASE64}),
        ("nobody_knows", "a text"),
    ],
)
def test_what_could_carry_content_is_refused_at_every_level(level, name, value):
    assert refused_at(request(level, **{name: value})) == name


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_a_message_level_image_is_refused_for_every_role(role):
    assert refused_at(request("messages.0", role, image_url={"url": "data:image/png;base64,AAAA"})) == "image_url"
    assert refused_at(request("messages.0.content.0", role, image_url="data:image/png;base64,AAAA")) == "image_url"


def test_a_text_beside_an_image_in_one_part_is_refused():
    assert refused_at(request("messages.0.content.1", text="How many?")) == "text"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [None, True, 0, 1.5, "", [], {}])
def test_what_can_carry_nothing_is_ignored_at_every_level(level, value):
    ChatRequest.model_validate(request(level, images=value, nobody_knows=value))


@pytest.mark.parametrize(
    ("level", "ignored"),
    [
        ("", IGNORED_REQUEST_FIELDS),
        ("messages.0", IGNORED_MESSAGE_FIELDS),
        ("messages.0.content.0", IGNORED_PART_FIELDS),
        ("messages.0.content.1", IGNORED_PART_FIELDS),
        ("messages.0.content.1.image_url", IGNORED_IMAGE_URL_FIELDS),
    ],
)
def test_fields_on_the_lists_may_say_anything(level, ignored):
    assert ChatRequest.model_validate(request(level, **dict.fromkeys(ignored, "a text"))).unsupported is None


def test_an_answer_may_be_sent_back_as_it_came():
    given = {"role": "assistant", "content": "4", "refusal": None, "annotations": [], "audio": None, "tool_calls": []}
    question = {"role": "user", "content": "Why?"}
    ChatRequest.model_validate({"model": "m", "messages": [question, given | {"reasoning_content": "Hm."}, question]})
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}
    ChatRequest.model_validate({"model": "m", "messages": [question, given | {"tool_calls": [call]}, question]})
    for name, value in (("audio", {"id": "a"}), ("refusal", "I cannot.")):
        assert refused_at({"model": "m", "messages": [question, given | {name: value}, question]}) == name


def test_a_streams_options_are_no_place_for_content_either():
    assert refused_at(request(stream=True, stream_options={"images": [BASE64]})) == "images"


def test_the_schema_describes_what_is_ignored():
    schema = ChatRequest.model_json_schema()
    for described in (schema, *(schema["$defs"][name] for name in ("UserMessage", "TextPart", "ImagePart", "ImageUrl"))):
        assert {"const": ""} in described["additionalProperties"]["anyOf"]
    assert schema["properties"].keys() > IGNORED_REQUEST_FIELDS


def test_the_page_lists_what_is_ignored():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    for where, ignored in (
        ("the request", IGNORED_REQUEST_FIELDS),
        ("a message", IGNORED_MESSAGE_FIELDS),
        ("a content part", IGNORED_PART_FIELDS),
        ("`image_url`", IGNORED_IMAGE_URL_FIELDS),
    ):
        (listed,) = re.findall(rf"^\| {where} \| (.*) \|$", page, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", listed)) == ignored
