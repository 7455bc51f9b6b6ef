"""Doctor: check what this machine can run, and why not.

cobra-edge doctor bundles/demo
"""

from __future__ import annotations

from pathlib import Path

import click

from ..environment.threads import use_threads
from ..errors import MachineError
from ..terminal.listing import Listing, Row
from ..terminal.option_groups import Command, option
from ..terminal.output import cell, debug_option, main_of, print_json, results
from .bundle import BundleReport
from .report import Report, checks, examine

_STYLES = {"ok": "", "warning": "yellow", "missing": "dim"}


@click.command(cls=Command, epilog="Example: cobra-edge doctor bundles/demo --json")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object; include it when you report an issue.")
@debug_option
def command(bundle: Path | None, as_json: bool) -> int:
    """Check what this machine can run, and why not: processor, memory, GPU, vision runtimes, libraries, cache, and BUNDLE.

    Takes some seconds, since memory bandwidth and speed are measured. Exit code 3 if the bundle cannot run here.
    """
    use_threads(None)
    report = examine(bundle)
    if as_json:
        print_json(report)
    else:
        _print(report)
    return 0 if report.runs else MachineError.exit_code


def _print(report: Report) -> None:
    results.print(cell(f"cobra-edge {report.version} (commit {report.commit or 'unknown'}), Python {report.platform}"))
    results.print(_table("this machine", report))
    if report.bundle is not None:
        b = report.bundle
        results.print(_table(f"{b.directory}: {b.model}, {b.scheme}, for {b.target}", b))


def _table(title: str, report: Report | BundleReport) -> Listing:
    rows = [Row((name, check.verdict, check.text), _STYLES[check.verdict]) for name, check in checks(report)]
    return Listing(title, ("", "", ""), rows)


main = main_of(command)

if __name__ == "__main__":
    main()
