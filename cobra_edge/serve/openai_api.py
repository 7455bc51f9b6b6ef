"""The shapes of requests and answers, as OpenAI's clients send and expect them.

Source: https://platform.openai.com/docs/api-reference/chat. Fields that would change an answer and are not supported are
refused unless they say what is done anyway; others that are unknown are passed over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# What these may be, since it changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}
MAX_MESSAGES = 1024
MAX_PARTS = 64
MAX_STOPS = 4


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
# The first thing that is wrong is enough: an error for each of a million parts would take gigabytes.
_Parts = Field(max_length=MAX_PARTS, fail_fast=True)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class TextPart(_Part):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Part):
    """Where a picture is: a data URI, or a URL where the server was told to fetch some."""

    url: Text = Field(examples=["data:image/png;base64,iVBORw0KGgo..."])
    detail: Literal["auto", "low", "high", "original"] | None = Field(default=None, description="Changes nothing.")


class ImagePart(_Part):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class SystemMessage(_Part):
    """What stands before the first question."""

    role: Literal["system", "developer"]
    content: Text | Annotated[list[TextPart], _Parts]


class UserMessage(_Part):
    """A question, with or without the conversation's picture."""

    role: Literal["user"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], _Parts]


class AssistantMessage(_Part):
    """An answer that was given."""

    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart], _Parts] | None = None


Message = SystemMessage | UserMessage | AssistantMessage


class StreamOptions(_Part):
    """What a stream has beside its pieces."""

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """A conversation that wants its next answer."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: Text = Field(examples=["cobra-mini"])
    messages: list[Annotated[Message, Field(discriminator="role")]] = Field(
        min_length=1, max_length=MAX_MESSAGES, fail_fast=True
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Whole | None = Field(default=None, ge=1)
    max_completion_tokens: Whole | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0, the default, takes the likeliest token.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Whole | None = Field(default=None, ge=0, le=1_000_000, description="Not OpenAI's; 0 for all.")
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
        return next((n for n, neutral in NEUTRAL.items() if extra.get(n) is not None and extra[n] not in neutral), None)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer; empty ones end none."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(description="Remembered, and not read again.")
    image_tokens: int = Field(description="Of the picture.")


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int = Field(description="The picture's included.")
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
