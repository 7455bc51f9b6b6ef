"""Regress: hold a build against its float model, with a budget and an exit code.

python -m cobra_edge.regress BUNDLE --budget budget.toml --report drift
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from ..decode.backends import DEVICES, KERNELS
from ..decode.decoder import ACTIVATIONS, DecoderOptions
from ..errors import DriftError, InputError
from ..inference.session_options import threads_option
from ..inputs.image import load_image
from ..terminal.output import debug_option, results, say, stages, tell
from ..vision.runtimes import RUNTIME_NAMES
from .budget import read_budget
from .journal import locked
from .outputs.history import append_history, check_history
from .outputs.rows import all_figures
from .outputs.terminal import report_tables
from .outputs.write import check_directory, report_json, write_outputs
from .report import Report, read_report
from .runner import Run, RunResult, measure

_FILE = click.Path(path_type=Path)


@click.command(
    epilog="Example: python -m cobra_edge.regress bundles/demo --report drift --history drift.jsonl",
)
@click.argument("bundle", type=_FILE)
@click.option(
    "--baseline",
    default="fp16",
    show_default=True,
    help="fp16 (the float model's answers in the bundle), another bundle, or a checkpoint: mini, a hub name, a directory.",
)
@click.option("--suite", type=_FILE, help="JSON lines; default: the bundle's golden lines, or the embedded held-out suite.")
@click.option("--lines", type=click.IntRange(2), help="Ask so many lines only, spread over the tasks.")
@click.option("--skip-bad", is_flag=True, help="Leave out and count lines that are not what they should be.")
@click.option("--budget", type=_FILE, help="Limits (TOML); default: those that ship.")
@click.option("--update-budget", is_flag=True, help="Write today's figures and a margin into --budget, for review.")
@click.option(
    "--margin", type=click.FloatRange(0), default=0.25, show_default=True, help="Of --update-budget: how much more drift."
)
@click.option("--report", type=_FILE, help="Directory for report.json, report.md, junit.xml, report.html and lines.jsonl.")
@click.option("--previous", type=_FILE, help="report.json to compare with; default: the one in --report.")
@click.option("--history", type=_FILE, help="JSON lines that one line is added to.")
@click.option("--commit", envvar="GITHUB_SHA", help="What was built; default: git's HEAD here.")
@click.option("--attribution-lines", type=click.IntRange(0), help="Try every part on so many lines; 0: not at all.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where it runs.")
@click.option(
    "--decoder-kernels", "kernels", type=click.Choice(KERNELS), default="auto", show_default=True, help="Which decoder."
)
@click.option("--vision-runtime", type=click.Choice(RUNTIME_NAMES), default="auto", show_default=True, help="What sees.")
@threads_option
@click.option("--activations", type=click.Choice(ACTIVATIONS), help="What enters a product; default: as the recipe says.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object instead of tables.")
@debug_option
def measured(
    bundle: Path,
    budget: Path | None,
    update_budget: bool,
    margin: float,
    report: Path | None,
    previous: Path | None,
    history: Path | None,
    threads: int | None,
    activations: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask BUNDLE a suite on the runtime that ships, and say how far its answers are from the float model's.

    Exit codes: 0 within the budget; 1 beyond it; 2 bad input; 3 this machine lacks something; 130 interrupted (with --report
    the same command goes on where it was).
    """
    if update_budget and budget is None:
        raise InputError("--update-budget needs --budget, the file to write")
    limits = None if update_budget else read_budget(budget)
    before = _previous(previous, report)
    if report is not None:
        check_directory(report)
    if history is not None:  # what cannot be one is refused before anything is measured
        check_directory(history.absolute().parent, ())
        check_history(history)
    run = Run(bundle=bundle, options=DecoderOptions(threads, activations), **options)
    name = None if update_budget else "the budget that ships" if budget is None else budget.name
    with ExitStack() as held:
        if report is not None:
            held.enter_context(locked(report))
        with stages() as on_step:
            found = measure(run, limits, name, report, on_step)
        if report is not None:
            write_outputs(report, found.report, _images(found), before)
    if history is not None:
        append_history(history, found.report)
    if as_json:
        click.echo(report_json(found.report).decode(), nl=False)
    else:
        for table in report_tables(found.report):
            results.print(table)
        if report is not None:
            say(f"report: {report / 'report.html'}")
    if update_budget:
        assert budget is not None
        _update(budget, found.report, margin)
    failed = [f"{v.measure} ({v.rule})" for v in found.report.verdicts if not v.within]
    if failed:
        raise DriftError(f"the drift budget is exceeded by {', '.join(failed)}; do not ship this build")


def _previous(given: Path | None, directory: Path | None) -> Report | None:
    """Return the report to compare with: the given one, or what an earlier run left in the directory."""
    if given is not None:
        return read_report(given / "report.json" if given.is_dir() else given)
    left = None if directory is None else directory / "report.json"
    return read_report(left) if left is not None and left.is_file() else None


def _images(found: RunResult) -> dict[str, bytes]:
    """Return the files of the worst lines' images."""
    suite, wanted = found.suite, {line.image for line in found.report.worst}
    images = {}
    for index, name in enumerate(suite.images):
        if name in wanted:
            content = suite.load(index)
            load_image(content)  # nothing that is no image goes into a page
            images[name] = content if isinstance(content, bytes) else content.read_bytes()
    return images


def _update(budget: Path, report: Report, margin: float) -> None:
    from .update_budget import update_budget

    limits = update_budget(budget, report.build.scheme, all_figures(report), report.noise_floor.get("fp16", {}), margin)
    tell(f"{budget}: {len(limits)} limits of {report.build.scheme} written; look at them before you commit")
