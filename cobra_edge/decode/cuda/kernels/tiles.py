"""How kernels cut their work: tiles.toml, a table by kernel, bits of a weight, tokens and compute capability."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import msgspec
import torch

from ....formats.targets import read_toml

TILES = Path(__file__).with_name("tiles.toml")
ANY = "any"


class Tile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row of the table.

    Attributes:
        kernel: its name.
        sizes: its constexpr sizes by name, num_warps and num_stages among them.
        bits: of a weight; 0 where the kernel has none, or for all of them.
        max_tokens: it is for so many tokens or fewer; 0 for any number.
        capability: of the GPU that it was measured on, such as "9.0", or "any".
    """

    kernel: str
    sizes: dict[str, int]
    bits: int = 0
    max_tokens: int = 0
    capability: str = ANY


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tile: list[Tile]


@cache
def tiles() -> tuple[Tile, ...]:
    """Return the table's rows."""
    return tuple(read_toml(TILES, _Table).tile)


def sizes_for(kernel: str, device: torch.device, bits: int = 0, tokens: int = 0) -> Mapping[str, int]:
    """Return the sizes of the best row: the GPU's own, then for these bits, then for the fewest tokens that suffice."""
    tried = _tried.get()
    if tried is not None and tried[0] == kernel:
        return tried[1]
    return _sizes(kernel, capability_of(device), bits, tokens)


_tried: ContextVar[tuple[str, Mapping[str, int]] | None] = ContextVar("tried", default=None)


@contextmanager
def trying(kernel: str, sizes: Mapping[str, int]) -> Iterator[None]:
    """Have a kernel take other sizes than the table's: what the table is made with."""
    before = _tried.set((kernel, sizes))
    try:
        yield
    finally:
        _tried.reset(before)


@cache
def _sizes(kernel: str, capability: str, bits: int, tokens: int) -> Mapping[str, int]:
    fitting = [
        t
        for t in tiles()
        if t.kernel == kernel
        and t.capability in (ANY, capability)
        and t.bits in (0, bits)
        and (not t.max_tokens or tokens <= t.max_tokens)
    ]
    assert fitting, f"tiles.toml has no row for {kernel}, {bits} bits, {tokens} tokens"
    best = min(fitting, key=lambda t: (t.capability == ANY, t.bits == 0, t.max_tokens or 1 << 62))
    return best.sizes


@cache
def capability_of(device: torch.device) -> str:
    """Return a GPU's compute capability such as "9.0"; "any" for what is no GPU."""
    if device.type != "cuda":
        return ANY
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"
