"""What a narrow calibration set costs: default exports of cobra-mini on parts of its set, tested on all held-out lines.

python -m bench.narrow_calibration
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec

from cobra_edge.bench.machine import Machine, machine
from cobra_edge.bench.results import save_result
from cobra_edge.bench.tables import Table, print_result
from cobra_edge.decode.decoder import DEFAULT_OPTIONS
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named
from cobra_edge.regress.report import Figure
from cobra_edge.regress.runner import Run, measure
from cobra_edge.suite.drawn_set import drawn_set
from cobra_edge.suite.line import Line
from cobra_edge.suite.line_set import LineSet
from cobra_edge.suite.reader import HELDOUT
from cobra_edge.terminal.option_groups import Command
from cobra_edge.terminal.output import debug_option, main_of, progress

NAME = "narrow-calibration"
_DRAWN = 200


class NarrowRow(msgspec.Struct, frozen=True):
    """One calibration set.

    Attributes:
        label: what it holds.
        lines, images: their numbers.
        kld_mean: on all held-out lines, nats.
        by_task: mean KLD of the held-out lines of each task.
    """

    label: str
    lines: int
    images: int
    kld_mean: Figure
    by_task: dict[str, float]


class NarrowResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.narrow_calibration`."""

    bench: str = "narrow-calibration"
    rows: tuple[NarrowRow, ...]
    machine: Machine


def calibration_sets() -> dict[str, LineSet]:
    """Return the sets by label."""
    whole = LineSet.embedded(more=True)
    kept = {image.name for image in whole.images()[::5]}

    def of(keep: Callable[[Line], bool]) -> LineSet:
        return replace(whole, lines=[line for line in whole.lines if keep(line)])

    return {
        "all kinds of questions": whole,
        "all kinds, a fifth of the images": of(lambda line: Path(line.image or "").name in kept),
        "existence questions alone": of(lambda line: line.task == "existence"),
        "captions alone": of(lambda line: line.task == "caption"),
        "other images: drawn ones, the model's own answers": drawn_set(_DRAWN),
    }


def narrow_table(result: NarrowResult) -> Table:
    """Return a row for each set."""
    tasks = sorted(result.rows[0].by_task)
    rows = []
    for row in result.rows:
        f = row.kld_mean
        cells = [row.label, str(row.lines), str(row.images), f"{f.value:.3g} ({f.low:.2g}–{f.high:.2g})"]
        rows.append([*cells, *(f"{row.by_task[task]:.2g}" for task in tasks)])
    title = f"mean KLD in nats, all held-out lines; commit {result.machine.commit}"
    return Table(["calibrated on", "lines", "images", "KLD, all tasks", *tasks], rows, title)


def _row(label: str, lines: LineSet, folder: Path, options: Mapping[str, Any]) -> NarrowRow:
    suite = folder / "lines.jsonl"
    absolute = [msgspec.structs.replace(line, image=line.image and str(lines.directory / line.image)) for line in lines.lines]
    suite.write_bytes(b"\n".join(map(msgspec.json.encode, absolute)))
    data: dict[str, Any] = {"calibration": suite, "golden": HELDOUT, "force": True}
    export_bundle("mini", target_named("jetson"), folder / "bundle", **(data | dict(options)))
    run = Run(folder / "bundle", "fp16", None, None, False, "auto", "auto", "auto", DEFAULT_OPTIONS, 0, None)
    report = measure(run, None, None, None).report
    by_task = {task.task: task.kld_mean.value or 0.0 for task in report.tasks}
    return NarrowRow(label, len(lines.lines), len(lines.images()), report.measures["kld_mean"], by_task)


def measured(sets: dict[str, LineSet], on_set: Callable[[], None] = lambda: None, **options: Any) -> Sequence[NarrowRow]:
    """Export and test a build for each calibration set.

    Args:
        sets: by label.
        on_set: called after each.
        options: of the export beyond its calibration data; none for the default.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for label, lines in sets.items():
            rows.append(_row(label, lines, Path(folder), options))
            on_set()
    return rows


@click.command(name="narrow-calibration", cls=Command, epilog="Example: python -m bench.narrow_calibration")
@debug_option
def narrow_calibration() -> None:
    """Measure what a narrow calibration set costs; some six minutes."""
    sets = calibration_sets()
    with progress() as bar:
        task = bar.add_task("calibration sets", total=len(sets))
        rows = measured(sets, lambda: bar.advance(task))
    result = NarrowResult(rows=tuple(rows), machine=machine())
    print_result([narrow_table(result)], save_result(NAME, result))


main = main_of(narrow_calibration)

if __name__ == "__main__":
    main()
