"""A report for a terminal: the verdict first, then what tells most; text from files is shown and never interpreted."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from ...terminal.listing import Listing, Row
from ...terminal.output import cell
from ..measures import format_value
from ..report import Figure, Part, Report
from .difference import shortened
from .rows import (
    FAILED,
    FLOORS,
    SHOWN,
    MeasureRow,
    describe_baseline,
    describe_runtime,
    describe_suite,
    format_interval,
    gate_rows,
    headline,
    measure_rows,
    not_taken_rows,
    notes_of,
)

_WORST_LINES, _TEXT = 3, 300


def report_tables(report: Report, everything: bool = False) -> list[RenderableType]:
    """Return the parts of a report, for `terminal.output.results.print`.

    Args:
        report: to show.
        everything: no table is cut, and the noise floor and the layers are shown.

    Raises:
        InputError: the report has an unknown measure.
    """
    line = cell(shortened(f"{report.build.name}: {headline(report)}", _TEXT))
    line.stylize("bold red" if not report.passed else "bold green" if report.verdicts else "bold")
    rows = measure_rows(report)
    shown: list[RenderableType] = [line, _gates(report), "", *_measures(rows, everything)]
    if everything:
        shown += [*_floors(rows), *_layers(report)]
    shown += [*_tasks(report, everything), *_attribution(report, everything), *_worst(report), *_not_taken(report)]
    shown += ["", _about(report)]
    return shown


def _gates(report: Report) -> Listing:
    """Return what each gate found in a few words: what it compares with is in the other outputs."""
    rows = [(name, words if words.startswith("not judged") else words.partition(":")[0]) for name, words in gate_rows(report)]
    return Listing("", ("", ""), [Row((f"gate {name}", words), "red" if FAILED in words else "") for name, words in rows])


def _measures(rows: list[MeasureRow], everything: bool) -> Iterator[RenderableType]:
    """Yield the table of the measures, a line for each limit, and how many more there are."""
    chosen, lines = rows if everything else rows[:SHOWN], []
    for row in chosen:
        (limit, word), *others = row.limits or (("", ""),)
        style = "red" if row.failed else ""
        lines.append(Row((row.name, row.value, word, limit, row.interval), style))
        lines += [Row(("", "", word, limit, ""), style) for limit, word in others]
    yield Listing("", ("measure", "value", "verdict", "limit", "95 % interval"), lines, numbers=(1,))
    yield from _more(len(rows) - len(chosen), "measures")
    yield "what a measure means: --explain MEASURE"


def _more(count: int, of: str) -> Iterator[str]:
    if count > 0:
        yield f"{count} more {of}: --all, or --report DIRECTORY"


def _floors(rows: list[MeasureRow]) -> Iterator[RenderableType]:
    known = [Row((row.name, *row.floors)) for row in rows if any(row.floors)]
    if known:
        yield ""
        yield Listing("noise floor: the reference's own drift in 16 bits", ("measure", *FLOORS), known, numbers=(1, 2))


def _with_interval(name: str, figure: Figure) -> str:
    ends = format_interval(name, figure)
    return format_value(name, figure.value) + (f" ({ends})" if figure.low is not None else f", {ends}" if ends else "")


def _tasks(report: Report, everything: bool) -> Iterator[RenderableType]:
    tasks = report.tasks if everything else report.tasks[:SHOWN]
    if not tasks:
        return
    rows = [
        Row((
            shortened(task.task, 40),
            str(task.lines),
            format_value("accuracy", task.score.value),
            format_value("kld_mean", task.kld_mean.value),
            _with_interval("accuracy_change", task.change),
        ))
        for task in tasks
    ]  # fmt: skip
    yield ""
    head = ("task", "lines", "accuracy", "kld_mean", "accuracy_change")
    yield Listing("", head, rows, numbers=(1, 2, 3))
    yield from _more(len(report.tasks) - len(tasks), "tasks")


def _layers(report: Report) -> Iterator[RenderableType]:
    rows = []
    for layer in report.layers:
        name, figure = f"state_error.{layer.layer}", layer.state_error
        if figure.value is not None:
            rows.append(Row((name, format_value(name, figure.value), format_interval(name, figure))))
    if rows:
        yield ""
        yield Listing("", ("layer", "value", "95 % interval"), rows, numbers=(1,))


def _attribution(report: Report, everything: bool) -> Iterator[RenderableType]:
    found = report.attribution
    if found is None:
        return
    kinds: tuple[tuple[str, tuple[Part, ...]], ...] = (
        ("part", found.parts),
        ("layer", found.layers),
        ("tensor", found.tensors),
    )
    for kind, all_parts in kinds:
        parts = [part for part in all_parts if part.kld_mean is not None]
        chosen = parts if everything else parts[:SHOWN]
        rows = [
            Row((
                shortened(part.name, 80),
                format_value("kld_mean", part.kld_mean),
                format_value("top1_agreement", part.top1_agreement),
            ))
            for part in chosen
        ]  # fmt: skip
        if rows:
            yield ""
            head = (f"with only this {kind} of the build", "kld_mean", "top1_agreement")
            yield Listing("", head, rows, numbers=(1, 2))
        yield from _more(len(parts) - len(chosen), f"{kind}s")


def _worst(report: Report) -> Iterator[RenderableType]:
    for line in report.worst[:_WORST_LINES]:
        where = "replies equal" if line.diverges_at is None else f"replies diverge at token {line.diverges_at}"
        of = f"line {line.number} ({shortened(line.task, 40)}), {shortened(line.image or 'no image', 80)}"
        texts = (
            ("question", line.prompt),
            ("expected", line.answer),
            ("reference", line.reference_reply),
            ("build", line.reply),
        )
        yield ""
        yield Listing(
            f"{of}: kld_mean {format_value('kld_mean', line.kld_mean)}, {where}",
            ("", ""),
            [Row((kind, shortened(text, _TEXT))) for kind, text in texts],
        )


def _not_taken(report: Report) -> Iterator[RenderableType]:
    rows = list(not_taken_rows(report))
    rows += [(f"suite line {number}", why) for number, why in sorted(report.suite.skipped.items())]
    if rows:
        yield ""
        lines = [Row((shortened(what, 80), shortened(why, _TEXT))) for what, why in rows]
        yield Listing("not measured, and why", ("", ""), lines)


def _about(report: Report) -> Listing:
    method = (("runtime", describe_runtime), ("baseline", describe_baseline), ("suite", describe_suite))
    rows = [*(("attribution", note) for note in notes_of(report)), *((what, words(report)) for what, words in method)]
    return Listing("", ("", ""), [Row((what, shortened(words, _TEXT)), "dim") for what, words in rows])
