"""Predicted decoding speed, its sources, and the same calculation compared with published measurements, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cobra_edge.bench.tables import Table
from cobra_edge.formats.targets import target_named

from .speed_model import SCHEMES_SHOWN, Checked, Efficiency, Prediction, checked, devices, efficiency_of, predict, shape_config


def predictions(
    shape: str, schemes: Sequence[str], names: Sequence[str], results: Sequence[dict[str, Any]]
) -> list[Prediction]:
    """Return a prediction for each device and scheme, devices first. Raises InputError for unknown names."""
    config = shape_config(shape)
    found = {scheme: efficiency_of(scheme, results) for scheme in schemes}
    return [predict(target, scheme, config, found[scheme]) for target in devices(names) for scheme in schemes]


def rate_cell(p: Prediction) -> str:
    """Return the predicted rate, and whether the model does not fit."""
    return span(*p.tokens_per_second, ".0f") + (", does not fit" if p.lacks else "")


def span(low: float, high: float, form: str) -> str:
    """Return "low–high", or one number if both are formatted alike."""
    ends = dict.fromkeys((f"{low:{form}}", f"{high:{form}}"))
    return "–".join(ends)


def sources(found: Sequence[Prediction]) -> Iterator[str]:
    """Yield a sentence for each efficiency: the schemes it applies to, their bytes per token, and its source."""
    by_efficiency: dict[Efficiency, dict[str, str]] = {}
    for p in found:
        moved = f"{p.scheme} moves {p.token_bytes / 1e9:.2f} GB per token in {p.launches} launches"
        by_efficiency.setdefault(p.efficiency, {})[p.scheme] = moved
    for efficiency, schemes in by_efficiency.items():
        share = span(efficiency.low, efficiency.high, ".0%")
        yield f"{'; '.join(schemes.values())}; at {share} of the data sheet's bandwidth ({efficiency.known_from})."


def off_cell(c: Checked) -> str:
    """Return how far a measurement lies outside the prediction."""
    return "within" if c.off == 0 else f"{abs(c.off):.1%} {'slower' if c.off > 0 else 'faster'}"


def target_table(found: Sequence[Prediction], title: str) -> Table:
    """Return one row per device and scheme."""
    rows = [[p.target, p.scheme, f"{p.token_bytes / 1e9:.2f}", str(p.launches), rate_cell(p)] for p in found]
    columns = ["target", "scheme", "GB per token", "launches", "predicted tok/s"]
    return Table(columns, rows, title, list(sources(found)))


def prediction_table(results: Sequence[dict[str, Any]], shape: str = "cobra-3b") -> Table:
    """Return predicted rates with a column for each scheme."""
    found = predictions(shape, SCHEMES_SHOWN, (), results)
    by_target: dict[str, list[Prediction]] = {}
    for p in found:
        by_target.setdefault(p.target, []).append(p)
    rows = []
    for name, row in by_target.items():
        target = target_named(name)
        rows.append([target.title, f"{target.memory_bandwidth_gb_s:g}", *map(rate_cell, row)])
    columns = ["device", "GB/s, data sheet", *(f"{s}, predicted tok/s" for s in SCHEMES_SHOWN)]
    return Table(columns, rows, notes=[" ".join(sources(found))])


def published_table() -> Table:
    """Return published measurements and the predictions for them."""
    rows = []
    for c in checked():
        device = target_named(c.known.target).title
        rows.append([c.known.what, device, f"{c.known.ms:.1f}", span(c.low_ms, c.high_ms, ".1f"), off_cell(c)])
    return Table(["published measurement", "device", "ms per token, measured", "ms per token, predicted", ""], rows)
