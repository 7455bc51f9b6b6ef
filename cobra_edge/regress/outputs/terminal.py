"""A report as tables for a terminal; text from files is escaped."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ...terminal.output import cell
from ..measures import format_value
from ..report import Figure, Part, Report
from .difference import shortened
from .rows import (
    FLOORS,
    describe_baseline,
    describe_runtime,
    describe_suite,
    format_interval,
    gate_rows,
    headline,
    measure_rows,
    not_taken_rows,
    notes_of,
    title_of,
)

_METHOD = (("runtime", describe_runtime), ("baseline", describe_baseline), ("suite", describe_suite))
_WORST_LINES, _WORST_PARTS, _TEXT = 3, 6, 300


def report_tables(report: Report) -> list[RenderableType]:
    """Return the tables of a report, for `terminal.output.results.print`.

    Raises:
        InputError: the report has an unknown measure.
    """
    style = "bold red" if not report.passed else "bold green" if report.verdicts else "bold"
    line = cell(shortened(f"{report.build.name}: {headline(report)}", _TEXT))
    line.stylize(style)
    gates = [cell(shortened(f"gate {name}: {words}", _TEXT)) for name, words in gate_rows(report)]
    shown: list[RenderableType] = [line, *gates, _measures(report)]
    if report.tasks:
        shown.append(_tasks(report))
    shown += [*_layers(report), *_attribution(report), *_worst(report), *_not_taken(report)]
    shown += [cell(shortened(note, _TEXT)) for note in notes_of(report)]
    shown += [cell(shortened(f"{what}: {words(report)}", _TEXT)) for what, words in _METHOD]
    return shown


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=cell(shortened(title, _TEXT)), title_justify="left")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _measures(report: Report) -> Table:
    table = _table(
        f"drift of {title_of(report)}", "measure", "value", "95 % interval", *(f"floor {p}" for p in FLOORS), "limit", "verdict"
    )
    for row in measure_rows(report):
        limits, words = ("\n".join(side) for side in zip(*row.limits, strict=True)) if row.limits else ("", "no limit")
        cells = (row.label, row.value, row.interval, *row.floors, limits, words)
        table.add_row(*(cell(text) for text in cells), style="red" if row.failed else None)
    return table


def _with_interval(name: str, figure: Figure) -> Text:
    ends = format_interval(name, figure)
    return cell(format_value(name, figure.value) + (f" ({ends})" if ends else ""))


def _tasks(report: Report) -> Table:
    table = _table(
        f"tasks, {title_of(report)}", "task", "metric", "lines", "score", "reference", "change", "KLD, mean", "greedy match"
    )
    for task in report.tasks:
        table.add_row(
            cell(shortened(task.task, 40)),
            cell(shortened(task.metric, 40)),
            str(task.lines),
            cell(format_value("accuracy", task.score.value)),
            cell(format_value("accuracy", task.reference)),
            _with_interval("accuracy_change", task.change),
            cell(format_value("kld_mean", task.kld_mean.value)),
            cell(format_value("greedy_match", task.greedy_match.value)),
        )
    return table


def _layers(report: Report) -> Iterator[Table]:
    taken = [layer for layer in report.layers if layer.state_error.value is not None]
    if not taken:
        return
    worst = sorted(taken, key=lambda layer: -(layer.state_error.value or 0))[:_WORST_PARTS]
    table = _table(
        f"decoder state by layer, worst {len(worst)} of {len(report.layers)}", "layer", "relative RMS", "95 % interval"
    )
    for layer in worst:
        figure = layer.state_error
        table.add_row(str(layer.layer), format_value("state_error", figure.value), format_interval("state_error", figure))
    yield table


def _attribution(report: Report) -> Iterator[Table]:
    found = report.attribution
    if found is None:
        return
    parts: tuple[tuple[str, tuple[Part, ...]], ...] = (
        ("part", found.parts),
        ("decoder layer", found.layers[:_WORST_PARTS]),
        ("decoder tensor", found.tensors[:_WORST_PARTS]),
    )
    for kind, rows in parts:
        if not rows:
            continue
        table = _table(f"drift with only one {kind} of the build, {found.lines} lines", kind, "KLD, mean (nats)", "top-1")
        for part in rows:
            kld, top1 = format_value("kld_mean", part.kld_mean), format_value("top1_agreement", part.top1_agreement)
            table.add_row(cell(shortened(part.name, 80)), cell(kld), cell(top1))
        yield table


def _worst(report: Report) -> Iterator[Table]:
    for line in report.worst[:_WORST_LINES]:
        where = "replies equal" if line.diverges_at is None else f"replies diverge at token {line.diverges_at}"
        of = f"line {line.number} ({shortened(line.task, 40)}), {shortened(line.image or 'no image', 80)}"
        table = _table(f"{of}: mean KLD {format_value('kld_mean', line.kld_mean)}, {where}", "", "")
        table.show_header = False
        table.columns[1].justify = "left"
        texts = (
            ("question", line.prompt),
            ("expected", line.answer),
            ("reference", line.reference_reply),
            ("build", line.reply),
        )
        for kind, text in texts:
            table.add_row(kind, cell(shortened(text, _TEXT)))
        yield table


def _not_taken(report: Report) -> Iterator[Table]:
    rows = list(not_taken_rows(report))
    rows += [(f"suite line {number}", why) for number, why in sorted(report.suite.skipped.items())]
    if not rows:
        return
    table = _table("not measured, and why", "", "")
    table.show_header = False
    table.columns[1].justify = "left"
    for what, why in rows:
        table.add_row(cell(shortened(what, 80)), cell(shortened(why, _TEXT)))
    yield table
