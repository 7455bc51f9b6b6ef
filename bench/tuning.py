"""Tuning of kernel tile sizes on a GPU: each candidate is compared with the reference before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cobra_edge.bench.spread import Spread
from cobra_edge.decode.cuda.kernels.tiles import Tile, sizes_for, trying
from cobra_edge.errors import CobraEdgeError, InputError

from .tile_cases import Call, Case, Grid

# Returns the seconds of each piece of work, timed in alternation.
Timer = Callable[[Sequence[Callable[[], object]]], list[Spread]]
# Returns a repeatable form of some work, such as a captured graph.
Prepare = Callable[[Callable[[], None]], Callable[[], object]]
_MANY_TOKENS = 1 << 30
_LARGEST_RMS = 2e-3  # float16 results differ by 5e-4; a kernel that is cut wrongly by far more
_WORTH = 0.02  # what is faster by less than that may be so by chance: the row there is stays


@dataclass(frozen=True)
class Tried:
    """One candidate: its sizes, the seconds that the case took, or why it was refused."""

    sizes: dict[str, int]
    seconds: Spread | None
    refused: str | None = None


def tune(
    case: Case, candidates: Sequence[Mapping[str, int]], timer: Timer, prepare: Prepare, device: torch.device
) -> list[Tried]:
    """Check and time candidates; the first of the result is what the table says now.

    Args:
        case: what is called.
        candidates: sizes.
        timer, prepare: how it is timed.
        device: of the case's tensors.
    """
    now = dict(sizes_for(case.kernel, device, case.bits, case.max_tokens or _MANY_TOKENS))
    unique = [now, *(dict(c) for c in candidates if dict(c) != now)]
    reasons = [_refused(case, sizes) for sizes in unique]
    works: list[Callable[[], None]] = []
    prepared: list[Callable[[], object]] = []
    for index, sizes in enumerate(unique):
        if reasons[index] is None:
            try:
                works.append(_work(case, sizes))
                prepared.append(prepare(works[-1]))
            except RuntimeError as error:
                reasons[index] = _first_line(error)
    taken = iter(timer(prepared))
    return [Tried(s, next(taken) if r is None else None, r) for s, r in zip(unique, reasons, strict=True)]


def best(tried: Sequence[Tried]) -> Tried | None:
    """Return the fastest, or the first, which is in use, where nothing is faster beyond chance; None where all were refused."""
    able = [t for t in tried if t.seconds is not None]
    if not able:
        return None
    fastest = min(able, key=_median)
    in_use = able[0] if able[0] is tried[0] else None
    return in_use if in_use is not None and _median(fastest) > (1 - _WORTH) * _median(in_use) else fastest


def fastest_first(tried: Sequence[Tried]) -> list[Tried]:
    """Return those that were timed, by their median."""
    return sorted((t for t in tried if t.seconds is not None), key=_median)


def rows_of(found: Sequence[tuple[Case, Sequence[Tried]]], capability: str) -> list[Tile]:
    """Return the rows of tiles.toml for what was found; none for a case that refused everything."""
    chosen = [(case, best(tried)) for case, tried in found]
    return [Tile(c.kernel, b.sizes, c.bits, c.max_tokens, capability) for c, b in chosen if b is not None]


def complete(rows: Sequence[Tile], grids: Sequence[Grid], device: torch.device) -> list[Tile]:
    """Add, for a kernel of which only some numbers of tokens were tuned, the others' rows as they are.

    A GPU's own row goes before every other, so without them it would be taken for all numbers of tokens.
    """
    found = {(row.kernel, row.bits, row.max_tokens): row for row in rows}
    for row in rows:
        for grid in grids:
            key = row.kernel, row.bits, grid.max_tokens
            if grid.kernel == row.kernel and key not in found:
                sizes = dict(sizes_for(row.kernel, device, row.bits, grid.max_tokens or _MANY_TOKENS))
                found[key] = Tile(row.kernel, sizes, row.bits, grid.max_tokens, row.capability)
    return list(found.values())


def _median(tried: Tried) -> float:
    assert tried.seconds is not None
    return tried.seconds.median


def _work(case: Case, sizes: Mapping[str, int]) -> Callable[[], None]:
    """Return all calls of a case as one; it has to live as long as a graph of it is used, for the tensors are its."""
    with trying(case.kernel, sizes):
        calls = [(call, call.for_kernel()) for call in case.calls()]

    def work() -> None:
        with trying(case.kernel, sizes):
            for call, arguments in calls:
                case.function(*arguments, **call.keywords)

    return work


def _refused(case: Case, sizes: Mapping[str, int]) -> str | None:
    """Say why a candidate cannot be taken: it cannot run, or does not do what its reference does. Or None."""
    try:
        with trying(case.kernel, sizes), torch.inference_mode():
            torch.manual_seed(0)
            for call in case.calls()[: case.checked]:
                distance = _distance(case, call)
                if not distance <= _LARGEST_RMS:  # NaN is not
                    return f"differs from its reference by {distance:.2g}"
    except (CobraEdgeError, RuntimeError, ValueError, AssertionError) as error:  # Triton's own are among them
        return _first_line(error)
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "triton":
            raise
        return _first_line(error)
    return None


def _distance(case: Case, call: Call) -> float:
    """Return how far a kernel is from its reference, as the largest relative RMS of any tensor that it was given."""
    mine, references = call.copy(), call.copy()
    case.function(*mine.for_kernel(), **call.keywords)
    case.reference(*references.for_reference(), **call.keywords)
    distances = [_relative_rms(a.double(), b.double()) for a, b in zip(mine.tensors(), references.tensors(), strict=True)]
    return math.nan if any(math.isnan(d) for d in distances) else max(distances)


def _relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    size = expected.square().mean().sqrt()
    return float((got - expected).square().mean().sqrt() / size.clamp_min(1e-30))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def write_rows(file: Path, capability: str, rows: Sequence[Tile]) -> None:
    """Put a GPU's rows into the table of tiles, in place of those it had for the same kernel, bits and tokens.

    Comments and other rows stay as they are.

    Args:
        file: tiles.toml.
        capability: of the GPU.
        rows: what was found; their capability is the GPU's.

    Raises:
        InputError: not such a file, or it cannot be written.
    """
    import tomlkit

    try:
        document = tomlkit.parse(file.read_text(encoding="utf-8"))
        table = document["tile"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file}: not a table of tiles ({error})") from error
    assert isinstance(table, tomlkit.items.AoT)
    found = {(row.kernel, row.bits, row.max_tokens) for row in rows}
    for index in reversed(range(len(table))):
        if table[index].get("capability") == capability and _key(table[index]) in found:
            del table[index]
    for row in rows:
        assert row.capability == capability
        entry, sizes = tomlkit.table(), tomlkit.inline_table()
        sizes.update(row.sizes)
        entry.update({"kernel": row.kernel, "capability": capability})
        entry.update({key: value for key in ("bits", "max_tokens") if (value := getattr(row, key))})
        entry["sizes"] = sizes
        entry.add(tomlkit.nl())
        table.append(entry)
    try:
        file.write_text(tomlkit.dumps(document), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error}); give another --out") from error


def _key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["kernel"], row.get("bits", 0), row.get("max_tokens", 0)
