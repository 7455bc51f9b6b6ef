"""Strict parsing of third-party JSON: required fields are checked for presence and type, others are ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from ...errors import InputError
from ...files.parsing import ParseError, parse_json, without_mark

T = TypeVar("T")

Text = Annotated[str, msgspec.Meta(pattern=r"\S")]
ImageName = Annotated[str, msgspec.Meta(pattern=r"^[^/\\\x00-\x1f]+$", description="a file in the directory of images")]


def read_json(file: Path, kind: type[T]) -> T:
    """Decode a file. Raises InputError with the path of the invalid record."""
    try:
        return parse_json(_bytes_of(file), kind)
    except ParseError as error:
        raise InputError(f"{file}: {error}; is it the file that this benchmark reads?") from error


def read_json_by_key(file: Path, kind: type[T]) -> Iterator[tuple[str, T]]:
    """Yield the keys and values of a file that is one object. Raises InputError with the key; also for a repeated key."""
    raw = read_json(file, dict[str, msgspec.Raw])
    _require_unique_keys(file)
    for key, text in raw.items():
        try:
            yield key, parse_json(bytes(text), kind)
        except ParseError as error:
            raise InputError(f"{file}, {key!r}: {error}; is it the file that this benchmark reads?") from error


def read_json_lines(file: Path, kind: type[T]) -> Iterator[tuple[int, T]]:
    """Yield the number of each nonempty line, from 1, and its value. Raises InputError with the number."""
    for number, text in enumerate(_bytes_of(file).split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            yield number, parse_json(text, kind)
        except ParseError as error:
            raise InputError(f"{file}, line {number}: {error}; is it the file that this benchmark reads?") from error


def _require_unique_keys(file: Path) -> None:
    """Raise InputError if an object repeats a key, of which msgspec returns the last."""

    def unique(pairs: list[tuple[str, object]]) -> None:
        seen = set[str]()
        for key, _ in pairs:
            if key in seen:
                raise InputError(f"{file}: key {key!r} is repeated in one object; expected each once")
            seen.add(key)

    try:
        json.loads(_bytes_of(file), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: {error}") from error


def _bytes_of(file: Path) -> bytes:
    try:
        return without_mark(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
