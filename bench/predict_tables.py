"""Predicted decoding speed as Markdown (docs/results/gpu.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cobra_edge.formats.targets import target_named

from .speed_model import SCHEMES_SHOWN, Checked, Efficiency, Prediction, checked, devices, efficiency_of, predict, shape_config


def predictions(
    shape: str, schemes: Sequence[str], names: Sequence[str], results: Sequence[dict[str, Any]]
) -> list[Prediction]:
    """Return a prediction for each device and scheme, devices first. Raises InputError for names that are not known."""
    config = shape_config(shape)
    found = {scheme: efficiency_of(scheme, results) for scheme in schemes}
    return [predict(target, scheme, config, found[scheme]) for target in devices(names) for scheme in schemes]


def rate_cell(p: Prediction) -> str:
    """Write a predicted rate, and that it would not fit where it would not."""
    return span(*p.tokens_per_second, ".0f") + (", does not fit" if p.lacks else "")


def span(low: float, high: float, form: str) -> str:
    """Write two ends, or one figure where they read alike."""
    ends = dict.fromkeys((f"{low:{form}}", f"{high:{form}}"))
    return "–".join(ends)


def sources(found: Sequence[Prediction]) -> Iterator[str]:
    """Yield a sentence for each efficiency that was taken: its schemes, their bytes, where it comes from."""
    by_efficiency: dict[Efficiency, dict[str, str]] = {}
    for p in found:
        moved = f"{p.scheme} moves {p.token_bytes / 1e9:.2f} GB a token in {p.launches} launches"
        by_efficiency.setdefault(p.efficiency, {})[p.scheme] = moved
    for efficiency, schemes in by_efficiency.items():
        share = span(efficiency.low, efficiency.high, ".0%")
        yield f"{'; '.join(schemes.values())}; at {share} of the data sheet's bandwidth ({efficiency.known_from})."


def off_cell(c: Checked) -> str:
    """Say how far a measurement lies from what was predicted."""
    return "within" if c.off == 0 else f"{abs(c.off):.1%} {'slower' if c.off > 0 else 'faster'}"


def prediction_table(results: Sequence[dict[str, Any]], shape: str = "cobra-3b") -> str:
    """Return predicted rates by device and scheme, then the same sum beside what is known, as Markdown."""
    found = predictions(shape, SCHEMES_SHOWN, (), results)
    columns = ["device", "GB/s, data sheet", *(f"{s}, predicted tok/s" for s in SCHEMES_SHOWN)]
    lines = [_line(columns), "|---" * len(columns) + "|"]
    by_target: dict[str, list[Prediction]] = {}
    for p in found:
        by_target.setdefault(p.target, []).append(p)
    for name, row in by_target.items():
        target = target_named(name)
        lines.append(_line([target.title, f"{target.memory_bandwidth_gb_s:g}", *map(rate_cell, row)]))
    lines += ["", " ".join(sources(found)), ""]
    columns = ["published measurement", "device", "ms a token, measured", "ms a token, predicted", ""]
    lines += [_line(columns), "|---" * len(columns) + "|"]
    for c in checked():
        device = target_named(c.known.target).title
        lines.append(_line([c.known.what, device, f"{c.known.ms:.1f}", f"{c.low_ms:.1f}–{c.high_ms:.1f}", off_cell(c)]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
