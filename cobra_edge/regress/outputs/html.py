"""A report, or a comparison, as one self-contained HTML page: no network, no script, no font."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...terminal.output import plain
from ..measures import MEASURES, Measure, format_value, measure_named
from ..report import Report, WorstLine
from .compare import Comparison, change_cells, changes_to_show, compare
from .difference import DiffedReply, diff_reply, shortened
from .images import EmbeddedImage, embed_image
from .libraries import require
from .rows import (
    FLOORS,
    SHOWN,
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

_GALLERY = 12
_TEMPLATES = Path(__file__).parent / "templates"


def require_html() -> None:
    """Raise MachineError if a library for HTML pages is not installed."""
    require("report.html", "jinja2", "matplotlib")


@dataclass(frozen=True)
class WorstRow:
    """One line of the gallery."""

    line: WorstLine
    image: EmbeddedImage | None
    kld: str
    kld_max: str
    where: str
    reference: DiffedReply
    build: DiffedReply


def report_html(report: Report, images: Mapping[str, bytes], previous: Report | None = None) -> str:
    """Return the page of a report.

    Args:
        report: to show.
        images: contents of image files, by the names in `report.worst`; a missing one is reported in the page.
        previous: to compare with; if it is of another model, the page says so instead.

    Raises:
        MachineError: jinja2 or matplotlib is not installed. InputError: a report has an unknown measure.
    """
    require_html()
    from .plots import report_plots

    comparison, why_not_compared = _compared(previous, report)
    rows = measure_rows(report)
    return _rendered(
        "report.html.j2",
        report=report,
        headline=headline(report),
        status="held" if report.passed and report.verdicts else "failed" if not report.passed else "open",
        gates=list(gate_rows(report)),
        rows=rows,
        floors=FLOORS,
        measures=_glossary((row.name for row in rows), comparison),
        plots=report_plots(report),
        worst=[_worst_row(line, images) for line in report.worst[:_GALLERY]],
        notes=notes_of(report),
        comparison=comparison,
        why_not_compared=why_not_compared,
        not_taken=list(not_taken_rows(report)),
        about=_about(report),
    )


def comparison_html(comparison: Comparison) -> str:
    """Return the page of a comparison. Raises MachineError if jinja2 is not installed."""
    require("a page", "jinja2")
    return _rendered("compare.html.j2", comparison=comparison, measures=_glossary((), comparison))


def _glossary(names: Iterable[str], comparison: Comparison | None) -> list[Measure]:
    """Return the whole measures that a page names, in the order of their table."""
    changes = () if comparison is None else comparison.changes
    wholes = {name.partition(".")[0] for name in (*names, *(change.measure for change in changes))}
    return [measure for name, measure in MEASURES.items() if name in wholes]


def _rendered(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value) if type(value) is str else value,  # leaves our Markup as it is
    )
    environment.globals.update(
        format_value=format_value, interval=format_interval, shortened=shortened, measure=measure_named, shown=SHOWN
    )
    environment.globals.update(change_cells=change_cells, changes_to_show=changes_to_show)
    return environment.get_template(template).render(**values)


def _compared(previous: Report | None, report: Report) -> tuple[Comparison | None, str]:
    if previous is None:
        return None, ""
    try:
        return compare(previous, report), ""
    except InputError as error:
        return None, str(error)


def _worst_row(line: WorstLine, images: Mapping[str, bytes]) -> WorstRow:
    if line.diverges_at is None:
        where = "the replies are equal"
    elif line.reply == line.reference_reply:
        where = f"the texts are equal, the tokens diverge at {line.diverges_at}"
    else:
        where = f"the replies diverge at token {line.diverges_at}"
    return WorstRow(
        line,
        None if line.image is None else embed_image(line.image, images),
        format_value("kld_mean", line.kld_mean),
        format_value("kld_max", line.kld_max),
        where,
        diff_reply(line.reference_reply, line.reply),
        diff_reply(line.reply, line.reference_reply),
    )


def _about(report: Report) -> list[tuple[str, str]]:
    """Return how the report was measured, as (term, description) pairs."""
    build, times = report.build, report.times
    rotated = ", ".join(build.rotations) or "none"
    return [
        ("build", f"{build.name}, {build.bundle_bytes / 1e6:,.1f} MB, {build.bits_per_weight:.2f} bits per decoder weight"),
        ("scheme", f"{build.scheme}, method {build.method}, rotations: {rotated}, vision {build.vision_precision or 'none'}"),
        ("model", f"{build.model}, made from {build.source}, sha256 {build.source_sha256}"),
        ("target", build.target),
        ("fingerprint", build.fingerprint),
        ("commit", report.commit or "unknown"),
        ("runtime", describe_runtime(report)),
        ("machine", report.runtime.machine),
        ("baseline", describe_baseline(report)),
        ("suite", f"{describe_suite(report)}; sha256 {report.suite.sha256}"),
        ("budget", report.budget or "none"),
        ("time", f"{times.began}, {times.seconds:.1f} s, {times.lines_per_second:.2f} lines/s"),
        ("software", f"cobra_edge {report.cobra_edge}, report schema {report.schema_version}"),
    ]
