"""Unknown request fields: ignored where they cannot carry content, otherwise an error.

An image in an unknown field would be ignored silently. So an unknown field is ignored only where its value holds no content
(null, a boolean, a number, or an empty value), or where its name is listed below: fields that clients send and that do not
change an answer.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import PydanticCustomError

UNKNOWN_FIELD = "unknown_field"
IMAGE_EXAMPLE = '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
_WHERE = (
    f'an image belongs in the content of a user message, as {IMAGE_EXAMPLE} beside {{"type": "text", "text": "..."}}; text '
    "belongs in a content, too; leave out anything else"
)
# JSON Schema of a value that is ignored under any name.
_EMPTY_VALUE_SCHEMA: JsonSchemaValue = {
    "anyOf": [
        {"type": ["null", "boolean", "number"]},
        {"const": ""},
        {"type": "array", "maxItems": 0},
        {"type": "object", "maxProperties": 0},
    ]
}

# Accounting, caching and scheduling hints.
IGNORED_REQUEST_FIELDS = frozenset(
    {
        "cache_control",
        "cache_salt",
        "keep_alive",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "provider",
        "reasoning_effort",
        "request_id",
        "service_tier",
        "session_id",
        "store",
        "verbosity",
    }
)
# Clients send answers back as they got them; reasoning is never part of a later prompt.
IGNORED_MESSAGE_FIELDS = frozenset(
    {"annotations", "cache_control", "id", "name", "reasoning", "reasoning_content", "reasoning_details"}
)
IGNORED_PART_FIELDS = frozenset({"annotations", "cache_control", "id"})
IGNORED_IMAGE_URL_FIELDS = frozenset({"format", "media_type", "mime_type"})  # the format is detected from the bytes


def is_empty_value(value: Any) -> bool:
    """Whether a JSON value can carry neither text nor an image."""
    return value is None or isinstance(value, bool | int | float) or not value


class RequestObject(BaseModel):
    """An object of a request. For unknown fields see the docstring of the module."""

    model_config = ConfigDict(strict=True, extra="allow")

    ignored_fields: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _reject_content_in_unknown_fields(self) -> RequestObject:
        for name, value in (self.model_extra or {}).items():
            if name not in self.ignored_fields and not is_empty_value(value):
                raise PydanticCustomError(UNKNOWN_FIELD, "unknown field; " + _WHERE, {"field": name})
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> JsonSchemaValue:
        """Describe unknown fields in the OpenAPI document."""
        schema: JsonSchemaValue = handler(core_schema)
        described = handler.resolve_ref_schema(schema)
        properties = described.setdefault("properties", {})
        for name in sorted(cls.ignored_fields - properties.keys()):
            properties[name] = {"description": "Ignored."}
        described["additionalProperties"] = _EMPTY_VALUE_SCHEMA
        return schema
