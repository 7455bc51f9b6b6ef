"""The form that a request asks for: `response_format`, vLLM's `guided_*`, or the arguments of a tool."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CobraEdgeError
from ..inference import forms
from ..inference.forms import Form, FormMask
from .errors import ApiError
from .schemas import ChatRequest, JsonObjectFormat, JsonSchemaFormat, NamedTool, Tool

_NAME, _ARGUMENTS = "name", "arguments"


@dataclass(frozen=True)
class AnswerForm:
    """How an answer is written, and read back.

    Attributes:
        form: of the text; None for free text.
        tools: names of the functions of which the answer calls one; none for an answer in text.
    """

    form: Form | None = None
    tools: tuple[str, ...] = ()

    def call(self, text: str) -> tuple[str, str] | None:
        """Return name and arguments, as JSON, of the call that a whole answer is; None of one that is cut."""
        try:
            value = json.loads(text)
        except ValueError:
            return None
        if len(self.tools) == 1:
            return self.tools[0], text
        return value[_NAME], json.dumps(value[_ARGUMENTS], ensure_ascii=False)


def answer_form(chat: ChatRequest, mask_of: Callable[[Form], FormMask]) -> tuple[AnswerForm, FormMask | None]:
    """Return the form of a request's answer, and its masks; None for free text. Takes up to a second for a large schema.

    Args:
        chat: the request.
        mask_of: of the session, `form_mask`.

    Raises:
        ApiError: several forms, an unknown tool, or a form that is not supported or too complex; it is named.
    """
    asked: dict[str, Callable[[], AnswerForm]] = {}
    given = chat.response_format
    if isinstance(given, JsonObjectFormat):
        schema = given.json_schema
        asked["response_format"] = lambda: AnswerForm(forms.json_object() if schema is None else forms.json_schema(schema))
    elif isinstance(given, JsonSchemaFormat):
        schema = given.json_schema.json_schema
        asked["response_format"] = lambda: AnswerForm(forms.json_object() if schema is None else forms.json_schema(schema))
    if (guide := chat.guided_json) is not None:
        asked["guided_json"] = lambda: AnswerForm(forms.json_schema(guide))
    if (pattern := chat.guided_regex) is not None:
        asked["guided_regex"] = lambda: AnswerForm(forms.regex(pattern))
    if (choices := chat.guided_choice) is not None:
        asked["guided_choice"] = lambda: AnswerForm(forms.one_of(choices))
    if tools := _called(chat):
        asked["tools"] = lambda: _tool_form(tools)
    if len(asked) > 1:
        raise ApiError(400, f"{' and '.join(asked)}: an answer has one form; send one of them", "invalid_value", [*asked][1])
    for name, make in asked.items():
        try:
            found = make()
            return found, None if found.form is None else mask_of(found.form)
        except CobraEdgeError as error:
            raise ApiError(400, f"{name}: {error}", "unsupported_value", name) from error
    return AnswerForm(), None


def _called(chat: ChatRequest) -> Sequence[Tool]:
    """Return the tools of which the answer has to call one; none where the choice is the model's, which answers in text."""
    tools, choice = chat.tools or [], chat.tool_choice
    if isinstance(choice, NamedTool):
        wanted = choice.function.name
        named = [tool for tool in tools if tool.function.name == wanted]
        if not named:
            known = ", ".join(tool.function.name for tool in tools) or "none"
            raise ApiError(400, f"tool_choice: no tool {wanted[:64]!r}; tools: {known[:300]}", "invalid_value", "tool_choice")
        return named[:1]
    if choice == "required" and not tools:
        raise ApiError(
            400, "tool_choice: is required, but there are no tools; send tools, or leave it out", "invalid_value", "tools"
        )
    return tools if choice == "required" else []


def _tool_form(tools: Sequence[Tool]) -> AnswerForm:
    """Return the form of the arguments of one tool, or of a name and its arguments if there are several."""
    names = tuple(tool.function.name for tool in tools)
    if len(tools) == 1:
        return AnswerForm(forms.json_schema(_parameters(tools[0])), names)
    definitions = {f"tool_{i}": _rebased(_parameters(tool), f"#/$defs/tool_{i}") for i, tool in enumerate(tools)}
    calls = [
        {
            "type": "object",
            "properties": {_NAME: {"const": name}, _ARGUMENTS: {"$ref": f"#/$defs/tool_{i}"}},
            "required": [_NAME, _ARGUMENTS],
            "additionalProperties": False,
        }
        for i, name in enumerate(names)
    ]
    return AnswerForm(forms.json_schema({"anyOf": calls, "$defs": definitions}), names)


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def _rebased(value: Any, root: str) -> Any:
    """Return a schema whose references to its own root go to where it is put."""
    if isinstance(value, list):
        return [_rebased(part, root) for part in value]
    if not isinstance(value, dict):
        return value
    reference = value.get("$ref")
    moved = {"$ref": root + reference[1:]} if isinstance(reference, str) and reference.startswith("#") else {}
    return {key: _rebased(part, root) for key, part in value.items()} | moved
