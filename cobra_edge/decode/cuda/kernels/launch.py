"""One door through which every kernel is launched, so that launches can be recorded instead of run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch as it was asked for.

    Attributes:
        kernel: the Triton function.
        grid: how many programs, along up to three axes.
        arguments: tensors and numbers, in the kernel's order.
        constants: its constexpr parameters, and Triton's own options such as num_warps.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a Triton kernel on the current stream, or note it where launches are recorded."""
    recorded = _recorded.get()
    if recorded is None:
        kernel[grid](*arguments, **constants)
    else:
        recorded.append(Launch(kernel, grid, arguments, constants))


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note launches in the list given and run none: tensors on torch's "meta" device do, and no GPU is needed."""
    launches: list[Launch] = []
    before = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(before)
