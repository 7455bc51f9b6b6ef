"""Where each layer's tensors and state lie, as a table that launches are repeated over: see `Queue.repeat`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import count
from typing import Any

import numpy as np

from ...formats.model_config import MambaConfig
from .launch import Address, Slot
from .state import GpuState
from .weights import GpuLayer, GpuMatrix

_CELL_BYTES = 8


class LayerTable:
    """Addresses of all layers, and which layers are launched alike.

    Attributes:
        rows: (n_layer, addresses) uint64: of a layer's tensors, then of its part of the state.
        kinds: layers whose addresses are slots of a row; two layers of one kind differ in addresses alone.
        kind_of: of each layer, an index into `kinds`.
        conv, ssm: the slots of the state.
    """

    def __init__(self, layers: Sequence[GpuLayer], config: MambaConfig) -> None:
        """Take the addresses of tensors; those of a state come with `point_at`."""
        tensors = [_addresses(layer) for layer in layers]
        n = len(tensors[0])
        self.rows = np.zeros((len(layers), n + 2), np.uint64)
        self.rows[:, :n] = tensors
        self.conv, self.ssm = Slot(n * _CELL_BYTES), Slot((n + 1) * _CELL_BYTES)
        kinds = [_with_slots(layer) for layer in layers]
        self.kinds = tuple(dict.fromkeys(kinds))
        self.kind_of = tuple(self.kinds.index(kind) for kind in kinds)
        steps = np.array((config.d_conv, config.d_state), np.uint64) * np.uint64(4 * config.d_inner)
        self._into_state = np.arange(len(layers), dtype=np.uint64)[:, None] * steps

    def point_at(self, state: GpuState) -> None:
        """Have a state read and changed."""
        self.rows[:, -2:] = self._into_state + np.array((state.conv_address, state.ssm_address), np.uint64)


def _addresses(layer: GpuLayer) -> list[Address]:
    """Return a layer's addresses in the order of `GpuLayer`, of a matrix codes and scales."""
    found: list[Address] = []
    for field in fields(layer):
        value = getattr(layer, field.name)
        found += (value.codes, value.scales) if isinstance(value, GpuMatrix) else (value,)
    return found


def _with_slots(layer: GpuLayer) -> GpuLayer:
    """Return a layer with slots in place of its addresses, in the same order."""
    slots = map(Slot, count(0, _CELL_BYTES))
    there: dict[str, Any] = {}
    for field in fields(layer):
        value = getattr(layer, field.name)
        is_matrix = isinstance(value, GpuMatrix)
        there[field.name] = replace(value, codes=next(slots), scales=next(slots)) if is_matrix else next(slots)
    return replace(layer, **there)
