"""A report, or a comparison, as one page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...terminal.output import plain
from ..measures import MEASURES, written
from ..report import Report, WorstLine
from .compare import Comparison, change_cells, changes_to_show, compare
from .difference import Parted, parted, shortened
from .images import Shown, shown_image
from .libraries import require
from .rows import (
    FLOORS,
    all_figures,
    baseline_words,
    headline,
    interval_words,
    measure_rows,
    not_taken_rows,
    remarks,
    runtime_words,
    suite_words,
)

_GALLERY = 12
_TEMPLATES = Path(__file__).parent / "templates"


def require_html() -> None:
    """Raise MachineError where a library is missing that pages need."""
    require("report.html", "jinja2", "matplotlib")


@dataclass(frozen=True)
class WorstRow:
    """One line of the gallery."""

    line: WorstLine
    image: Shown | None
    kld: str
    kld_max: str
    where: str
    reference: Parted
    build: Parted


def report_html(report: Report, images: Mapping[str, bytes], previous: Report | None = None) -> str:
    """Return the page.

    Args:
        report: what to show.
        images: content of image files by the names in `report.worst`; one that is missing is said to be.
        previous: to compare with; one of another model is not compared, which is said.

    Raises:
        MachineError: jinja2 or matplotlib is not installed. InputError: a report has a name that is no measure's.
    """
    require_html()
    from .plots import report_plots

    comparison, why_not_compared = _compared(previous, report)
    return _rendered(
        "report.html.j2",
        report=report,
        headline=headline(report),
        mood="held" if report.passed and report.verdicts else "failed" if not report.passed else "open",
        rows=measure_rows(report),
        floors=FLOORS,
        means={name: measure.means for name, measure in MEASURES.items()},
        plots=report_plots(report),
        worst=[_worst_row(line, images) for line in report.worst[:_GALLERY]],
        remarks=remarks(report),
        comparison=comparison,
        why_not_compared=why_not_compared,
        not_taken=list(not_taken_rows(report)),
        about=_about(report),
        figures=all_figures(report),
    )


def comparison_html(comparison: Comparison) -> str:
    """Return a page of a comparison alone. Raises MachineError where jinja2 is not installed."""
    require("a page", "jinja2")
    return _rendered("compare.html.j2", comparison=comparison)


def _rendered(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value) if type(value) is str else value,  # Markup is ours
    )
    environment.globals.update(written=written, interval=interval_words, shortened=shortened)
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
        where = "the replies are alike"
    elif line.reply == line.reference_reply:
        where = f"the texts are alike, the tokens part at {line.diverges_at}"
    else:
        where = f"the replies part at token {line.diverges_at}"
    return WorstRow(
        line,
        None if line.image is None else shown_image(line.image, images),
        written("kld_mean", line.kld_mean),
        written("kld_max", line.kld_max),
        where,
        parted(line.reference_reply, line.reply),
        parted(line.reply, line.reference_reply),
    )


def _about(report: Report) -> list[tuple[str, str]]:
    """Return how it was measured, as pairs of a term and what is said of it."""
    build, times = report.build, report.times
    rotated = ", ".join(build.rotations) or "none"
    return [
        ("build", f"{build.name}, {build.bundle_bytes / 1e6:,.1f} MB, {build.bits_per_weight:.2f} bits a decoder weight"),
        ("scheme", f"{build.scheme}, method {build.method}, rotations: {rotated}, vision {build.vision_precision or 'none'}"),
        ("model", f"{build.model}, made from {build.source}, sha256 {build.source_sha256}"),
        ("target", build.target),
        ("fingerprint", build.fingerprint),
        ("commit", report.commit or "not known"),
        ("runtime", runtime_words(report)),
        ("machine", report.runtime.machine),
        ("baseline", baseline_words(report)),
        ("suite", f"{suite_words(report)}; sha256 {report.suite.sha256}"),
        ("budget", report.budget or "none"),
        ("time", f"{times.began}, {times.seconds:.1f} s, {times.lines_per_second:.2f} lines a second"),
        ("software", f"cobra_edge {report.cobra_edge}, report schema {report.schema_version}"),
    ]
