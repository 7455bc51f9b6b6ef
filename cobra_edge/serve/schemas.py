"""Schemas of requests and responses, compatible with OpenAI's API.

Source: https://platform.openai.com/docs/api-reference/chat. An unsupported field that would change the answer is an
error, unless its value is the default behavior; for unknown fields see `request_fields`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from ..inference.choices import MOST_CHOICES
from ..inference.logprobs import MOST_TOP
from .request_fields import (
    IGNORED_IMAGE_URL_FIELDS,
    IGNORED_MESSAGE_FIELDS,
    IGNORED_PART_FIELDS,
    IGNORED_REQUEST_FIELDS,
    RequestObject,
)


@dataclass(frozen=True)
class Unsupported:
    """An unsupported field: the values that are accepted because they change nothing, and what to do instead."""

    neutral: tuple[Any, ...]
    advice: str = "leave it out"


_ONE_ANSWER = "a request has one answer; send several requests"
_NO_PENALTY = "repetition penalties are not supported; leave it out"
_NO_FUNCTIONS = "functions are deprecated; send tools"
_COMPLETE_TURNS = "an answer follows a complete user message; leave it out"
UNSUPPORTED: dict[str, Unsupported] = {
    "n": Unsupported((1,), _ONE_ANSWER),
    "best_of": Unsupported((1,), _ONE_ANSWER),
    "frequency_penalty": Unsupported((0,), _NO_PENALTY),
    "presence_penalty": Unsupported((0,), _NO_PENALTY),
    "repetition_penalty": Unsupported((1,), _NO_PENALTY),
    "repeat_penalty": Unsupported((1,), _NO_PENALTY),
    "min_p": Unsupported((0,), "use top_p or top_k"),
    "typical_p": Unsupported((1,), "use top_p or top_k"),
    "min_tokens": Unsupported((0,)),
    "ignore_eos": Unsupported((False,)),
    "logit_bias": Unsupported(({},)),
    "functions": Unsupported(([],), _NO_FUNCTIONS),
    "function_call": Unsupported(("none", "auto"), _NO_FUNCTIONS),
    "guided_grammar": Unsupported((), "send guided_json, guided_regex or guided_choice"),
    "structured_outputs": Unsupported((), "send response_format, guided_json, guided_regex or guided_choice"),
    "modalities": Unsupported((["text"],), "answers are text"),
    "audio": Unsupported((), "answers are text"),
    "echo": Unsupported((False,), "the prompt is not repeated; leave it out"),
    "continue_final_message": Unsupported((False,), _COMPLETE_TURNS),
    "add_generation_prompt": Unsupported((True,), _COMPLETE_TURNS),
}
MAX_MESSAGES = 1024
MAX_PARTS = 64
MAX_STOPS = 64
MAX_TOOLS = 64
NO_LIMIT = -1  # of max_tokens and top_k, as in llama.cpp and vLLM


def _omitted_if_none() -> Any:
    return Field(default=None, exclude_if=lambda value: value is None)


def _whole(text: str) -> str:
    """Require valid UTF-8; JSON escapes can contain unpaired surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"unpaired surrogate at {error.start}; escape whole characters") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]
# JSON has one number type: 2.0 is the integer 2.
Whole = Annotated[int, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)]


def _limit(value: int) -> int:
    if value < 1 and value != NO_LIMIT:
        raise ValueError(f"expected 1 or more, or {NO_LIMIT} for no limit; got {value}")
    return value


def _plain_url(value: Any) -> Any:
    """Accept a plain URL in place of the object, as some clients send it."""
    return {"url": value} if isinstance(value, str) else value


TokenLimit = Annotated[
    Whole,
    AfterValidator(_limit),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": NO_LIMIT}]}),
]
# fail_fast: an error for each of a million parts would take gigabytes.
_Parts = Field(max_length=MAX_PARTS, fail_fast=True)


class _Part(RequestObject):
    ignored_fields: ClassVar = IGNORED_PART_FIELDS


class TextPart(_Part):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class ImageUrl(RequestObject):
    """The URL of an image: data:, plain base64, or http(s) where the server is allowed to fetch it."""

    ignored_fields: ClassVar = IGNORED_IMAGE_URL_FIELDS

    url: Text = Field(examples=["data:image/png;base64,iVBORw0KGgo..."])
    detail: Literal["auto", "low", "high", "original"] | None = Field(default=None, description="No effect.")


class ImagePart(_Part):
    """An image."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_plain_url, json_schema_input_type=ImageUrl | str)]


class _Message(RequestObject):
    ignored_fields: ClassVar = IGNORED_MESSAGE_FIELDS


class SystemMessage(_Message):
    """Instructions before the first question."""

    role: Literal["system", "developer"]
    content: Text | Annotated[list[TextPart], _Parts]


class UserMessage(_Message):
    """A question, with or without the image."""

    role: Literal["user"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], _Parts]


class CalledFunction(RequestObject):
    """A call: the arguments are JSON."""

    name: Text
    arguments: Text


class ToolCall(RequestObject):
    """A call of a tool in an answer."""

    ignored_fields: ClassVar = frozenset({"index"})

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(_Message):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart], _Parts] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None


class ToolMessage(_Message):
    """What a tool returned, which the model reads as the user's words."""

    ignored_fields: ClassVar = IGNORED_MESSAGE_FIELDS | {"tool_call_id"}

    role: Literal["tool"]
    content: Text | Annotated[list[TextPart], _Parts]


Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage


class _SchemaOfAnswer(RequestObject):
    ignored_fields: ClassVar = frozenset({"name", "description", "strict"})

    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class TextFormat(RequestObject):
    """Free text, the default."""

    type: Literal["text"]


class JsonObjectFormat(RequestObject):
    """A JSON object; of a schema, as llama.cpp takes it, where one is given."""

    type: Literal["json_object"]
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class JsonSchemaFormat(RequestObject):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: _SchemaOfAnswer


class Function(RequestObject):
    """A function that an answer can call; its description is not read."""

    ignored_fields: ClassVar = frozenset({"description", "strict"})

    name: Text = Field(min_length=1, max_length=64)
    parameters: dict[str, Any] | None = None


class Tool(RequestObject):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class _FunctionName(RequestObject):
    name: Text


class NamedTool(RequestObject):
    """The tool that has to be called."""

    type: Literal["function"]
    function: _FunctionName


class StreamOptions(RequestObject):
    """Options of a stream."""

    include_usage: bool | None = None


class ChatRequest(RequestObject):
    """A conversation to be answered."""

    ignored_fields: ClassVar = IGNORED_REQUEST_FIELDS | UNSUPPORTED.keys()

    model: Text = Field(examples=["cobra-mini"])
    messages: list[Annotated[Message, Field(discriminator="role")]] = Field(
        min_length=1, max_length=MAX_MESSAGES, fail_fast=True
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    temperature: float | None = Field(default=None, ge=0, le=2, description="0, the default, is greedy decoding.")
    top_p: float | None = Field(default=None, ge=0, le=1, description="0 is greedy decoding.")
    top_k: Whole | None = Field(
        default=None, ge=NO_LIMIT, le=1_000_000, description="Extension of OpenAI's API; 0 or -1 disables it."
    )
    seed: Whole | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = None
    guided_json: dict[str, Any] | Text | None = Field(default=None, description="JSON schema of the answer, as in vLLM.")
    guided_regex: Text | None = Field(default=None, description="The whole answer matches it, as in vLLM.")
    guided_choice: Annotated[list[Text], Field(max_length=MOST_CHOICES, fail_fast=True)] | None = Field(
        default=None, description="The answer is one of them, as in vLLM."
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        default=None, description="The model was not trained to choose: `auto`, the default, answers in text."
    )
    logprobs: bool | None = Field(default=None, description="In a stream they come with the chunk that has a finish_reason.")
    top_logprobs: Whole | None = Field(default=None, ge=0, le=MOST_TOP)
    user: Text | None = Field(default=None, description="User ID, for fair scheduling among users of one address.")
    safety_identifier: Text | None = Field(default=None, description="As `user`.")

    @model_validator(mode="after")
    def _require_what_options_need(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options require stream; set it, or leave them out")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs require logprobs; set it, or leave them out")
        return self

    @property
    def unsupported(self) -> str | None:
        """The name of an unsupported field whose value is not neutral, or None."""
        extra = self.model_extra or {}
        given = {name: extra[name] for name in UNSUPPORTED if extra.get(name) is not None}
        return next((name for name, value in given.items() if value not in UNSUPPORTED[name].neutral), None)

    @property
    def token_limit(self) -> int | None:
        """Maximum length of the answer, `NO_LIMIT`, or None by default."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, without empty ones."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class PromptDetails(BaseModel):
    """Details of the prompt's tokens."""

    cached_tokens: int = Field(description="In the cached prefix.")
    image_tokens: int = Field(description="Visual tokens.")


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int = Field(description="Visual tokens included.")
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Figures(BaseModel):
    """Metrics of an answer; an extension of OpenAI's API.

    `remembered` is what the cached prefix covers: "nothing", the "image", or the "conversation" so far. Times are in
    milliseconds: in the queue, from the request to the first token (null for none), and per further token (null for fewer than
    two tokens).
    """

    remembered: Literal["nothing", "image", "conversation"]
    queue_ms: float
    ttft_ms: float | None
    tpot_ms: float | None
    dropped_images: int = Field(
        default=0, description="Images of the request that the answer is not about: all but the newest."
    )


class AnswerCall(BaseModel):
    """The call of a function that an answer is; in a stream it comes whole."""

    index: Literal[0] | None = _omitted_if_none()
    id: str
    type: Literal["function"] = "function"
    function: dict[Literal["name", "arguments"], str]


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnswerCall] | None = _omitted_if_none()


class TopLogprob(BaseModel):
    """A token: its text and, where it is whole characters, its bytes.

    `logprob` is its natural log-probability, before temperature, top_k, top_p and form.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of an answer, and the most probable tokens at its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class Choice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """A complete answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    cobra_edge: Figures


class Delta(BaseModel):
    """The text that a chunk adds."""

    role: Literal["assistant"] | None = _omitted_if_none()
    content: str | None = _omitted_if_none()
    tool_calls: list[AnswerCall] | None = _omitted_if_none()


class ChunkChoice(BaseModel):
    """The only choice of a chunk."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """One event of a stream; the one with a finish_reason has the metrics, the one without choices the usage."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = _omitted_if_none()
    cobra_edge: Figures | None = _omitted_if_none()


class Model(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["cobra-edge"] = "cobra-edge"


class ModelList(BaseModel):
    """The list of models: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    """The error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every error response."""

    error: ErrorBody
