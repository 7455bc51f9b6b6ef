"""The cost of a run of the regression harness on cobra-mini: wall time and peak memory, by baseline and length of the suite."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cobra_edge.bench.machine import measure
from cobra_edge.bench.spread import spread
from cobra_edge.errors import MachineError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import HELDOUT, read_suite, write_suite

from .suite_cost_result import BaselineCost, LengthCost, SuiteCosts

SCHEMES = ("w4a16-g128", "w8a16-g128")
ROUNDS = 3
TIMES_LONGER = 8  # length of the longer suite; peak memory should not depend on it


def suite_costs(folder: Path, on_step: Callable[[str, int, int], None] = lambda name, done, total: None) -> SuiteCosts:
    """Run the harness as a user does, in alternation.

    Args:
        folder: for bundles and suites.
        on_step: called with the stage, how much of it is done, and the total.

    Returns:
        Costs by scheme and baseline, and by number of lines.

    Raises:
        MachineError: a run exited with a code other than 0.
    """
    bundles = {}
    for scheme in ("fp16", *SCHEMES):
        on_step(f"export of {scheme}", 0, 1)
        bundles[scheme] = export_bundle(
            "mini", target_named("cpu"), folder / scheme, scheme=scheme, method="rtn", vision_precision="fp32"
        ).directory
    wanted = [(scheme, kind) for scheme in SCHEMES for kind in ("golden lines", "fp16 bundle", "checkpoint")]
    given = {"golden lines": [], "fp16 bundle": ["--baseline", str(bundles["fp16"])], "checkpoint": ["--baseline", "mini"]}
    runs: dict[tuple[str, str], list[_Run]] = {key: [] for key in wanted}
    for turn in range(ROUNDS):
        for done, (scheme, kind) in enumerate(wanted):
            on_step("runs", turn * len(wanted) + done, ROUNDS * len(wanted))
            runs[scheme, kind].append(_run([str(bundles[scheme]), *given[kind]]))
    rows = [
        BaselineCost(
            scheme,
            kind,
            found[0].lines,
            ROUNDS,
            spread([round(run.seconds, 2) for run in found]),
            spread([round(run.peak_mib, 1) for run in found]),
        )
        for (scheme, kind), found in runs.items()
    ]
    lengths = []
    for times in (1, TIMES_LONGER):
        on_step("longer suites", times, TIMES_LONGER)
        suite = folder / f"times-{times}.jsonl"
        write_suite(suite, [line for _ in range(times) for line in _heldout()])
        arguments = [str(bundles[SCHEMES[0]]), *given["fp16 bundle"], "--suite", str(suite), "--attribution-lines", "0"]
        found = [_run(arguments) for _ in range(ROUNDS)]
        peaks, seconds = [round(run.peak_mib, 1) for run in found], [round(run.seconds, 1) for run in found]
        lengths.append(LengthCost(found[0].lines, spread(peaks), spread(seconds)))
    return SuiteCosts(rows=tuple(rows), lengths=tuple(lengths))


def _heldout() -> list[Line]:
    directory = HELDOUT.parent
    return [
        Line(line.prompt, line.answer, line.task, None if line.image is None else str(directory / line.image))
        for line in read_suite(HELDOUT)
    ]


@dataclass(frozen=True)
class _Run:
    """Wall time and peak memory of one run, and the number of lines."""

    seconds: float
    peak_mib: float
    lines: int


def _run(arguments: list[str]) -> _Run:
    done = measure(["cobra_edge.regress", *arguments, "--json"])
    if done.exit_code:
        raise MachineError(f"regress failed with exit code {done.exit_code}; see its messages above")
    lines = json.loads(done.stdout)["suite"]["lines"]
    return _Run(done.seconds, done.peak_bytes / 2**20, lines)
