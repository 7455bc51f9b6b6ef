"""Validation of tokenizer.json, before the tokenizers library parses it.

The library executes what a file describes: a normalizer that expands a letter to 16 kB, a regular expression with exponential
backtracking, ids that abort the process. So only the components of these models' tokenizers are accepted (byte-level BPE, as in
GPT-NeoX and cobra-mini). Each is checked here, and the library parses JSON that is serialized again from the checked structs.
Padding, truncation and post-processors are dropped: they would change the prompt.

User text must never become a control token such as <|endoftext|>. Every added token counts as one unless it is whitespace:
GPT-NeoX has added tokens for runs of spaces, which ordinary text needs. Control tokens are marked as special, so that with
`encode_special_tokens` the library encodes them as ordinary text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ..errors import InputError
from ..files.parsing import ParseError, parse_json

_MAX_BYTES = 16 << 20  # GPT-NeoX takes 2.5 MB
_MAX_CHARACTERS = 1024  # of one token

_Content = Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_CHARACTERS)]
_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Nothing = Literal[""] | None


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A component of the file. Unknown fields are rejected: they may change its behavior."""


class _AddedToken(_Part, frozen=True):
    id: _Id
    content: _Content
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _Nfc(_Part, frozen=True):
    type: Literal["NFC"]


class _ByteLevel(_Part, frozen=True):
    """The pre-tokenizer: GPT-2's regular expression, built into the library, and one character per byte."""

    type: Literal["ByteLevel"]
    add_prefix_space: bool
    trim_offsets: bool = True
    use_regex: bool = True


class _ByteLevelDecoder(_Part, frozen=True):
    type: Literal["ByteLevel"]
    add_prefix_space: bool = True
    trim_offsets: bool = True
    use_regex: bool = True


class _PostProcessor(msgspec.Struct, frozen=True):
    type: Literal["ByteLevel", "TemplateProcessing"]


class _Bpe(_Part, frozen=True, kw_only=True):
    type: Literal["BPE"]
    dropout: None = None
    unk_token: None = None
    continuing_subword_prefix: _Nothing = None
    end_of_word_suffix: _Nothing = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False
    vocab: dict[_Content, _Id]
    merges: list[str | tuple[str, str]]


class _File(_Part, frozen=True, kw_only=True):
    """The whole file. Unused components are not parsed."""

    version: Literal["1.0"]
    truncation: msgspec.Raw = msgspec.Raw(b"null")
    padding: msgspec.Raw = msgspec.Raw(b"null")
    added_tokens: list[_AddedToken]
    normalizer: _Nfc | None = None
    pre_tokenizer: _ByteLevel
    post_processor: _PostProcessor | None = None
    decoder: _ByteLevelDecoder
    model: _Bpe


class CheckedTokenizer(msgspec.Struct, frozen=True):
    """A validated tokenizer.json.

    Attributes:
        json: for the library to parse.
        ids: of the added tokens, by content.
        control: ids of the control tokens, by content; only a template may use them.
    """

    json: bytes
    ids: dict[str, int]
    control: dict[str, int]


def checked_tokenizer(file: Path, vocab: int) -> CheckedTokenizer:
    """Read and validate tokenizer.json for a vocabulary of `vocab` tokens.

    Raises:
        InputError: unreadable, too large, unsupported components, or inconsistent.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{file.name}: cannot be read ({error.strerror})") from error
    if len(content) > _MAX_BYTES:
        raise InputError(f"{file.name}: more than {_MAX_BYTES >> 20} MiB, too large for a tokenizer")
    try:
        found: _File = parse_json(content, _File)
    except ParseError as error:
        raise InputError(f"{file.name}: unsupported tokenizer: {error}; expected the byte-level BPE of GPT-NeoX") from error
    if flaw := _find_flaw(found, vocab):
        raise InputError(f"{file.name}: {flaw}; copy it from the checkpoint again")
    added = [
        msgspec.structs.replace(token, special=token.special or not token.content.isspace()) for token in found.added_tokens
    ]
    none = msgspec.Raw(b"null")
    clean = msgspec.structs.replace(found, truncation=none, padding=none, post_processor=None, added_tokens=added)
    ids = {token.content: token.id for token in added}
    return CheckedTokenizer(msgspec.json.encode(clean), ids, {t.content: t.id for t in added if t.special})


def _find_flaw(found: _File, vocab: int) -> str | None:
    """Return an inconsistency of a file, or None."""
    words, added = found.model.vocab, found.added_tokens
    if found.pre_tokenizer.add_prefix_space or not found.pre_tokenizer.use_regex:
        return "its pre-tokenizer adds a prefix space, or does not use its regular expression"
    if found.model.byte_fallback or found.model.ignore_merges:
        return "its model sets byte_fallback or ignore_merges, which is unsupported"
    ids = sorted(words.values())
    if ids != list(range(len(ids))):
        return f"the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}, each once"
    top = max([len(ids) - 1, *(token.id for token in added)])
    if top >= vocab:
        return f"contains token id {top}, but the model's vocabulary has {vocab} tokens; is it of another model?"
    absent = [letter for letter in _LETTERS if letter not in words]
    if absent:
        return f"{len(absent)} of the {len(_LETTERS)} bytes of UTF-8 have no token, for example {absent[0]!r}"
    following, seen = len(ids), set[str]()
    for token in added:  # the library assigns ids in order: the file must have the same
        expected = words.get(token.content, following)
        if token.content in seen or token.id != expected:
            return f"added token {token.content[:40]!r} has id {token.id}, expected {expected} and each token once"
        if token.single_word or token.lstrip or token.rstrip:
            return f"added token {token.content[:40]!r} sets single_word, lstrip or rstrip, which is unsupported"
        seen.add(token.content)
        following += token.content not in words
    return _find_merge_flaw(found)


def _find_merge_flaw(found: _File) -> str | None:
    words, merges = found.model.vocab, found.model.merges
    if len(merges) > len(words):
        return f"{len(merges)} merges for {len(words)} tokens"
    control = {token.content for token in found.added_tokens if not token.content.isspace()}
    for number, merge in enumerate(merges, 1):
        left, right = merge.partition(" ")[::2] if isinstance(merge, str) else merge
        if left not in words or right not in words or (whole := left + right) not in words:
            return f"merge {number} ({str(merge)[:60]!r}) does not join two tokens into a third"
        if whole in control:
            return f"merge {number} builds the control token {whole[:40]!r} from ordinary text"
    return None


def _letters() -> tuple[str, ...]:
    """Return the characters that stand for the bytes of UTF-8 in byte-level tokenizers.

    Source: GPT-2's encoder. Printable bytes stand for themselves, the others are mapped to U+0100 and up, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}  # not in UTF-8
    return tuple(letters[byte] for byte in range(256) if byte not in never)


_LETTERS = _letters()
