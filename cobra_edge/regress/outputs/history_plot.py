"""Drift over commits as a plot: one line per build, its 95 % interval as a band, failed runs marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError
from ...files.staging import staged_file
from ..measures import measure_named
from ..report import Figure
from .difference import shortened
from .drawing import axes_of, logarithmic, save, style
from .history import Entry
from .libraries import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

KINDS = ("svg", "png", "pdf")
_TICKS = 30


def check_plot(file: Path, measure: str) -> None:
    """Check that `plot_history` can draw.

    Raises:
        InputError: the file extension is not one of KINDS, or the measure is unknown. MachineError: no matplotlib.
    """
    measure_named(measure)
    if file.suffix[1:] not in KINDS:
        raise InputError(f"{file}: plots end in {', '.join('.' + kind for kind in KINDS)}; use one of these file extensions")
    require("a plot", "matplotlib")


def plot_history(entries: Sequence[Entry], file: Path, measure: str = "kld_mean") -> None:
    """Plot a measure over the runs, in the order of their times; runs of one commit share a position.

    Raises:
        InputError: as `check_plot`; no entry has the measure; the file cannot be written.
        MachineError: matplotlib is not installed.
    """
    check_plot(file, measure)
    runs = sorted(entries, key=lambda entry: entry.time)
    if all(_figure(run, measure).value is None for run in runs):
        known = sorted({name for run in runs for name, figure in run.measures.items() if figure.value is not None})
        raise InputError(f"no entry has a value of {measure}; available: {', '.join(known) or 'nothing'}")
    with style(in_page=False):
        figure = _plot(runs, measure)
        with staged_file(file, force=True) as staged:
            save(figure, staged, file.suffix[1:])


def _figure(run: Entry, measure: str) -> Figure:
    return run.measures.get(measure, Figure(None))


def _place(run: Entry) -> str:
    """Return the key of a run's position: the commit, or the time of a run without one."""
    return run.commit or run.time


def _lines(runs: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Return the runs of each build on one suite, by legend label."""
    several = len({run.suite for run in runs}) > 1
    found: dict[str, list[Entry]] = {}
    for run in runs:
        suite = f", suite {run.suite[:8]}" if several else ""
        found.setdefault(shortened(f"{run.build} ({run.scheme}){suite}", 70), []).append(run)
    return found


def _points(runs: Sequence[Entry], places: dict[str, int], measure: str) -> list[tuple[int, float, float, float]]:
    """Return (position, value, low, high) of each run; bounds are the value without an interval, NaN without a value."""
    points = []
    for run in runs:
        figure = _figure(run, measure)
        value = math.nan if figure.value is None else figure.value
        low, high = (value if end is None else end for end in (figure.low, figure.high))
        points.append((places[_place(run)], value, low, high))
    return points


def _plot(runs: Sequence[Entry], measure: str) -> MatplotlibFigure:
    places = {name: i for i, name in enumerate(dict.fromkeys(_place(run) for run in runs))}
    figure, axes = axes_of(max(7.0, min(16.0, 2.5 + 0.3 * len(places))), 4.5)
    for i, (label, of) in enumerate(_lines(runs).items()):
        xs, values, lows, highs = zip(*_points(of, places, measure), strict=True)
        axes.plot(xs, values, marker="o", ms=4, lw=1.4, color=f"C{i % 10}", label=label)
        axes.fill_between(xs, lows, highs, color=f"C{i % 10}", alpha=0.18, lw=0)
    if failed := _points([run for run in runs if run.passed is False], places, measure):
        xs, values, _, _ = zip(*failed, strict=True)
        axes.plot(xs, values, "x", color="#b3261e", ms=10, mew=2, ls="", label="budget exceeded")
    missing = dict.fromkeys(places[_place(run)] for run in runs if _figure(run, measure).value is None)
    for i, x in enumerate(missing):
        axes.axvline(x, color="#777777", lw=0.8, ls=":", label=None if i else "not measured")
    if "kld" in measure and not any(value <= 0 for _, value, _, _ in _points(runs, places, measure)):
        logarithmic(axes)
    axes.set_ylabel(f"{measure}: {measure_named(measure).title}")
    shown = list(places)[:: -(-len(places) // _TICKS)]
    labels = [name[:7] if len(name) == 40 else shortened(name, 20) for name in shown]  # 40 digits: a git commit
    axes.set_xticks([places[name] for name in shown], labels, rotation=45, ha="right", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
