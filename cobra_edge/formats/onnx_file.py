"""Validate an ONNX file before a runtime parses it: only plain arithmetic on tensors listed in the manifest is allowed.

A graph is a program. It could loop forever, read unlisted files next to it, or call custom libraries. So the protobuf is parsed
here first: only operators that exports write, no subgraphs, functions or other domains, every tensor of its declared size,
external data inside the files that the manifest lists. Weights are not read. Source: onnx.proto, IR version 10; protobuf's
encoding.

Left to the runtime: whether shapes match, and how long a graph of allowed operators takes.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ..errors import BundleError

# Operators that cobra_edge.vision.graph writes for the published encoders and projectors, int8 included; then those of other
# activations, poolings and position embeddings of timm's encoders, and those that other versions of the exporter leave
# unfolded.
OPERATORS = frozenset((
    "Add", "Cast", "Concat", "Conv", "Div", "Erf", "Gather", "GatherND", "LayerNormalization", "MatMul", "Mul", "ReduceMean",
    "Reshape", "Slice", "Softmax", "Split", "Transpose", "Unsqueeze", "Where", "DequantizeLinear", "QuantizeLinear",
    "AveragePool", "Clip", "Constant", "Equal", "Expand", "Flatten", "Gelu", "Gemm", "GlobalAveragePool", "HardSwish",
    "Identity", "Max", "Min", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sqrt", "Squeeze", "Sub", "Tanh",
))  # fmt: skip
_MOST_FIELDS = 4_000_000  # a graph of 2,000 nodes has some 100,000
_MOST_WINDOW = 4096  # kernels, strides and pads
_WINDOWED = ("Conv", "AveragePool")
_VARINT, _EIGHT_BYTES, _SPAN, _FOUR_BYTES = 0, 1, 2, 5  # wire types

Span = tuple[int, int]  # start and end offset in the file
_Fields = dict[int, list[int | Span]]

# For each message: {field number: (its wire types, whether it may repeat)}. Unknown fields are refused.
_TEXT, _TEXTS = ((_SPAN,), False), ((_SPAN,), True)
_NUMBER, _NUMBERS = ((_VARINT,), False), ((_VARINT, _SPAN), True)
_MODEL = {1: _NUMBER, 2: _TEXT, 3: _TEXT, 4: _TEXT, 5: _NUMBER, 6: _TEXT, 7: _TEXT, 8: _TEXTS, 14: _TEXTS}
_GRAPH = {1: _TEXTS, 2: _TEXT, 5: _TEXTS, 10: _TEXT, 11: _TEXTS, 12: _TEXTS, 13: _TEXTS, 16: _TEXTS}
_NODE = {1: _TEXTS, 2: _TEXTS, 3: _TEXT, 4: _TEXT, 5: _TEXTS, 6: _TEXT, 7: _TEXT, 9: _TEXTS}
_FLOATS = ((_FOUR_BYTES, _SPAN), True)
_ATTRIBUTE = {
    **{1: _TEXT, 2: ((_FOUR_BYTES,), False), 3: _NUMBER, 4: _TEXT, 5: _TEXT, 7: _FLOATS, 8: _NUMBERS, 9: _TEXTS, 13: _TEXT},
    20: _NUMBER,
}
_TENSOR = {
    **{1: _NUMBERS, 2: _NUMBER, 4: _FLOATS, 5: _NUMBERS, 7: _NUMBERS, 8: _TEXT, 9: _TEXT, 10: ((_EIGHT_BYTES, _SPAN), True)},
    **{12: _TEXT, 13: _TEXTS, 14: _NUMBER, 16: _TEXTS},
}
_ENTRY = {1: _TEXT, 2: _TEXT}
_VALUE, _TYPE, _TENSOR_TYPE = {1: _TEXT, 2: _TEXT, 3: _TEXT, 4: _TEXTS}, {1: _TEXT, 6: _TEXT}, {1: _NUMBER, 2: _TEXT}
_SHAPE, _DIMENSION = {1: _TEXTS}, {1: _NUMBER, 2: _TEXT, 3: _TEXT}

# {TensorProto.DataType: (bytes per element, the field that may hold the values instead of raw_data)}
_TYPES = {1: (4, 4), 2: (1, 5), 3: (1, 5), 6: (4, 5), 7: (8, 7), 9: (1, 5), 10: (2, 5), 11: (8, 10), 16: (2, 5)}
_RAW, _EXTERNAL, _LOCATION = 9, 13, 14


class _Flaw(Exception):
    """The file is invalid; the message says why."""


def require_plain_graph(file: Path, data_files: Mapping[str, int]) -> None:
    """Validate a vision graph.

    Args:
        file: the graph.
        data_files: {name: size in bytes} of the external data files that it may use.

    Raises:
        BundleError: not ONNX, or more than plain arithmetic on tensors of their declared sizes.
    """
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
        ):
            _Graph(view, data_files).check()
    except _Flaw as flaw:
        raise BundleError(f"{file}: {flaw}; exports never write such a graph, do not use this bundle") from flaw
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise BundleError(f"{file}: cannot be read ({error}); export the bundle again") from error


class _Graph:
    """A parser that reads the file once."""

    def __init__(self, view: memoryview, data_files: Mapping[str, int]) -> None:
        self._view, self._data_files, self._fields_left = view, data_files, _MOST_FIELDS

    def check(self) -> None:
        model = self._fields((0, len(self._view)), _MODEL, "model")
        if 7 not in model:
            raise _Flaw("it has no graph")
        graph = self._fields(_span(model[7][0]), _GRAPH, "graph")
        for tensor in graph.get(5, []):
            self._check_tensor(_span(tensor))
        for node in graph.get(1, []):
            self._check_node(_span(node))
        for what, ends in (("input", graph.get(11, [])), ("output", graph.get(12, []))):
            if len(ends) != 1:
                raise _Flaw(f"it has {len(ends)} {what}s, expected one")
            self._check_end(_span(ends[0]), what)

    def _check_node(self, span: Span) -> None:
        node = self._fields(span, _NODE, "node")
        operator, domain = self._text(node, 4), self._text(node, 7)
        if domain not in ("", "ai.onnx"):
            raise _Flaw(f"it has an operator of the domain {domain[:80]!r}")
        if operator not in OPERATORS:
            raise _Flaw(f"it has the operator {operator[:80]!r}")
        for entry in node.get(5, []):
            attribute = self._fields(_span(entry), _ATTRIBUTE, f"attribute of {operator}")
            for tensor in attribute.get(5, []):
                self._check_tensor(_span(tensor))
            if operator in _WINDOWED and any(n > _MOST_WINDOW for n in self._numbers(attribute, 8)):
                raise _Flaw(f"it has a {operator} with a kernel, stride or pad of more than {_MOST_WINDOW}")

    def _check_tensor(self, span: Span) -> None:
        tensor = self._fields(span, _TENSOR, "tensor")
        name, kind = self._text(tensor, 8), _number(tensor, 2)
        if kind not in _TYPES:
            raise _Flaw(f"tensor {name[:80]!r} has the data type {kind}")
        (item_bytes, typed), dims = _TYPES[kind], list(self._numbers(tensor, 1))
        if any(d >= 1 << 31 for d in dims):
            raise _Flaw(f"tensor {name[:80]!r} has the shape {dims[:9]}")
        elements = math.prod(dims)
        expected = elements * item_bytes
        if _number(tensor, _LOCATION) == 1:
            self._check_external(tensor, name, expected)
            return
        if _RAW in tensor:
            start, end = _span(tensor[_RAW][0])
            found = end - start
        else:
            found = self._count(tensor, typed) * item_bytes
        if found != expected or _EXTERNAL in tensor:
            raise _Flaw(f"tensor {name[:80]!r} of shape {dims[:9]} holds {found} bytes, expected {expected}")

    def _check_external(self, tensor: _Fields, name: str, expected: int) -> None:
        entries = [self._fields(_span(entry), _ENTRY, "external data") for entry in tensor.get(_EXTERNAL, [])]
        place = {self._text(entry, 1): self._text(entry, 2) for entry in entries}
        location, numbers = place.get("location", ""), [place.get("offset", "0"), place.get("length", "")]
        if location not in self._data_files:
            raise _Flaw(f"tensor {name[:80]!r} is in {location[:80]!r}, which the manifest does not list")
        if len(place) != len(entries) or not all(n.isascii() and n.isdigit() and len(n) < 20 for n in numbers):
            raise _Flaw(f"tensor {name[:80]!r} has no offset and length in {location}")
        offset, length = map(int, numbers)
        if length != expected or offset + length > self._data_files[location]:
            raise _Flaw(
                f"tensor {name[:80]!r} is {length} bytes at {offset} of {location}, which has {self._data_files[location]}; "
                f"expected {expected}"
            )

    def _check_end(self, span: Span, what: str) -> None:
        kind: _Fields = self._fields(span, _VALUE, what)
        for number, message in ((2, _TYPE), (1, _TENSOR_TYPE), (2, _SHAPE)):
            if number not in kind:
                raise _Flaw(f"its {what} is not a tensor of known shape")
            kind = self._fields(_span(kind[number][0]), message, what)
        dims = [_number(self._fields(_span(d), _DIMENSION, what), 1) for d in kind.get(1, [])]
        if any(not 0 < d < 1 << 31 for d in dims):
            raise _Flaw(f"its {what} has the shape {dims[:9]}, expected fixed sizes")

    def _count(self, tensor: _Fields, number: int) -> int:
        """Return the number of values of a repeated field, packed or not."""
        total = 0
        for value in tensor.get(number, []):
            if isinstance(value, int):
                total += 1
                continue
            start, end = value
            size = {4: 4, 10: 8}.get(number)
            if size is None:  # varints end with a byte below 128
                total += int(np.count_nonzero(np.frombuffer(self._view[start:end], np.uint8) < 0x80))
            else:
                total += (end - start) // size
        return total

    def _numbers(self, fields: _Fields, number: int) -> Iterator[int]:
        for value in fields.get(number, []):
            if isinstance(value, int):
                yield value
                continue
            at, end = value
            while at < end:
                self._spend()
                found, at = self._varint(at, end)
                yield found

    def _text(self, fields: _Fields, number: int) -> str:
        if number not in fields:
            return ""
        start, end = _span(fields[number][0])
        if end - start > 4096:
            raise _Flaw(f"it has a name of {end - start} bytes")
        try:
            return bytes(self._view[start:end]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Flaw("it has a name that is not UTF-8") from error

    def _fields(self, span: Span, known: Mapping[int, tuple[tuple[int, ...], bool]], what: str) -> _Fields:
        """Return the fields of a message: numbers, or the spans of strings, messages and packed numbers."""
        at, end = span
        found: _Fields = {}
        while at < end:
            self._spend()
            key, at = self._varint(at, end)
            number, wire = key >> 3, key & 7
            wires, again = known.get(number, ((), False))
            if wire not in wires:
                raise _Flaw(f"unexpected protobuf: a {what} has a field {number} of wire type {wire}")
            if number in found and not again:
                raise _Flaw(f"unexpected protobuf: a {what} has field {number} twice")
            value: int | Span
            if wire == _VARINT:
                value, at = self._varint(at, end)
            else:
                length = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(wire)
                if length is None:
                    length, at = self._varint(at, end)
                if length > end - at:
                    raise _Flaw(f"not ONNX, or truncated: a {what} has a field of {length} bytes where {end - at} are left")
                value = (at, at + length) if wire == _SPAN else 0  # values of floats are not checked
                at += length
            found.setdefault(number, []).append(value)
        return found

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._view[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise _Flaw("not ONNX, or truncated: an unterminated number")

    def _spend(self) -> None:
        self._fields_left -= 1
        if self._fields_left < 0:
            raise _Flaw(f"it has more than {_MOST_FIELDS:,} fields")


def _span(value: int | Span) -> Span:
    assert not isinstance(value, int)  # ensured by the tables of fields
    return value


def _number(fields: _Fields, number: int) -> int:
    value = fields.get(number, [0])[0]
    assert isinstance(value, int)
    return value
