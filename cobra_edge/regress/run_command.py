"""`regress BUNDLE`: compare a build with its float model, check a drift budget, and write reports.

python -m cobra_edge.regress BUNDLE --budget budget.toml --report drift
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ..errors import DriftError, InputError
from ..inference.session_options import Opening, session_options
from ..inputs.image import load_image
from ..terminal.option_groups import Command, option
from ..terminal.output import debug_option, results, say, stages, tell
from .budget import Budget, read_budget
from .gates import failures
from .journal import locked
from .outputs.explain import explain_option
from .outputs.history import append_history, check_history
from .outputs.rows import all_figures
from .outputs.terminal import report_tables
from .outputs.write import check_directory, report_json, write_outputs
from .report import Report, read_report
from .runner import Run, RunResult, measure
from .suite_selection import SCORINGS
from .update_budget import LIMITED, check_update, update_budget

_PATH = click.Path(path_type=Path)


@click.command(cls=Command, epilog="Example: cobra-edge regress bundles/demo --report drift --history drift.jsonl")
@option(
    "--baseline",
    group="input",
    default="fp16",
    help="Reference: fp16 (golden lines in the bundle), another bundle, or a checkpoint (mini, hub name, directory).",
)
@option("--suite", group="input", type=_PATH, help="Suite (JSON lines); default: golden lines, else the embedded suite.")
@option("--lines", group="input", type=click.IntRange(2), help="Maximum number of lines, spread over tasks; default: all.")
@option("--skip-bad", group="input", is_flag=True, help="Skip and count invalid lines instead of failing.")
@option(
    "--scoring",
    group="input",
    type=click.Choice(SCORINGS),
    default="reply",
    help="Score the generated reply, or the most probable of the answers that a metric knows (yes-no, vsr).",
)
@session_options
@option("--budget", group="limit", type=_PATH, help="Drift budget (TOML); default: the budget of this package.")
@option(
    "--update-budget", "updates", group="limit", is_flag=True, help="Write the measured values, plus a margin, to --budget."
)
@option(
    "--margin",
    group="limit",
    type=click.FloatRange(0),
    default=0.25,
    help="Margin of --update-budget; 0.25 is 25 % more drift.",
)
@option(
    "--report", group="output", type=_PATH, help="Directory for report.json, .html, .md, junit.xml, badge.svg and lines.jsonl."
)
@option("--against", group="limit", type=_PATH, help="Report or bundle of this model that the build must not be worse than.")
@option("--previous", group="output", type=_PATH, help="Report to show changes from; default: that of --against or --report.")
@option("--history", group="output", type=_PATH, help="History (JSON lines) to append to.")
@option("--all", "everything", group="output", is_flag=True, help="Print every row of every table.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of tables.")
@option("--commit", group="output", envvar="GITHUB_SHA", help="Commit for the report; default: HEAD of this directory.")
@option(
    "--attribution-lines",
    group="advanced",
    type=click.IntRange(0),
    help="Lines on which each part is tested; 0 tests none; default: 16, or 2 if the model is large.",
)
@explain_option
@debug_option
def regress(
    opening: Opening,
    budget: Path | None,
    updates: bool,
    margin: float,
    report: Path | None,
    previous: Path | None,
    history: Path | None,
    everything: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare BUNDLE with its float model on a suite, with the runtime that ships, and check a drift budget.

    Exit codes: 0 within the budget; 1 budget exceeded, or too few images to judge by it; 2 bad input; 3 missing on this
    machine; 130 interrupted (with --report, the same command resumes the run).
    """
    if updates and budget is None:
        raise InputError("--update-budget needs --budget, the file to write")
    if updates and options["against"] is not None:
        raise InputError("--update-budget judges nothing, so it takes no --against; run twice")
    limits = None if updates else read_budget(budget)
    before = _previous(previous, options["against"], report)
    _check_outputs(report, history, budget if updates else None)
    run = Run(
        bundle=opening.bundle,
        device=opening.device,
        kernels=opening.kernels,
        vision_runtime=opening.vision_runtime,
        options=opening.options,
        **options,
    )
    name = None if updates else "the default budget" if budget is None else budget.name
    found = _measure(run, limits, name, report, before)
    if history is not None:
        append_history(history, found)
    _print(found, report, everything, as_json)
    if updates:
        assert budget is not None
        _update(budget, found, margin)
    elif reasons := failures(found.verdicts):
        raise DriftError(f"{'; '.join(reasons)}; do not ship this build")


def _previous(given: Path | None, *others: Path | None) -> Report | None:
    """Return the report to show changes from: the given one, or the first that is there; each a file or its directory."""
    if given is not None:
        return read_report(given / "report.json" if given.is_dir() else given)
    files = [other if other.is_file() else other / "report.json" for other in others if other is not None]
    return next((read_report(file) for file in files if file.is_file()), None)


def _check_outputs(report: Path | None, history: Path | None, new_budget: Path | None) -> None:
    """Refuse what cannot be written, or lacks a library, before anything is measured."""
    if report is not None:
        check_directory(report)
    if history is not None:
        check_directory(history.absolute().parent, ())
        check_history(history)
    if new_budget is not None:
        check_update(new_budget)


def _measure(run: Run, limits: Budget | None, budget: str | None, directory: Path | None, before: Report | None) -> Report:
    """Measure, and write the files of the report into the directory, which is locked meanwhile."""
    with ExitStack() as stack:
        if directory is not None:
            stack.enter_context(locked(directory))
        with stages() as on_step:
            found = measure(run, limits, budget, directory, on_step)
        if directory is not None:
            write_outputs(directory, found.report, _worst_images(found), before)
    return found.report


def _worst_images(found: RunResult) -> dict[str, bytes]:
    """Return the image files of the worst lines, by name."""
    suite, wanted = found.suite, {line.image for line in found.report.worst}
    images = {}
    for index, name in enumerate(suite.images):
        if name in wanted:
            content = suite.load(index)
            load_image(content)  # only what decodes as an image goes into a page
            images[name] = content if isinstance(content, bytes) else content.read_bytes()
    return images


def _print(report: Report, directory: Path | None, everything: bool, as_json: bool) -> None:
    if as_json:
        click.echo(report_json(report).decode(), nl=False)
        return
    for table in report_tables(report, everything):
        results.print(table)
    if directory is not None:
        say(f"report: {directory / 'report.html'}")


def _update(budget: Path, report: Report, margin: float) -> None:
    figures = all_figures(report)
    limits = update_budget(budget, report.build.scheme, figures, report.noise_floor.get("fp16", {}), margin)
    tell(f"{budget}: wrote {len(limits)} limits of {report.build.scheme}: {', '.join(limits)}")
    few = [name for name in LIMITED if name in figures and figures[name].too_few is not None]
    if few:
        tell(f"{budget}: no new limit of {', '.join(few)}: of too few images; use a larger suite")
    tell("nothing was judged: review the limits, commit them, and run again without --update-budget")
