"""The shapes of requests and answers, as OpenAI's clients send and expect them.

Source: https://platform.openai.com/docs/api-reference/chat. Fields that would change an answer and are not supported are
refused unless they say what is done anyway; for those that are unknown see `request_fields`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from .request_fields import (
    IGNORED_IMAGE_URL_FIELDS,
    IGNORED_MESSAGE_FIELDS,
    IGNORED_PART_FIELDS,
    IGNORED_REQUEST_FIELDS,
    RequestObject,
)


@dataclass(frozen=True)
class Unsupported:
    """A field that would change an answer: the values that do not, and what to do instead."""

    neutral: tuple[Any, ...]
    advice: str = "leave it out"


_ONE_ANSWER = "one request has one answer; send several requests"
_NO_PENALTY = "repetition is not penalised; leave it out"
_NO_TOOLS = "the model calls no tools; leave it out, and say in the question what to answer"
_TEXT_ONLY = "answers are free text; leave it out, and ask for the form of the answer in the question"
_WHOLE_TURNS = "an answer begins after a whole turn of the user; leave it out"
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
    "logprobs": Unsupported((False,)),
    "top_logprobs": Unsupported((0,)),
    "tools": Unsupported(([],), _NO_TOOLS),
    "tool_choice": Unsupported(("none", "auto"), _NO_TOOLS),
    "functions": Unsupported(([],), _NO_TOOLS),
    "function_call": Unsupported(("none", "auto"), _NO_TOOLS),
    "response_format": Unsupported(({"type": "text"},), _TEXT_ONLY),
    "modalities": Unsupported((["text"],), "answers are text"),
    "audio": Unsupported((), "answers are text"),
    "echo": Unsupported((False,), "the question is not repeated; leave it out"),
    "continue_final_message": Unsupported((False,), _WHOLE_TURNS),
    "add_generation_prompt": Unsupported((True,), _WHOLE_TURNS),
}
MAX_MESSAGES = 1024
MAX_PARTS = 64
MAX_STOPS = 64
NO_LIMIT = -1  # of tokens, and of candidates: as llama.cpp and vLLM have it


def _where_given() -> Any:
    return Field(default=None, exclude_if=lambda value: value is None)


def _whole(text: str) -> str:
    """Return a text that can be written as UTF-8; JSON's escapes can name halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character at {error.start}; escape whole ones") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]
# JSON has one kind of number: 2.0 is the integer 2.
Whole = Annotated[int, BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)]


def _limit(value: int) -> int:
    if value < 1 and value != NO_LIMIT:
        raise ValueError(f"expected 1 or more, or {NO_LIMIT} for as many as there is room for; got {value}")
    return value


def _url_alone(value: Any) -> Any:
    """Take an address alone for the object that has it, as some clients send it."""
    return {"url": value} if isinstance(value, str) else value


TokenLimit = Annotated[
    Whole,
    AfterValidator(_limit),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": NO_LIMIT}]}),
]
# The first thing that is wrong is enough: an error for each of a million parts would take gigabytes.
_Parts = Field(max_length=MAX_PARTS, fail_fast=True)


class _Part(RequestObject):
    ignored_fields: ClassVar = IGNORED_PART_FIELDS


class TextPart(_Part):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class ImageUrl(RequestObject):
    """Where an image is: in a data: URL, in base64 alone, or at an http(s) URL where the server may fetch some."""

    ignored_fields: ClassVar = IGNORED_IMAGE_URL_FIELDS

    url: Text = Field(examples=["data:image/png;base64,iVBORw0KGgo..."])
    detail: Literal["auto", "low", "high", "original"] | None = Field(default=None, description="Changes nothing.")


class ImagePart(_Part):
    """An image."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_url_alone, json_schema_input_type=ImageUrl | str)]


class _Message(RequestObject):
    ignored_fields: ClassVar = IGNORED_MESSAGE_FIELDS


class SystemMessage(_Message):
    """What stands before the first question."""

    role: Literal["system", "developer"]
    content: Text | Annotated[list[TextPart], _Parts]


class UserMessage(_Message):
    """A question, with or without the conversation's image."""

    role: Literal["user"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], _Parts]


class AssistantMessage(_Message):
    """An answer that was given."""

    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart], _Parts] | None = None


Message = SystemMessage | UserMessage | AssistantMessage


class StreamOptions(RequestObject):
    """What a stream has beside its pieces."""

    include_usage: bool | None = None


class ChatRequest(RequestObject):
    """A conversation that wants its next answer."""

    ignored_fields: ClassVar = IGNORED_REQUEST_FIELDS | UNSUPPORTED.keys()

    model: Text = Field(examples=["cobra-mini"])
    messages: list[Annotated[Message, Field(discriminator="role")]] = Field(
        min_length=1, max_length=MAX_MESSAGES, fail_fast=True
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    temperature: float | None = Field(default=None, ge=0, le=2, description="0, the default, takes the likeliest token.")
    top_p: float | None = Field(default=None, ge=0, le=1, description="0 takes the likeliest token.")
    top_k: Whole | None = Field(default=None, ge=NO_LIMIT, le=1_000_000, description="Not OpenAI's; 0 or -1 for all.")
    seed: Whole | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    user: Text | None = Field(default=None, description="Whose turn it is, for fairness among users of one address.")
    safety_identifier: Text | None = Field(default=None, description="As `user`.")

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belong to a stream; set stream, or leave them out")
        return self

    @property
    def unsupported(self) -> str | None:
        """The name of a field that asks for what cannot be done, or None."""
        extra = self.model_extra or {}
        given = {name: extra[name] for name in UNSUPPORTED if extra.get(name) is not None}
        return next((name for name, value in given.items() if value not in UNSUPPORTED[name].neutral), None)

    @property
    def token_limit(self) -> int | None:
        """At most so many tokens are wanted: `NO_LIMIT`, or None where nothing is said."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer; empty ones end none."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(description="Remembered, and not read again.")
    image_tokens: int = Field(description="Of the image.")


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int = Field(description="The image's included.")
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Figures(BaseModel):
    """How it went; not OpenAI's.

    `remembered` is what did not have to be read again: "nothing", the "image", or the "conversation" so far. Times are in
    milliseconds: in the queue, from the request to the first token (null for none), and for each further one (null for fewer
    than two tokens).
    """

    remembered: Literal["nothing", "image", "conversation"]
    queue_ms: float
    ttft_ms: float | None
    tpot_ms: float | None


class AnswerMessage(BaseModel):
    """What was answered."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """An answer in one piece."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    cobra_edge: Figures


class Delta(BaseModel):
    """What a piece of a stream adds."""

    role: Literal["assistant"] | None = _where_given()
    content: str | None = _where_given()


class ChunkChoice(BaseModel):
    """The one answer's next piece."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    """One event of a stream; the one with a finish_reason carries the figures, the one without choices the usage."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = _where_given()
    cobra_edge: Figures | None = _where_given()


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["cobra-edge"] = "cobra-edge"


class ModelList(BaseModel):
    """All models that are served: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every refusal's body."""

    error: ErrorBody
