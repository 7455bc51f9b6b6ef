"""JSON, JSON lines and TOML, decoded in one place: a byte order mark is skipped, and errors begin with our own words.

Windows editors and PowerShell write a mark in front of UTF-8, or UTF-16 altogether. The first is read. The second is named:
guessing encodings ends in text that nobody wrote.
"""

from __future__ import annotations

import codecs
import sys
from typing import Any, TypeVar, overload

import msgspec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Kind = TypeVar("Kind")

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class ParseError(ValueError):
    """Content that cannot be parsed. The text says why and may follow a file's name: "not UTF-8 (…)", "not JSON (…)"."""


def without_mark(content: bytes) -> bytes:
    """Return content without the byte order mark of UTF-8, where it begins with one."""
    return content.removeprefix(codecs.BOM_UTF8)


def utf8_text(content: bytes) -> str:
    """Return the text of UTF-8, with or without a byte order mark.

    Raises:
        ParseError: it is not UTF-8.
    """
    if content.startswith(_UTF16):
        raise ParseError("not UTF-8 but UTF-16; save it as UTF-8")
    try:
        return without_mark(content).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ParseError(f"not UTF-8 (byte {error.start}: {error.reason})") from error


@overload
def parse_json(content: bytes, kind: type[Kind]) -> Kind: ...
@overload
def parse_json(content: bytes, kind: Any = Any) -> Any: ...
def parse_json(content: bytes, kind: Any = Any) -> Any:
    """Return what JSON says, as a value of `kind`.

    Args:
        content: UTF-8, with or without a byte order mark.
        kind: what it must be, as msgspec takes types.

    Raises:
        ParseError: not UTF-8, not JSON, or not of this kind.
    """
    try:
        return msgspec.json.decode(without_mark(content), type=kind)
    except msgspec.ValidationError as error:
        utf8_text(content)  # which is the first thing to know
        raise ParseError(f"does not match the schema ({error})") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        utf8_text(content)
        raise ParseError(f"not JSON ({error})") from error


def parse_toml(content: bytes) -> dict[str, Any]:
    """Return what TOML says.

    Args:
        content: UTF-8, with or without a byte order mark.

    Raises:
        ParseError: not UTF-8, or not TOML.
    """
    try:
        return tomllib.loads(utf8_text(content))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ParseError(f"not TOML ({error})") from error
