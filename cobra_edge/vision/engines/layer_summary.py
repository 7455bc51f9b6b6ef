"""The layers of an engine, parsed from the description that the builder logs; the library's inspector needs a GPU."""

from __future__ import annotations

import re
from collections import Counter

import msgspec

_TENSOR = re.compile(r"Dimensions: \[[^\]]*\][^{}]*?Datatype: (\w+)")
_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<rest>.*)$"
)
_IO = re.compile(
    r"^\s*Name: (?P<name>[^,]+), IOMode: (?P<mode>\w+), DataType: (?P<dtype>\w+), Dimensions: \[(?P<shape>[\d,]*)\]"
)
_SYNCHRONISATION = ("signal", "wait")


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of an engine; dtype is TensorRT's name, such as "Half"."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kernel: its name, which shows what was fused; its kind; and the dtypes of all tensors it reads and writes."""

    name: str
    kind: str
    dtypes: tuple[str, ...]


class LayerSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All layers in order, except those that only synchronize streams, with inputs and outputs."""

    layers: tuple[Layer, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def kinds(self) -> dict[str, int]:
        """Return the number of layers of each kind, most frequent first."""
        return dict(Counter(layer.kind for layer in self.layers).most_common())

    def dtypes(self) -> dict[str, int]:
        """Return the number of layers that use each dtype, most frequent first."""
        return dict(Counter(d for layer in self.layers for d in layer.dtypes).most_common())


def read_layers(text: str) -> LayerSummary:
    """Parse the builder's description. Other lines are ignored; an empty text gives an empty summary."""
    layers: list[Layer] = []
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for line in text.splitlines():
        if (io := _IO.match(line)) is not None:
            shape = tuple(int(n) for n in io["shape"].split(",") if n)
            (inputs if io["mode"] == "Input" else outputs).append(Tensor(io["name"], io["dtype"], shape))
        elif (layer := _LAYER.match(line)) is not None and layer["kind"] not in _SYNCHRONISATION:
            layers.append(Layer(layer["name"], layer["kind"], tuple(sorted(set(_TENSOR.findall(line))))))
    return LayerSummary(tuple(layers), tuple(inputs), tuple(outputs))
