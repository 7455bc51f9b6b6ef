"""What a tuning calls: each kernel at full size as a decoder calls it, beside its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import torch

from cobra_edge.decode.cuda.kernels import conv_step as step_input
from cobra_edge.decode.cuda.kernels import convolution, norm, scan
from cobra_edge.decode.cuda.kernels import gemm as products_many
from cobra_edge.decode.cuda.kernels import gemv as products_one
from cobra_edge.decode.cuda.kernels import selective_state_update as step_recurrence
from cobra_edge.decode.cuda.kernels.tiles import TILES
from cobra_edge.decode.cuda.weights import GpuWeights
from cobra_edge.formats.targets import read_toml

GRID = TILES.with_name("tile_grid.toml")
_LONG_PROMPT = 768  # stands for any number of tokens


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One grid: a kernel, the row of tiles.toml that it is for, and what to try of each size."""

    kernel: str
    sizes: dict[str, list[int]]
    max_tokens: int = 0

    def candidates(self) -> list[dict[str, int]]:
        """Return every combination."""
        return [dict(zip(self.sizes, values, strict=True)) for values in product(*self.sizes.values())]


class _Grids(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    grid: list[Grid]


def grids(file: Path = GRID) -> list[Grid]:
    """Return the grids of a file. Raises InputError when it is not one."""
    return read_toml(file, _Grids).grid


@dataclass(frozen=True, eq=False)
class Addressed:
    """A state that a kernel finds through its address, and the reference is given itself."""

    tensor: torch.Tensor

    @property
    def cell(self) -> torch.Tensor:
        """The address, (1,) int64."""
        return torch.tensor([self.tensor.data_ptr()], device=self.tensor.device)


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of a kernel and of its reference, which write into some of them."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def for_kernel(self) -> tuple[Any, ...]:
        """Return the arguments with addresses in place of states."""
        return tuple(a.cell if isinstance(a, Addressed) else a for a in self.arguments)

    def for_reference(self) -> tuple[Any, ...]:
        """Return the arguments with the states themselves."""
        return tuple(a.tensor if isinstance(a, Addressed) else a for a in self.arguments)

    def tensors(self) -> list[torch.Tensor]:
        """Return what may have been written to."""
        return [a for a in self.for_reference() if isinstance(a, torch.Tensor)]

    def copy(self) -> Call:
        """Return the same with tensors of its own; matrices are shared."""
        return Call(tuple(_copied(a) for a in self.arguments), self.keywords)


def _copied(argument: Any) -> Any:
    if isinstance(argument, Addressed):
        return Addressed(argument.tensor.clone())
    return argument.clone() if isinstance(argument, torch.Tensor) else argument


@dataclass(frozen=True, eq=False)
class Case:
    """A row of tiles.toml to be found.

    Attributes:
        kernel, bits, max_tokens: of the row.
        function, reference: to be called alike.
        calls: makes arguments for both, those of every layer, so that each finds weights which no cache has kept. They may
            depend on the sizes that are tried, so they are made for each.
        checked: how many of them, from the first, are held against the reference.
    """

    kernel: str
    bits: int
    max_tokens: int
    function: Callable[..., None]
    reference: Callable[..., None]
    calls: Callable[[], list[Call]]
    checked: int = 1

    @property
    def title(self) -> str:
        """What a person calls it."""
        bits = f", {self.bits} bits" if self.bits else ""
        return f"{self.kernel}{bits}{f', up to {self.max_tokens} tokens' if self.max_tokens else ''}"


class Cases:
    """The cases of a decoder's weights."""

    def __init__(self, weights: GpuWeights) -> None:
        """Take weights on a GPU, on a processor for tests, or on "meta" to record."""
        self._weights, self._config, self._device = weights, weights.config, weights.device
        self._bits = weights.layers[0].in_proj.bits

    def of(self, kernel: str, max_tokens: int) -> Case:
        """Return the case of a row. Raises KeyError for a kernel that is in no table here."""
        makers: dict[str, Callable[[int], Case]] = {
            "multiply_one": self._multiply_one,
            "convolve_and_project": self._convolve_and_project,
            "recur_and_gate": self._recur_and_gate,
            "multiply_many": self._multiply_many,
            "scan_many": self._scan_many,
            "convolve_many": self._convolve_many,
            "rms_norm_many": self._rms_norm_many,
        }
        return makers[kernel](max_tokens)

    def _random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=self._device).to(dtype)

    def _states(self, width: int) -> Addressed:
        return Addressed(self._random(self._config.n_layer, self._config.d_inner, width))

    def _multiply_one(self, _max_tokens: int) -> Case:
        c, weights = self._config, self._weights

        def calls() -> list[Call]:
            residual, xz, y, logits = (self._random(n) for n in (c.d_model, 2 * c.d_inner, c.d_inner, c.vocab))
            found = [Call((weights.head, residual, logits), {"norm": weights.norm_f, "eps": c.norm_eps})]
            for layer in weights.layers:
                found.append(Call((layer.in_proj, residual, xz), {"norm": layer.norm, "eps": c.norm_eps}))
                found.append(Call((layer.out_proj, y, residual), {"add": True}))
            return found

        one = products_one
        return Case("multiply_one", self._bits, 0, one.multiply_one, one.multiply_one_reference, calls, 3)

    def _convolve_and_project(self, _max_tokens: int) -> Case:
        c = self._config

        def calls() -> list[Call]:
            states, xz, u = self._states(c.d_conv), self._random(2 * c.d_inner), self._random(c.d_inner)
            partials = self._random(step_input.n_slices(self._weights.layers[0].x_proj), c.dt_rank + 2 * c.d_state)
            return [
                Call((layer.x_proj, xz, states, index, layer.taps, layer.conv_bias, u, partials))
                for index, layer in enumerate(self._weights.layers)
            ]

        it = step_input
        bits = self._weights.layers[0].x_proj.bits
        return Case("convolve_and_project", bits, 0, it.convolve_and_project, it.convolve_and_project_reference, calls)

    def _recur_and_gate(self, _max_tokens: int) -> Case:
        c = self._config

        def calls() -> list[Call]:
            states, xz = self._states(c.d_state), self._random(2 * c.d_inner)
            u, y = self._random(c.d_inner), self._random(c.d_inner)
            partials = self._random(step_input.n_slices(self._weights.layers[0].x_proj), c.dt_rank + 2 * c.d_state)
            return [
                Call((partials, layer.dt_proj.codes, layer.dt_bias, layer.A, layer.D, xz, u, states, index, y))
                for index, layer in enumerate(self._weights.layers)
            ]

        it = step_recurrence
        return Case("recur_and_gate", 0, 0, it.recur_and_gate, it.recur_and_gate_reference, calls)

    def _multiply_many(self, max_tokens: int) -> Case:
        tokens = max_tokens or _LONG_PROMPT
        c, half, single = self._config, torch.float16, torch.float32

        def calls() -> list[Call]:
            normed, u = self._random(tokens, c.d_model, dtype=half), self._random(tokens, c.d_inner, dtype=half)
            xz, residual = self._random(tokens, 2 * c.d_inner, dtype=half), self._random(tokens, c.d_model, dtype=single)
            projected = self._random(tokens, c.dt_rank + 2 * c.d_state)
            found = []
            for layer in self._weights.layers:
                found.append(Call((layer.in_proj, normed, xz)))
                found.append(Call((layer.out_proj, u, residual), {"add": True}))
                if layer.x_proj.bits == self._bits:
                    found.append(Call((layer.x_proj, u, projected)))
            return found

        many = products_many
        return Case("multiply_many", self._bits, max_tokens, many.multiply_many, many.multiply_many_reference, calls, 3)

    def _scan_many(self, _max_tokens: int) -> Case:
        c, tokens = self._config, _LONG_PROMPT if self._device.type == "cuda" else 5

        def calls() -> list[Call]:
            u, out = (self._random(tokens, c.d_inner, dtype=torch.float16) for _ in range(2))
            z = self._random(tokens, 2 * c.d_inner, dtype=torch.float16)[:, c.d_inner :]
            dt, h = self._random(tokens, c.d_inner), self._random(c.d_inner, c.d_state)
            projected = self._random(tokens, c.dt_rank + 2 * c.d_state)
            B, C = projected[:, c.dt_rank : -c.d_state], projected[:, -c.d_state :]
            return [Call((u, dt, x.A, B, C, x.D, z, x.dt_bias, h, out)) for x in self._weights.layers]

        return Case("scan_many", 0, 0, scan.scan_many, scan.scan_many_reference, calls)

    def _convolve_many(self, _max_tokens: int) -> Case:
        c = self._config

        def calls() -> list[Call]:
            x = self._random(_LONG_PROMPT, 2 * c.d_inner, dtype=torch.float16)[:, : c.d_inner]
            out, state = self._random(_LONG_PROMPT, c.d_inner, dtype=torch.float16), self._random(c.d_inner, c.d_conv)
            return [Call((x, state, layer.taps, layer.conv_bias, out)) for layer in self._weights.layers]

        it = convolution
        return Case("convolve_many", 0, 0, it.convolve_many, it.convolve_many_reference, calls)

    def _rms_norm_many(self, _max_tokens: int) -> Case:
        c = self._config

        def calls() -> list[Call]:
            x, out = self._random(_LONG_PROMPT, c.d_model), self._random(_LONG_PROMPT, c.d_model, dtype=torch.float16)
            return [Call((x, layer.norm, c.norm_eps, out)) for layer in self._weights.layers]

        return Case("rms_norm_many", 0, 0, norm.rms_norm_many, norm.rms_norm_many_reference, calls)
