"""Structured answers: tokens that would leave a given form are masked before each choice.

Grammars and masks are llguidance's (github.com/guidance-ai/llguidance): a JSON schema or a regular expression becomes a grammar
over bytes, and the mask of a state says which tokens can still lead to an answer of it. The end token is among them where the
answer is complete, so an answer has its form unless the limit cuts it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from .choices import MOST_CHOICES

LONGEST_SCHEMA_BYTES = 1 << 16
LONGEST_PATTERN = 4096
_DEEPEST = 64
# Free white space would let a model write nothing else for ever; these are the separators that models were trained on.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class FormError(InputError):
    """A form that is not supported, or too complex to be followed."""


@dataclass(frozen=True)
class Form:
    """The form of an answer, made by one of the functions below.

    Attributes:
        kind: how messages call it.
        grammar: for llguidance.
    """

    kind: str
    grammar: str


def json_object() -> Form:
    """Return the form of any JSON object."""
    return json_schema({"type": "object"}, "JSON")


def json_schema(schema: Mapping[str, Any] | str | bytes, kind: str = "JSON schema") -> Form:
    """Return the form of JSON that fits a schema.

    Raises:
        FormError: the schema is no JSON object, too long, too deeply nested, or has a keyword that is not supported; it is
            named. MachineError: llguidance is not installed.
    """
    if not isinstance(schema, Mapping):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FormError(f"{kind}: not JSON ({error}); expected an object") from error
    if not isinstance(schema, Mapping):
        raise FormError(f"{kind}: is a {type(schema).__name__}, expected an object")
    if _depth(schema) > _DEEPEST:
        raise FormError(f"{kind}: nested more than {_DEEPEST} deep; flatten it")
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise FormError(f"{kind}: cannot be written as JSON ({error}); use plain values") from error
    if len(text) > LONGEST_SCHEMA_BYTES:
        raise FormError(f"{kind}: {len(text)} bytes, at most {LONGEST_SCHEMA_BYTES} are taken; shorten it")
    # `x-guidance` in a schema sets options of the library: overrides win.
    return _form(kind, _library().LLMatcher.grammar_from_json_schema(text, overrides=_JSON_STYLE))


def regex(pattern: str) -> Form:
    """Return the form of text that a regular expression matches as a whole. Raises FormError as `json_schema`."""
    if not 0 < len(pattern) <= LONGEST_PATTERN:
        raise FormError(f"regular expression: {len(pattern)} characters, expected 1 to {LONGEST_PATTERN}")
    return _form("regular expression", _library().LLMatcher.grammar_from_regex(pattern))


def one_of(choices: Sequence[str]) -> Form:
    """Return the form of one of some texts. Raises FormError for none, too many, or an empty one."""
    if not 1 <= len(choices) <= MOST_CHOICES:
        raise FormError(f"got {len(choices)} choices, expected 1 to {MOST_CHOICES}")
    if "" in choices:
        raise FormError(f"choice {choices.index('') + 1} of {len(choices)} is empty; give a text")
    texts = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return _form("choices", _library().LLMatcher.grammar_from_lark(f"start: {texts}"))


def _depth(value: Any) -> int:
    """Return how deeply lists and objects are nested, at most _DEEPEST + 1."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        parts = [v.values() if isinstance(v, Mapping) else v for v in level if isinstance(v, Mapping | list | tuple)]
        level, depth = [inner for part in parts for inner in part], depth + bool(parts)
    return depth


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MachineError(f"answers in a given form need llguidance; install it with: {install_hint('structured')}") from error
    return llguidance


def _form(kind: str, grammar: str) -> Form:
    """Return a form if the library takes its grammar."""
    wrong, messages = _library().LLMatcher.validate_grammar_with_warnings(grammar)
    if wrong:
        raise FormError(f"{kind}: not supported: {_first_line(messages[0])}")
    return Form(kind, grammar)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0][:300]


class FormTokenizer:
    """The tokens of a model as bytes, for masks. Made once a model; takes some ten milliseconds."""

    def __init__(self, file: Path, vocab: int, end_id: int) -> None:
        """Read tokenizer.json.

        Raises:
            MachineError: llguidance is not installed. InputError: it cannot read the tokenizer.
        """
        library = _library()
        self.vocab = vocab
        try:
            self._tokenizer = library.LLTokenizer(file.read_text(encoding="utf-8"), n_vocab=vocab, eos_token=end_id)
        except (ValueError, OSError) as error:
            raise InputError(f"{file.name}: cannot be used for answers in a given form ({_first_line(str(error))})") from error

    def mask(self, form: Form) -> FormMask:
        """Return the masks of one answer. Raises FormError for a form that is too complex."""
        return FormMask(_library().LLMatcher(self._tokenizer, form.grammar, log_level=0), form.kind, self.vocab)


class FormMask:
    """Which tokens may come next in one answer."""

    def __init__(self, matcher: Any, kind: str, vocab: int) -> None:
        """Begin an answer."""
        self._matcher, self._kind, self._vocab = matcher, kind, vocab
        self._require_no_error()

    def allowed(self) -> np.ndarray:
        """Return which tokens may come next, (vocab,) bool; at least one. Raises FormError for a form that is too complex."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_no_error()
        return np.unpackbits(bits, count=self._vocab, bitorder="little").view(bool)

    def accept(self, token: int) -> None:
        """Take a token that was allowed."""
        self._matcher.consume_token(token)
        self._require_no_error()

    def _require_no_error(self) -> None:
        if self._matcher.is_error():
            raise FormError(f"{self._kind}: {_first_line(self._matcher.get_error())}; simplify it")
