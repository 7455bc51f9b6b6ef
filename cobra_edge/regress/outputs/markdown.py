"""A report as Markdown that fits into a pull request comment; needs no library.

Text from outside is put into <code>, with every special character of Markdown or HTML as a numeric entity: GitHub searches the
rendered page for mentions, issues and URLs, except in code.
Source: GitHub Flavored Markdown, sections 2.5 and 6.9; the limit is that of GitHub's API for the body of a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from ...errors import InputError
from ..measures import MEASURES, format_value
from ..report import Report, WorstLine
from .compare import Comparison, change_cells, changes_to_show, compare
from .difference import shortened
from .rows import (
    FLOORS,
    HELD,
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
)

LIMIT = 65_536
_NAME, _TEXT, _ROWS = 120, 600, 60
# A colon before a space starts neither a URL nor an emoji, and an underscore within a word no emphasis.
_KNOWN = re.compile(r"[&<>|`*\[\]#~\\$]|:(?=\S)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def escaped(text: str, limit: int = _TEXT) -> str:
    """Return untrusted text, escaped for a paragraph, a table cell or HTML, at most `limit` of its characters."""
    text = shortened(text, limit)
    numbered = _KNOWN.sub(lambda found: f"&#{ord(found[0])};", text)
    return numbered.replace("@", "@\u200b").replace("www.", "www&#46;")


def code(text: str, limit: int = _TEXT) -> str:
    """Return untrusted text as inline code."""
    return f"<code>{escaped(text, limit)}</code>" if text else "(empty)"


def _key(measure: str) -> str:
    """Return the name of a measure as inline code, plain where no part of it is from outside."""
    return f"`{measure}`" if measure in MEASURES else code(measure, _NAME)


def report_markdown(report: Report, previous: Report | None = None) -> str:
    """Return the report; the first line is the verdict. Sections beyond LIMIT are omitted, with a note.

    Args:
        report: to show.
        previous: to compare with; if it is of another model, the report says so instead.

    Raises:
        InputError: a report has an unknown measure.
    """
    sections = ["\n".join(section) for section in _sections(report, previous)]
    text, left = f"**{escaped(headline(report), 400)}**\n", 0
    room = LIMIT - 1_000  # for the sentence below, and what a CI system adds to a comment
    for section in sections:
        if len(text) + len(section) + 2 > room:
            left += 1
        else:
            text += f"\n{section}\n"
    if left:
        text += f"\n{left} sections were omitted because of the length limit of a comment; see report.html or report.json.\n"
    return text


def _sections(report: Report, previous: Report | None) -> Iterator[list[str]]:
    gates = [f"* gate **{name}** {escaped(words, 400)}" for name, words in gate_rows(report)]
    if gates:
        yield gates
    if previous is not None:
        yield _compared(report, previous)
    rows = measure_rows(report)
    yield _measures(rows[:SHOWN])
    if len(rows) > SHOWN:
        yield _details(f"{len(rows) - SHOWN} more measures", _measures(rows[SHOWN:]))
    yield _details("What the measures mean", _meanings(rows))
    yield _details("Noise floor: the reference's own drift in 16 bits", _floors(rows))
    yield _about(report)
    yield _not_taken(report)
    if report.tasks:
        yield _tasks(report)
    if report.attribution is not None:
        parts = report.attribution.parts
        drifts = [
            (code(p.name, _NAME), format_value("kld_mean", p.kld_mean), format_value("top1_agreement", p.top1_agreement))
            for p in parts
        ]
        yield _details(
            "Where the drift comes from", _table(("with only this part of the build", "kld_mean", "top1_agreement"), drifts)
        )
    for line in report.worst:
        yield _worst(line)


def _about(report: Report) -> list[str]:
    build = report.build
    return [
        f"Build {code(build.name, _NAME)} ({code(build.scheme, _NAME)}, model {code(build.model, _NAME)}){_at(report)}. ",
        f"Ran on {code(describe_runtime(report))}. ",
        f"Compared with {code(describe_baseline(report))} ",
        f"on {code(describe_suite(report))}.",
    ]


def _measures(rows: Sequence[MeasureRow]) -> list[str]:
    cells = [
        (
            _key(row.name),
            row.value,
            row.interval,
            "<br>".join(limit for limit, _ in row.limits),
            "<br>".join(word if word == HELD else f"**{word}**" for _, word in row.limits) or "no limit",
        )
        for row in rows
    ]
    return _table(("measure", "value", "95 % interval", "limit", "verdict"), cells)


def _meanings(rows: Sequence[MeasureRow]) -> list[str]:
    """Return a line for each measure, without those of single tasks and layers."""
    known = [MEASURES[name] for name in dict.fromkeys(row.name.partition(".")[0] for row in rows)]
    return [
        f"* `{of.name}`: {escaped(f'{of.title}, {of.direction}: {of.description}. If it is off: {of.reaction}.')}"
        for of in known
    ]


def _floors(rows: Sequence[MeasureRow]) -> list[str]:
    return _table(("measure", *FLOORS), [(_key(row.name), *row.floors) for row in rows if any(row.floors)])


def _tasks(report: Report) -> list[str]:
    head = ("task", "metric", "lines", "accuracy", "reference", "accuracy_change", "95 % interval", "kld_mean")
    rows = [
        (
            code(task.task, _NAME),
            code(task.metric, _NAME),
            str(task.lines),
            format_value("accuracy", task.score.value),
            format_value("accuracy", task.reference),
            format_value("accuracy_change", task.change.value),
            format_interval("accuracy_change", task.change),
            format_value("kld_mean", task.kld_mean.value),
        )
        for task in report.tasks
    ]
    first, rest = rows[:SHOWN], rows[SHOWN:]
    return [*_table(head, first), "", *(_details(f"{len(rest)} more tasks", _table(head, rest)) if rest else ())]


def _compared(report: Report, previous: Report) -> list[str]:
    try:
        found = compare(previous, report)
    except InputError as error:
        return [f"Not compared with the previous report: {escaped(str(error))}"]
    title = f"Compared with {code(previous.build.name, _NAME)}{_at(previous)}: {_ratio(report)}"
    return _details(f"{title}{len(found.worse)} worse, {len(found.better)} better", _changes(found))


def _at(report: Report) -> str:
    return "" if report.commit is None else f" at commit {code(report.commit[:12])}"


def _ratio(report: Report) -> str:
    """Return the KLD as a multiple of the other build's, if the gate "against" has it."""
    figure = report.measures.get("kld_ratio")
    if figure is None or figure.value is None:
        return ""
    ends = format_interval("kld_ratio", figure)
    return f"KLD × {format_value('kld_ratio', figure.value)}{f' ({ends})' if ends else ''}, "


def _changes(found: Comparison) -> list[str]:
    lines = [f"* {escaped(warning)}" for warning in found.warnings]
    head = ("measure", "before", "after", "difference", "95 % interval", "")
    rows = [
        (_key(change.measure), *(escaped(text, _NAME) for text in change_cells(change))) for change in changes_to_show(found)
    ]
    return [*lines, "", *_table(head, rows)]


def _worst(line: WorstLine) -> list[str]:
    where = "replies equal" if line.diverges_at is None else f"replies diverge at token {line.diverges_at}"
    title = f"Line {line.number}, {code(line.task, _NAME)}: kld_mean {format_value('kld_mean', line.kld_mean)}, {where}"
    texts = (("question", line.prompt), ("expected", line.answer), ("reference", line.reference_reply), ("build", line.reply))
    image = "no image" if line.image is None else code(line.image, _NAME)
    return _details(title, _table(("", ""), [("image", image), *((kind, code(text)) for kind, text in texts)]))


def _not_taken(report: Report) -> list[str]:
    rows = [(escaped(what, _NAME), escaped(why)) for what, why in not_taken_rows(report)]
    rows += [(f"suite line {number}", escaped(why)) for number, why in sorted(report.suite.skipped.items())]
    if not rows:
        return ["All measures have a value."]
    return _details(f"Not measured: {len(rows)}", _table(("what", "why"), rows))


def _details(title: str, lines: Iterable[str]) -> list[str]:
    return [f"<details><summary>{title}</summary>", "", *lines, "", "</details>"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows[:_ROWS]]
    return lines + ([f"\n{len(rows) - _ROWS} more rows are in report.json."] if len(rows) > _ROWS else [])
