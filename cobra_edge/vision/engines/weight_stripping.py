"""Engines without the weights that the graph next to them contains.

A builder copies most matrices into an engine unchanged. For those, a stripped file refers to the graph's files, and opening it
restores the engine byte for byte, verified by its hash. Unlike a refit, this needs neither a GPU nor the builder, and data that
the builder changed stay in the file.

    MAGIC   8 bytes: length of the header   header: JSON, a Header   all bytes outside pieces, in order
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ...environment.available_memory import require_memory
from ...errors import BundleError

MAGIC = b"cobra-edge engine without weights 1\n"
_HEADER_LIMIT_BYTES = 4 << 20
_PIECE_BYTES_MIN = 16 << 10  # for shorter tensors a reference does not pay
_ALIGNMENT = 32  # relative alignment of tensors in an engine, observed
_TRIED, _PROBE_BYTES = 4, 256
_CHUNK_BYTES = 64 << 20


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Bytes of an engine that are also in a file of the graph."""

    at: int
    length: int
    file: str
    offset: int


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and hash of the complete engine, and its pieces in order."""

    bytes: int
    sha256: str
    pieces: tuple[Piece, ...]


def strip_weights(engine: Path, graph: Path, stripped: Path) -> int:
    """Write an engine without the weights in the graph's files; return the bytes saved.

    Args:
        engine: a complete engine, built from `graph`.
        graph: the ONNX file, with its external data next to it.
        stripped: the file to write.
    """
    whole = _mapped(engine)
    pieces = _pieces(whole, _tensors(graph))
    header = msgspec.json.encode(Header(len(whole), hashlib.sha256(whole.data).hexdigest(), tuple(pieces)))
    with stripped.open("wb") as out:
        out.write(MAGIC + len(header).to_bytes(8, "little") + header)
        for start, end in _between(pieces, len(whole)):
            out.write(whole[start:end].data)
    return sum(p.length for p in pieces)


def restore_weights(stripped: Path, graph_files: dict[str, Path]) -> bytearray:
    """Return the complete engine.

    Args:
        stripped: a file written by `strip_weights`.
        graph_files: the files of the graph, by file name.

    Raises:
        BundleError: not such a file, damaged, or the graph's files differ from those it was made with.
        MachineError: too little memory.
    """
    data = _mapped(stripped)
    header, start = _header(stripped, data)
    sources = {name: _mapped(file) for name, file in graph_files.items()}
    _check_pieces(stripped, header, sources, len(data) - start)
    require_memory(header.bytes, "restoring the engine's weights")
    whole = bytearray(header.bytes)
    goal = np.frombuffer(whole, np.uint8)
    for piece in header.pieces:
        goal[piece.at : piece.at + piece.length] = sources[piece.file][piece.offset : piece.offset + piece.length]
    for begin, end in _between(header.pieces, header.bytes):
        goal[begin:end] = data[start : start + end - begin]
        start += end - begin
    if hashlib.sha256(whole).hexdigest() != header.sha256:
        raise BundleError(f"{stripped}: the restored engine differs from the one that was built; export the bundle again")
    return whole


def _mapped(file: Path) -> np.ndarray:
    """Return a file's bytes (n,) uint8, memory-mapped; an empty file cannot be mapped."""
    return np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)


def _between(pieces: Sequence[Piece], size: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of the ranges outside pieces."""
    last = 0
    for piece in pieces:
        yield last, piece.at
        last = piece.at + piece.length
    yield last, size


def _tensors(graph: Path) -> list[tuple[str, int, np.ndarray]]:
    """Return every tensor of the graph that is large enough: its file, its offset there, and its bytes."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    files: dict[str, np.ndarray] = {}
    found, last = [], 0
    text = graph.read_bytes() if any(t.HasField("raw_data") for t in model.graph.initializer) else b""
    for tensor in model.graph.initializer:
        name, offset, length = graph.name, 0, len(tensor.raw_data)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {e.key: e.value for e in tensor.external_data}
            name, offset, length = place["location"], int(place.get("offset", 0)), int(place.get("length", 0))
        if length < _PIECE_BYTES_MIN:
            continue
        if name == graph.name:
            offset = last = text.index(tensor.raw_data, last)
        file = files.setdefault(name, _mapped(graph.parent / name))
        found.append((name, offset, file[offset : offset + length]))
    return found


def _pieces(whole: np.ndarray, tensors: list[tuple[str, int, np.ndarray]]) -> list[Piece]:
    """Find tensors in an engine by their first eight bytes, at aligned offsets."""
    by_key: dict[int, list[tuple[str, int, np.ndarray]]] = {}
    for entry in tensors:
        by_key.setdefault(int(entry[2][:8].copy().view(np.uint64)[0]), []).append(entry)
    by_key.pop(0, None)  # zeros are too common
    keys = np.array(list(by_key), np.uint64)
    pieces: list[Piece] = []
    last = 0
    for chunk in range(_phase(whole, tensors), len(whole), _CHUNK_BYTES):
        part = whole[chunk : chunk + _CHUNK_BYTES]
        words = part[: len(part) // 8 * 8].view(np.uint64)[:: _ALIGNMENT // 8]
        for i in np.flatnonzero(np.isin(words, keys)):
            at = chunk + int(i) * _ALIGNMENT
            if at < last:
                continue
            for name, offset, content in by_key[int(words[i])]:
                if np.array_equal(whole[at : at + len(content)], content):
                    pieces.append(Piece(at, len(content), name, offset))
                    last = at + len(content)
                    break
    return pieces


def _phase(whole: np.ndarray, tensors: list[tuple[str, int, np.ndarray]]) -> int:
    """Return the offset of tensors modulo their alignment, which differs from engine to engine."""
    mapping: Any = whole.base
    if mapping is None:
        return 0
    for _, _, content in sorted(tensors, key=lambda t: -len(t[2]))[:_TRIED]:
        at = mapping.find(content[:_PROBE_BYTES].tobytes())
        if at >= 0:
            return at % _ALIGNMENT
    return 0


def _header(stripped: Path, data: np.ndarray) -> tuple[Header, int]:
    """Return the header, and the offset of the remaining bytes."""
    start = len(MAGIC) + 8
    length = int.from_bytes(data[len(MAGIC) : start].tobytes(), "little")
    if data[: len(MAGIC)].tobytes() != MAGIC or length > min(_HEADER_LIMIT_BYTES, len(data) - start):
        raise BundleError(f"{stripped}: not an engine without weights; export the bundle again")
    try:
        return msgspec.json.decode(data[start : start + length].tobytes(), type=Header), start + length
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(f"{stripped}: its header is invalid ({error}); export the bundle again") from error


def _check_pieces(stripped: Path, header: Header, sources: dict[str, np.ndarray], rest_bytes: int) -> None:
    """Raise BundleError unless the pieces are inside their files, in order, without overlap, and complete the engine."""
    last = 0
    for p in header.pieces:
        size = len(sources[p.file]) if p.file in sources else -1
        if p.length <= 0 or p.at < last or not 0 <= p.offset <= size - p.length:
            raise BundleError(f"{stripped}: refers to bytes that {p.file!r} does not have; export the bundle again")
        last = p.at + p.length
    if header.bytes < last or header.bytes - sum(p.length for p in header.pieces) != rest_bytes:
        raise BundleError(
            f"{stripped}: holds {rest_bytes} bytes besides its weights, which contradicts its header; export the bundle again"
        )
