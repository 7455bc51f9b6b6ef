"""Parse JSON, JSON lines and TOML: a byte order mark is skipped, and errors begin with our own message.

Windows editors and PowerShell write UTF-8 with a byte order mark, or UTF-16. The first is accepted, the second is rejected by
name, because guessed encodings produce garbled text.
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
    """Content that cannot be parsed. The message can follow a file name: "not UTF-8 (…)", "not JSON (…)"."""


def without_mark(content: bytes) -> bytes:
    """Return content without a UTF-8 byte order mark."""
    return content.removeprefix(codecs.BOM_UTF8)


def utf8_text(content: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark.

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
    """Parse JSON as a value of `kind`.

    Args:
        content: UTF-8, with or without a byte order mark.
        kind: the expected type, as for msgspec.

    Raises:
        ParseError: not UTF-8, not JSON, or not of this kind.
    """
    try:
        return msgspec.json.decode(without_mark(content), type=kind)
    except msgspec.ValidationError as error:
        utf8_text(content)  # a wrong encoding is reported first
        raise ParseError(f"does not match the schema ({error})") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        utf8_text(content)
        raise ParseError(f"not JSON ({error})") from error


def parse_toml(content: bytes) -> dict[str, Any]:
    """Parse TOML.

    Args:
        content: UTF-8, with or without a byte order mark.

    Raises:
        ParseError: not UTF-8, or not TOML.
    """
    try:
        return tomllib.loads(utf8_text(content))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ParseError(f"not TOML ({error})") from error
