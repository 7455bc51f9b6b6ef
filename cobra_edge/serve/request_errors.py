"""What is wrong with a request's body, and where, in our own words: what was got, what was expected, what to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fastapi.exceptions import RequestValidationError

from .errors import Refusal
from .request_fields import IMAGE_EXAMPLE, UNKNOWN_FIELD

_LONGEST_PLACE = 200
_KINDS = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_type": "a string",
}
_EITHER = {"content": "a string or a list of parts", "stop": "a string or a list of strings"}
_PART_TYPES = f'expected "text" or "image_url"; send an image as {IMAGE_EXAMPLE}, in a user message'


def refusal_of(error: RequestValidationError) -> Refusal:
    """Return the refusal of a body that does not fit the schema: of the first thing that is wrong with it."""
    errors = error.errors()
    # Where a text or a list may stand, both are tried: a list was not meant to be a text.
    first = next((e for e in errors if not (e["type"] == "string_type" and isinstance(e["input"], list))), errors[0])
    kind, location = first["type"], first["loc"][1:]
    if kind == "json_invalid":
        return not_json(first["ctx"]["error"])
    if not location and kind == "missing":
        return not_json("it is empty")
    if kind == UNKNOWN_FIELD:
        location = (*location, first["ctx"]["field"])
    where = _place(location, error.body, absent=kind == "missing")
    said = _explained(first, where.rpartition(".")[2])
    code = "unknown_parameter" if kind == UNKNOWN_FIELD else "invalid_value"
    return Refusal(400, f"{where}: {said}" if where else said, code, where or None)


def not_json(reason: object) -> Refusal:
    """Return the refusal of a body that is not JSON."""
    return Refusal(400, f"the body is not JSON: {reason}; send an object, as UTF-8", "invalid_json")


def _explained(error: Any, name: str) -> str:
    """Return what is wrong: ours for the kinds that our schema can meet, else the library's words."""
    kind, ctx = error["type"], error.get("ctx", {})
    if kind in _KINDS:
        return f"expected {_EITHER.get(name, _KINDS[kind])}, got {_shown(error['input'])}"
    if kind == "union_tag_not_found" and _tag(ctx) == "type":
        return f'a content part without "type": {_PART_TYPES}'
    if kind in ("union_tag_invalid", "literal_error") and "type" in (name, _tag(ctx)):
        return f"unknown type of content part {_shown(ctx.get('tag', error['input']))}: {_PART_TYPES}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f'unknown "role" {_shown(ctx.get("tag"))}; expected "system", "developer", "user" or "assistant"'
    bounds = {
        "greater_than_equal": f"expected {ctx.get('ge', 0):g} or more, got {_shown(error['input'])}",
        "less_than_equal": f"expected at most {ctx.get('le', 0):g}, got {_shown(error['input'])}",
        "literal_error": f"expected {ctx.get('expected')}, got {_shown(error['input'])}",
        "missing": "is required",
        "string_unicode": "half a character; escape whole ones",
        "too_long": f"more than {ctx.get('max_length')}, which is the most that is read; send fewer",
        "too_short": f"is empty, expected {ctx.get('min_length')} or more",
        "value_error": str(ctx.get("error")),
    }
    return bounds.get(kind, str(error["msg"]))


def _tag(ctx: Any) -> str:
    return str(ctx.get("discriminator", "")).strip("'")


def _shown(value: Any) -> str:
    """Return a value of a request as a message shows it: short, and nothing that was meant to be an image."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else shown[:40] + "..."


def _place(location: Sequence[int | str], body: Any, *, absent: bool) -> str:
    """Return where in a body something is wrong, without the names of the types that were tried there."""
    parts: list[str] = []
    for part in location:
        with suppress(KeyError, IndexError, TypeError):  # raised for such a name
            body = body[part]
            parts.append(str(part))
    return ".".join([*parts, str(location[-1])] if absent and location else parts)[:_LONGEST_PLACE]
