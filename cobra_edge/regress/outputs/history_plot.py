"""Drift over commits as one drawing: a line a build, its 95 % interval as a band, failed runs marked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from ..measures import measure_named
from ..report import Figure
from .difference import shortened
from .drawing import axes_of, logarithmic, save, style
from .history import Entry
from .libraries import require

KINDS = ("svg", "png", "pdf")
_TICKS = 30


def check_drawing(file: Path, measure: str) -> None:
    """Find what would keep `draw_history` from drawing.

    Raises:
        InputError: the file's ending is none of KINDS, or no measure has that name. MachineError: no matplotlib.
    """
    measure_named(measure)
    if file.suffix[1:] not in KINDS:
        raise InputError(f"{file}: drawings end in {', '.join('.' + kind for kind in KINDS)}; give it one of these endings")
    require("a drawing", "matplotlib")


def draw_history(entries: Sequence[Entry], file: Path, measure: str = "kld_mean") -> None:
    """Draw a measure over the runs, in the order of their times; runs of one commit share a place.

    Raises:
        InputError: as `check_drawing` says, no entry has the measure, or the file cannot be written.
        MachineError: matplotlib is not installed.
    """
    check_drawing(file, measure)
    runs = sorted(entries, key=lambda entry: entry.time)
    if all(_figure(run, measure).value is None for run in runs):
        known = sorted({name for run in runs for name, figure in run.measures.items() if figure.value is not None})
        raise InputError(f"no entry has a value of {measure}; some have: {', '.join(known) or 'nothing'}")
    with style(in_page=False):
        figure = _drawn(runs, measure)
        try:
            with tempfile.TemporaryDirectory(dir=file.parent, prefix=".drawing-") as stage:
                save(figure, Path(stage) / "drawing", file.suffix[1:])
                os.replace(Path(stage) / "drawing", file)
        except OSError as error:
            raise InputError(f"{file}: cannot be written ({error}); give another path") from error


def _figure(run: Entry, measure: str) -> Figure:
    return run.measures.get(measure, Figure(None))


def _place(run: Entry) -> str:
    """Return what runs share that stand above each other: the commit, or the time of one that has none."""
    return run.commit or run.time


def _lines(runs: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Return the runs of each build on one suite by what a legend calls them."""
    several = len({run.suite for run in runs}) > 1
    found: dict[str, list[Entry]] = {}
    for run in runs:
        suite = f", suite {run.suite[:8]}" if several else ""
        found.setdefault(shortened(f"{run.build} ({run.scheme}){suite}", 70), []).append(run)
    return found


def _drawn(runs: Sequence[Entry], measure: str):  # type: ignore[no-untyped-def] # matplotlib's Figure, not imported without need
    places = {name: i for i, name in enumerate(dict.fromkeys(_place(run) for run in runs))}
    figure, axes = axes_of(max(7.0, min(16.0, 2.5 + 0.3 * len(places))), 4.5)
    for i, (label, of) in enumerate(_lines(runs).items()):
        taken = [(places[_place(run)], figure_, run) for run in of if (figure_ := _figure(run, measure)).value is not None]
        if not taken:
            continue
        xs, values = [x for x, _, _ in taken], [f.value for _, f, _ in taken]
        axes.plot(xs, values, marker="o", ms=4, lw=1.4, color=f"C{i % 10}", label=label)
        lows, highs = [f.value if f.low is None else f.low for _, f, _ in taken], [f.value if f.high is None else f.high for _, f, _ in taken]
        axes.fill_between(xs, lows, highs, color=f"C{i % 10}", alpha=0.18, lw=0)
    failed = [(places[_place(run)], value) for run in runs if run.passed is False and (value := _figure(run, measure).value) is not None]
    if failed:
        axes.plot(*zip(*failed, strict=True), "x", color="#b3261e", ms=10, mew=2, ls="", label="beyond its budget")
    lost = [places[_place(run)] for run in runs if _figure(run, measure).value is None]
    for x in dict.fromkeys(lost):
        axes.axvline(x, color="#888888", lw=0.8, ls=":")
    values = [value for run in runs if (value := _figure(run, measure).value) is not None]
    if "kld" in measure and min(values) > 0:
        logarithmic(axes)
    axes.set_ylabel(measure_named(measure).label)
    step = -(-len(places) // _TICKS)
    ticks = [(i, shortened(name, 8) if len(name) != 40 else name[:7]) for name, i in places.items() if i % step == 0]
    axes.set_xticks([i for i, _ in ticks], [label for _, label in ticks], rotation=45, ha="right", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
