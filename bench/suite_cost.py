"""What a run of the regression harness takes on cobra-mini: seconds and peak memory, by baseline and by the suite's length."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cobra_edge.bench.machine import measure
from cobra_edge.bench.spread import spread
from cobra_edge.errors import MachineError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import HELDOUT, read_suite, write_suite

SCHEMES = ("w4a16-g128", "w8a16-g128")
ROUNDS = 3
TIMES_LONGER = 8  # the longer suite, whose peak memory shall be the shorter one's


def suite_costs(folder: Path, on_step: Callable[[str, int, int], None] = lambda name, done, total: None) -> dict[str, Any]:
    """Run the harness as a user does, in turns.

    Args:
        folder: where bundles and suites may be put.
        on_step: told a stage's name, how much of it is done, and of what.

    Returns:
        rows: by scheme and baseline the seconds of a whole run, its attribution included, and its peak memory; and
        lengths: the peak by the number of lines.

    Raises:
        MachineError: a run ended with another exit code than 0.
    """
    bundles = {}
    for scheme in ("fp16", *SCHEMES):
        on_step(f"export of {scheme}", 0, 1)
        bundles[scheme] = export_bundle("mini", target_named("cpu"), folder / scheme, scheme=scheme).directory
    wanted = [(scheme, kind) for scheme in SCHEMES for kind in ("golden lines", "fp16 bundle", "checkpoint")]
    given = {"golden lines": [], "fp16 bundle": ["--baseline", str(bundles["fp16"])], "checkpoint": ["--baseline", "mini"]}
    runs: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in wanted}
    for turn in range(ROUNDS):
        for done, (scheme, kind) in enumerate(wanted):
            on_step("runs", turn * len(wanted) + done, ROUNDS * len(wanted))
            runs[scheme, kind].append(_run([str(bundles[scheme]), *given[kind]]))
    rows = [
        {
            "scheme": scheme,
            "baseline": kind,
            "lines": int(found[0]["lines"]),
            "rounds": ROUNDS,
            "seconds": spread([round(r["seconds"], 2) for r in found]),
            "peak_mib": spread([round(r["peak_mib"], 1) for r in found]),
        }
        for (scheme, kind), found in runs.items()
    ]
    lengths = []
    for times in (1, TIMES_LONGER):
        on_step("longer suites", times, TIMES_LONGER)
        suite = folder / f"times-{times}.jsonl"
        write_suite(suite, [line for _ in range(times) for line in _heldout()])
        arguments = [str(bundles[SCHEMES[0]]), *given["fp16 bundle"], "--suite", str(suite), "--attribution-lines", "0"]
        found = [_run(arguments) for _ in range(ROUNDS)]
        peaks, seconds = ([round(r[name], 1) for r in found] for name in ("peak_mib", "seconds"))
        lengths.append({"lines": int(found[0]["lines"]), "peak_mib": spread(peaks), "seconds": spread(seconds)})
    return {"rows": rows, "lengths": lengths}


def _heldout() -> list[Line]:
    directory = HELDOUT.parent
    return [
        Line(line.prompt, line.answer, line.task, None if line.image is None else str(directory / line.image))
        for line in read_suite(HELDOUT)
    ]


def _run(arguments: list[str]) -> dict[str, float]:
    done = measure(["cobra_edge.regress", *arguments, "--json"])
    if done.exit_code:
        raise MachineError(f"regress ended with exit code {done.exit_code}; see its messages above")
    lines = json.loads(done.stdout)["suite"]["lines"]
    return {"seconds": done.seconds, "peak_mib": done.peak_bytes / 2**20, "lines": lines}
