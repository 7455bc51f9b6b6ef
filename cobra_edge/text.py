"""Prompt templates and the tokenizer.

Two prompt styles exist: zephyr for the chat-tuned language model, base for the plain one. Source: Cobra (Zhao et al., AAAI-25)
and the prompt builders of its published code, whose exact strings are a fact of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from .errors import InputError

END_OF_TEXT = "<|endoftext|>"
IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class PromptTemplate:
    """How turns become text. `style` is "zephyr" or "base"."""

    style: str

    def _wrap(self, message: str) -> str:
        message = message.replace(IMAGE_MARK, "").strip()
        if not message:
            raise InputError("the prompt is empty; ask something, for example --prompt 'What is in the image?'")
        if self.style == "zephyr":
            return f"<|user|>\n{message}{END_OF_TEXT}\n<|assistant|>\n"
        return f"In: {message}\nOut: "

    def first_turn(self, message: str) -> str:
        """Return the text that follows the image for a first question. Raises InputError when it is empty."""
        return self._wrap(message)

    def later_turn(self, message: str) -> str:
        """Return the text that follows an ended answer for a further question."""
        return "\n" + self._wrap(message)

    def conversation(self, turns: Sequence[tuple[str, str | None]]) -> str:
        """Return the text of (question, answer) turns; the last answer may be None, still to be given."""
        text = ""
        for index, (question, answer) in enumerate(turns):
            text += self.later_turn(question) if index else self.first_turn(question)
            if answer is not None:
                text += (answer or " ") + END_OF_TEXT
        return text


class TextCodec:
    """A tokenizer with its end-of-text id; no token is added in front or behind."""

    def __init__(self, tokenizer: Tokenizer, end_id: int) -> None:
        """Wrap a tokenizer."""
        self.tokenizer, self.end_id = tokenizer, end_id

    @classmethod
    def open(cls, file: Path, vocab: int) -> TextCodec:
        """Read tokenizer.json, checked against the model's vocabulary.

        Raises:
            InputError: not a tokenizer, no end-of-text token, or ids beyond the vocabulary.
        """
        try:
            tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InputError(f"{file.name}: not a readable tokenizer ({error})") from error
        # A file may carry these settings of its training; a prompt cut short in silence would be answered wrongly.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        end_id = tokenizer.token_to_id(END_OF_TEXT)
        if end_id is None:
            raise InputError(f"{file.name}: has no {END_OF_TEXT} token, which ends every answer of this model")
        top = max(tokenizer.get_vocab(with_added_tokens=True).values())
        if top >= vocab:
            raise InputError(f"{file.name}: holds token id {top}, but the model knows {vocab} tokens; another tokenizer?")
        return cls(tokenizer, end_id)

    def encode(self, text: str) -> list[int]:
        """Return token ids."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return text, special tokens left out."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)
