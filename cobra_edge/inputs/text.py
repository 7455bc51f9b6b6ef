"""Prompt templates and the tokenizer.

There are two prompt styles: zephyr for the chat-tuned language model, base for the plain one. Source: Cobra (Zhao et al.,
AAAI-25) and the prompt builders of its published code, whose exact strings the checkpoints were trained with.

User text never becomes a control token: `<|endoftext|>` in a question is tokenized as ordinary text and ends no turn. Only the
marks of a template become control tokens, by their ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .tokenizer_file import checked_tokenizer

if TYPE_CHECKING:  # the library takes 6 MiB: it is imported where a tokenizer is opened
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
IMAGE_MARK = "<image>"
_USER, _ASSISTANT = "<|user|>", "<|assistant|>"


@dataclass(frozen=True)
class Mark:
    """A mark of a template: a control token where the tokenizer has one of this name, else text."""

    name: str

    def __str__(self) -> str:
        """Return the text of the mark."""
        return self.name


@dataclass(frozen=True)
class Prompt:
    """A prompt: user text and the marks of a template; `str` returns all of it as text."""

    parts: tuple[str | Mark, ...]

    def __str__(self) -> str:
        """Return the prompt as one text."""
        return "".join(str(part) for part in self.parts)

    def __add__(self, other: Prompt) -> Prompt:
        """Return the concatenation."""
        return Prompt((*self.parts, *other.parts))


def given_answer(answer: str) -> str:
    """Return an answer as in the training data: no image mark, no surrounding whitespace, one space if empty.

    Source: `add_turn` and `wrap_gpt` of the prompt builders in Cobra's published code.
    """
    return answer.replace(IMAGE_MARK, "").strip() or " "


@dataclass(frozen=True)
class PromptTemplate:
    """From turns to a prompt. `style` is "zephyr" or "base"."""

    style: str

    def _wrap(self, message: str, before: str = "") -> Prompt:
        message = message.replace(IMAGE_MARK, "").strip()
        if not message:
            raise InputError("the prompt is empty; ask something, for example --prompt 'What is in the image?'")
        if self.style == "zephyr":
            return Prompt((before, Mark(_USER), f"\n{message}", Mark(END_OF_TEXT), "\n", Mark(_ASSISTANT), "\n"))
        return Prompt((f"{before}In: {message}\nOut: ",))

    def first_turn(self, message: str) -> Prompt:
        """Return the prompt after the image for a first question. Raises InputError for an empty one."""
        return self._wrap(message)

    def later_turn(self, message: str) -> Prompt:
        """Return the prompt after an answer for a further question."""
        return self._wrap(message, "\n")

    def conversation(self, turns: Sequence[tuple[str, str | None]]) -> Prompt:
        """Return the prompt of (question, answer) turns; the last answer may be None, to be generated."""
        prompt = Prompt(())
        for index, (question, answer) in enumerate(turns):
            prompt += self.later_turn(question) if index else self.first_turn(question)
            if answer is not None:
                prompt += Prompt((given_answer(answer), Mark(END_OF_TEXT)))
        return prompt


class TextCodec:
    """A tokenizer with its end-of-text id; it adds no tokens before or after a text."""

    def __init__(self, tokenizer: Tokenizer, end_id: int, control: dict[str, int]) -> None:
        """Wrap a tokenizer that encodes control tokens as text; `control` has their ids."""
        self.tokenizer, self.end_id, self._control = tokenizer, end_id, {**control, END_OF_TEXT: end_id}

    @classmethod
    def open(cls, file: Path, vocab: int) -> TextCodec:
        """Read tokenizer.json and check it against the size of the model's vocabulary.

        Raises:
            InputError: an unsupported tokenizer, no end-of-text token, or ids beyond the vocabulary.
        """
        from tokenizers import Tokenizer

        checked = checked_tokenizer(file, vocab)
        end_id = checked.control.get(END_OF_TEXT)
        if end_id is None:
            raise InputError(f"{file.name}: has no {END_OF_TEXT} token, which this model needs to end an answer")
        with _tokenizers(f"{file.name}: not a readable tokenizer"):
            tokenizer = Tokenizer.from_str(checked.json.decode("utf-8"))
            tokenizer.encode_special_tokens = True  # control tokens in text are encoded as text
            odd = sorted(name for name, token in checked.ids.items() if tokenizer.token_to_id(name) != token)
        if odd:
            raise InputError(f"{file.name}: {odd[0][:40]!r} has another id than in the file; copy it from the checkpoint again")
        return cls(tokenizer, end_id, checked.control)

    def encode(self, prompt: str | Prompt) -> list[int]:
        """Return token ids. A str is user text and never becomes a control token; for marks see `Prompt`.

        Raises:
            InputError: the tokenizer fails.
        """
        tokens, text = list[int](), ""
        for part in (prompt,) if isinstance(prompt, str) else prompt.parts:
            if isinstance(part, Mark) and (token := self._control.get(part.name)) is not None:
                tokens += [*self._encode_text(text), token]
                text = ""
            else:
                text += str(part)
        return [*tokens, *self._encode_text(text)]

    def answer(self, text: str) -> list[int]:
        """Return the tokens of an answer and the end token; the text should come from `given_answer`."""
        return [*self.encode(text), self.end_id]

    def with_marks(self, text: str) -> Prompt:
        """Parse the names of control tokens in a text as marks: for a complete prompt, template included, as one string."""
        names = "|".join(re.escape(name) for name in sorted(self._control, key=len, reverse=True))
        pieces = re.split(f"({names})", text)
        return Prompt(tuple(Mark(piece) if i % 2 else piece for i, piece in enumerate(pieces)))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without control tokens. Raises InputError where the tokenizer fails."""
        with _tokenizers("the tokenizer cannot decode what was generated"):
            return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """Return an incremental detokenizer."""
        return TextStream(self.tokenizer)

    def _encode_text(self, text: str) -> list[int]:
        if not text:
            return []
        with _tokenizers("the tokenizer cannot encode this text"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids


class TextStream:
    """Incremental detokenizer: returns characters as soon as they are complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begin with an empty text."""
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)

    def step(self, token: int) -> str | None:
        """Return the text that a token completes, None for none. Raises InputError where the tokenizer fails."""
        with _tokenizers("the tokenizer cannot decode what was generated"):
            return self._stream.step(self._tokenizer, token)


@contextmanager
def _tokenizers(what: str) -> Iterator[None]:
    """Convert what the library raises to InputError: bare Exceptions, and panics, which are BaseExceptions."""
    try:
        yield
    except MemoryError:  # not the fault of the tokenizer
        raise
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{what} ({error}); export or copy the bundle again") from error
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise InputError(f"{what} (the tokenizers library panicked: {error}); export or copy the bundle again") from error
