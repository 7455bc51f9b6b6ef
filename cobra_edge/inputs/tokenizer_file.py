"""tokenizer.json, checked before the tokenizers library parses it.

The library runs whatever a file describes: a normalizer that expands a letter to 16 kB, a regular expression that backtracks
for ever, ids that abort the process. So only the parts of these models' tokenizers are accepted (byte-level BPE, as in
GPT-NeoX and cobra-mini). Each part is checked here, and the library parses JSON that is written anew from what was checked.
Padding, truncation and post-processors are dropped: a prompt is encoded as it is.

Text that somebody wrote must never become a control token such as <|endoftext|>. Every added token is taken for one unless it
is blank: GPT-NeoX has tokens for runs of spaces, which ordinary text is made of. Control tokens are written as special ones, so
that `encode_special_tokens` makes the library spell them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ..errors import InputError
from ..files.parsing import ParseError, parse_json

_MOST_BYTES = 16 << 20  # GPT-NeoX takes 2.5 MB
_MOST_LETTERS = 1024  # of one token

_Content = Annotated[str, msgspec.Meta(min_length=1, max_length=_MOST_LETTERS)]
_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Nothing = Literal[""] | None


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the file; a field that is not known may change what the part does."""


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
    """The pre-tokenizer: GPT-2's regular expression, which is in the library, and each byte as a letter."""

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
    """The whole file. Parts that are not used are not even parsed."""

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
    """What was found in a tokenizer.json.

    Attributes:
        json: for the library to parse.
        ids: of every added token, by its content.
        control: of those that no text becomes; the template alone may name them.
    """

    json: bytes
    ids: dict[str, int]
    control: dict[str, int]


def checked_tokenizer(file: Path, vocab: int) -> CheckedTokenizer:
    """Read and check tokenizer.json against a model's number of tokens; the library has not seen it.

    Raises:
        InputError: unreadable, too large, of parts that these models do not have, or not one tokenizer in itself.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{file.name}: cannot be read ({error.strerror})") from error
    if len(content) > _MOST_BYTES:
        raise InputError(f"{file.name}: more than {_MOST_BYTES >> 20} MiB, too large for a tokenizer")
    try:
        found: _File = parse_json(content, _File)
    except ParseError as error:
        raise InputError(
            f"{file.name}: not a tokenizer of these models: {error}; expected the byte-level BPE of GPT-NeoX"
        ) from error
    if flaw := _flaw_of(found, vocab):
        raise InputError(f"{file.name}: {flaw}; take it from the checkpoint again")
    added = [
        msgspec.structs.replace(token, special=token.special or not token.content.isspace()) for token in found.added_tokens
    ]
    none = msgspec.Raw(b"null")
    clean = msgspec.structs.replace(found, truncation=none, padding=none, post_processor=None, added_tokens=added)
    ids = {token.content: token.id for token in added}
    return CheckedTokenizer(msgspec.json.encode(clean), ids, {t.content: t.id for t in added if t.special})


def _flaw_of(found: _File, vocab: int) -> str | None:
    """Return what is wrong with a file whose parts are all known, None where nothing is."""
    words, added = found.model.vocab, found.added_tokens
    if found.pre_tokenizer.add_prefix_space or not found.pre_tokenizer.use_regex:
        return "its pre-tokenizer puts a space in front, or does not split text into words"
    if found.model.byte_fallback or found.model.ignore_merges:
        return "its model has byte_fallback or ignore_merges, which these models do without"
    ids = sorted(words.values())
    if ids != list(range(len(ids))):
        return f"the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}, each once"
    top = max([len(ids) - 1, *(token.id for token in added)])
    if top >= vocab:
        return f"holds token id {top}, but the model knows {vocab} tokens; another tokenizer?"
    absent = [letter for letter in _LETTERS if letter not in words]
    if absent:
        return f"{len(absent)} of the {len(_LETTERS)} bytes that text is made of have no token, {absent[0]!r} for one"
    following, seen = len(ids), set[str]()
    for token in added:  # the library numbers them itself, in order: the file must say the same
        expected = words.get(token.content, following)
        if token.content in seen or token.id != expected:
            return f"added token {token.content[:40]!r} has id {token.id}, expected {expected} and each token once"
        if token.single_word or token.lstrip or token.rstrip:
            return f"added token {token.content[:40]!r} takes the blanks beside it, or whole words alone"
        seen.add(token.content)
        following += token.content not in words
    return _flaw_of_merges(found)


def _flaw_of_merges(found: _File) -> str | None:
    words, merges = found.model.vocab, found.model.merges
    if len(merges) > len(words):
        return f"{len(merges)} merges for {len(words)} tokens"
    control = {token.content for token in found.added_tokens if not token.content.isspace()}
    for number, merge in enumerate(merges, 1):
        left, right = merge.partition(" ")[::2] if isinstance(merge, str) else merge
        if left not in words or right not in words or (whole := left + right) not in words:
            return f"merge {number} ({str(merge)[:60]!r}) is not of two tokens into a third"
        if whole in control:
            return f"merge {number} makes the control token {whole[:40]!r} of ordinary text"
    return None


def _letters() -> tuple[str, ...]:
    """Return the letters that stand for the bytes of UTF-8, as byte-level tokenizers write them.

    Source: GPT-2's encoder. Printable bytes stand for themselves, the others for letters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}  # in no UTF-8
    return tuple(letters[byte] for byte in range(256) if byte not in never)


_LETTERS = _letters()
