"""Validation errors of a request's body: the field, what was got, what was expected, what to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fastapi.exceptions import RequestValidationError

from .errors import ApiError
from .request_fields import IMAGE_EXAMPLE, UNKNOWN_FIELD

_MAX_PATH_CHARACTERS = 200
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


def api_error_of(error: RequestValidationError) -> ApiError:
    """Return the first error of a body that does not fit the schema."""
    errors = error.errors()
    # A union of string and list reports both: skip the string's error where the input is a list.
    first = next((e for e in errors if not (e["type"] == "string_type" and isinstance(e["input"], list))), errors[0])
    kind, location = first["type"], first["loc"][1:]
    if kind == "json_invalid":
        return not_json(first["ctx"]["error"])
    if not location and kind == "missing":
        return not_json("it is empty")
    if kind == UNKNOWN_FIELD:
        location = (*location, first["ctx"]["field"])
    path = _field_path(location, error.body, absent=kind == "missing")
    message = _explain(first, path.rpartition(".")[2])
    code = "unknown_parameter" if kind == UNKNOWN_FIELD else "invalid_value"
    return ApiError(400, f"{path}: {message}" if path else message, code, path or None)


def not_json(reason: object) -> ApiError:
    """Return the error of a body that is not JSON."""
    return ApiError(400, f"the body is not JSON: {reason}; send an object, as UTF-8", "invalid_json")


def _explain(error: Any, name: str) -> str:
    """Return a message: our own for the errors that our schema can raise, else pydantic's."""
    kind, ctx = error["type"], error.get("ctx", {})
    if kind in _KINDS:
        return f"expected {_EITHER.get(name, _KINDS[kind])}, got {_format_value(error['input'])}"
    if kind == "union_tag_not_found" and _tag(ctx) == "type":
        return f'a content part without "type": {_PART_TYPES}'
    if kind in ("union_tag_invalid", "literal_error") and "type" in (name, _tag(ctx)):
        return f"unknown type of content part {_format_value(ctx.get('tag', error['input']))}: {_PART_TYPES}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f'unknown "role" {_format_value(ctx.get("tag"))}; expected "system", "developer", "user" or "assistant"'
    bounds = {
        "greater_than_equal": f"expected {ctx.get('ge', 0):g} or more, got {_format_value(error['input'])}",
        "less_than_equal": f"expected at most {ctx.get('le', 0):g}, got {_format_value(error['input'])}",
        "literal_error": f"expected {ctx.get('expected')}, got {_format_value(error['input'])}",
        "missing": "is required",
        "string_unicode": "an unpaired surrogate; escape whole characters",
        "too_long": f"more than {ctx.get('max_length')}, the maximum; send fewer",
        "too_short": f"is empty, expected {ctx.get('min_length')} or more",
        "value_error": str(ctx.get("error")),
    }
    return bounds.get(kind, str(error["msg"]))


def _tag(ctx: Any) -> str:
    return str(ctx.get("discriminator", "")).strip("'")


def _format_value(value: Any) -> str:
    """Return a value of a request for a message: short, and never an image's data."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:40] + "..."


def _field_path(location: Sequence[int | str], body: Any, *, absent: bool) -> str:
    """Return the path of a field in a body, without the names of union members that pydantic adds."""
    parts: list[str] = []
    for part in location:
        with suppress(KeyError, IndexError, TypeError):  # the name of a union member
            body = body[part]
            parts.append(str(part))
    return ".".join([*parts, str(location[-1])] if absent and location else parts)[:_MAX_PATH_CHARACTERS]
