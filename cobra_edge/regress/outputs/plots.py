"""Plots of a report: drift by position, layer and task, and its attribution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..report import Figure, Part, Report
from .difference import shortened
from .drawing import GRID, INK, MAIN, SECOND, axes_of, inline_svg, logarithmic, style

_WIDTH, _HEIGHT, _BAR = 4.2, 2.7, 0.25  # inches; about the width of a phone, at which text is not scaled
_BARS, _NAME = 12, 26


@dataclass(frozen=True)
class Plot:
    """One plot of a page: an SVG element, and its caption."""

    svg: str
    caption: str


def report_plots(report: Report) -> list[Plot]:
    """Return the plots of a report. Raises ImportError without matplotlib."""
    with style():
        return [*_by_position(report), *_by_layer(report), *_by_task(report), *_attribution(report)]


def _wide(values: Sequence[float]) -> bool:
    """Return whether values are better read on a logarithmic scale, which cannot show 0."""
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def _by_position(report: Report) -> Iterator[Plot]:
    points = sorted((p.at, p.kld_mean) for p in report.positions if math.isfinite(p.kld_mean))
    if not points:
        return
    figure, axes = axes_of(_WIDTH, _HEIGHT)
    for answer, colour, label in ((False, SECOND, "question"), (True, MAIN, "answer")):
        if chosen := [point for point in points if (point[0] >= 0) == answer]:
            axes.plot(*zip(*chosen, strict=True), color=colour, label=label, lw=1.4, marker="o", ms=2.5)
    axes.axvline(-0.5, color=INK, lw=0.6, ls=":")
    axes.set(xlabel="token, 0: first of the answer", ylabel="kld_mean (nats)")
    if _wide([kld for _, kld in points]):
        logarithmic(axes)
    axes.grid(axis="y", color=GRID)
    axes.legend(fontsize=8)
    title = "kld_mean by token position"
    yield Plot(inline_svg(figure, "position", title), f"{title}: negative in the question, from 0 in the answer.")


def _by_layer(report: Report) -> Iterator[Plot]:
    taken = [(layer.layer, layer.state_error) for layer in report.layers if layer.state_error.value is not None]
    if not taken:
        return
    figure, axes = axes_of(_WIDTH, _HEIGHT)
    layers, values = [at for at, _ in taken], [f.value or 0.0 for _, f in taken]
    axes.errorbar(layers, values, yerr=_ends([f for _, f in taken]), color=MAIN, fmt="o", ms=3, lw=1, capsize=2)
    axes.set(xlabel="layer", ylabel="state_error (relative RMS)")
    axes.locator_params("x", integer=True)
    if _wide(values) and all((f.low or 0) > 0 for _, f in taken):
        logarithmic(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GRID)
    title = "state_error by layer"
    yield Plot(inline_svg(figure, "layer", title), f"{title}, with 95 % intervals.")


def _ends(figures: Sequence[Figure]) -> list[list[float]]:
    """Return the lengths of the error bars below and above the values; 0 without an interval."""
    values = [f.value or 0.0 for f in figures]
    below = [max(0.0, v - (v if f.low is None else f.low)) for v, f in zip(values, figures, strict=True)]
    above = [max(0.0, (v if f.high is None else f.high) - v) for v, f in zip(values, figures, strict=True)]
    return [below, above]


def _bars(name: str, title: str, rows: Sequence[tuple[str, Figure]]) -> Plot:
    """Return a bar plot, the first row on top, of at most _BARS rows."""
    shown = rows[:_BARS]
    figure, axes = axes_of(_WIDTH, 0.75 + _BAR * max(4, len(shown)))
    places = range(len(shown))
    values, ends = [f.value or 0.0 for _, f in shown], _ends([f for _, f in shown])
    errors = ends if any(map(sum, ends)) else None
    axes.barh(places, values, 0.6, color=MAIN, xerr=errors, error_kw={"ecolor": INK, "lw": 0.8, "capsize": 2})
    axes.set_yticks(places, [_short(label) for label, _ in shown])
    axes.set_ylim(max(4, len(shown)) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.locator_params("x", nbins=5)
    axes.set(xlabel="kld_mean (nats)", xlim=(0, None if any(values) else 1))
    axes.grid(axis="x", color=GRID)
    left = f" The worst {len(shown)} of {len(rows)}." if len(rows) > len(shown) else ""
    return Plot(inline_svg(figure, name, title), f"{title}.{left}")


def _short(name: str) -> str:
    return shortened(name.removeprefix("backbone.").removesuffix(".weight").replace(".mixer.", "."), _NAME)


def _by_task(report: Report) -> Iterator[Plot]:
    """Yield dots on a logarithmic axis, of at most _BARS tasks, the worst on top; hollow ones have too few images to judge."""
    rows = [(task.task, task.kld_mean) for task in report.tasks if task.kld_mean.value is not None]
    if not rows:
        return
    rows.sort(key=lambda row: (row[1].low is None, -(row[1].value or 0)))
    shown = rows[:_BARS]
    figures = [of for _, of in shown]
    values = [of.value or 0.0 for of in figures]
    low, high = _decades(values)
    figure, axes = axes_of(_WIDTH, 0.75 + _BAR * max(4, len(shown)))
    places = [max(value, low) for value in values]
    for few, face in ((False, MAIN), (True, "none")):
        if rowed := [i for i, of in enumerate(figures) if (of.low is None) == few]:
            ends = None if few else _ends([figures[i] for i in rowed])
            xs = [places[i] for i in rowed]
            axes.errorbar(xs, rowed, xerr=ends, color=MAIN, mfc=face, fmt="o", ms=4, lw=1, capsize=2, ecolor=INK)
    axes.set_yticks(range(len(shown)), [_short(task) for task, _ in shown])
    axes.set_ylim(max(4, len(shown)) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    logarithmic(axes, "x", (low, high))
    axes.set_xlabel("kld_mean (nats)")
    axes.grid(color=GRID)
    left = f" The worst {len(shown)} of {len(rows)}." if len(rows) > len(shown) else ""
    few_said = " Hollow: too few images for an interval." if any(of.low is None for of in figures) else ""
    zero = f" Below {low:g} at the edge." if min(values) < low else ""
    title = "kld_mean by task, with 95 % intervals"
    yield Plot(inline_svg(figure, "task", title), f"{title}.{few_said}{zero}{left}")


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Return a range for a logarithmic axis: it has the largest value, and of the others what is within four decades of it."""
    high = max(values) or 1.0
    low = min((value for value in values if value >= high / 1e4), default=high)
    return low / 2, high * 4


def _attribution(report: Report) -> Iterator[Plot]:
    found = report.attribution
    if found is None:
        return
    kinds: tuple[tuple[str, tuple[Part, ...]], ...] = (
        ("part", found.parts),
        ("layer", found.layers),
        ("tensor", found.tensors),
    )
    for kind, parts in kinds:
        rows = [(part.name, Figure(part.kld_mean)) for part in parts if part.kld_mean is not None]
        if rows:
            yield _bars(f"only-{kind}", f"kld_mean with only this {kind} of the build, {found.lines} lines", rows)
