"""`python -m bench.launch_time`: from starting a command to its first output, cold and warm; and what a base install takes.

The commands alternate. Cold: the kernel drops its page cache before each run, for which root is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import click
import msgspec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cobra_edge.bench.machine import Machine, machine
from cobra_edge.bench.results import save_result
from cobra_edge.bench.spread import Spread, spread
from cobra_edge.bench.tables import NOT_MEASURED, Table, print_result
from cobra_edge.errors import MachineError
from cobra_edge.formats.package_data import MINI
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, print_json, progress

NAME = "launch-time"
QUESTION = "Is there a red circle?"
# Goals: milliseconds to the first output of warm runs, by command; and bytes of the base install.
GOALS_MS = {"cobra-edge --help": 150.0, "cobra-edge run": 700.0}
GOAL_BYTES = 120_000_000
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_LISTED = 5  # distributions in the table


class Launch(msgspec.Struct, frozen=True):
    """Milliseconds from starting a command to the first byte on stdout; cold is None where the page cache cannot be dropped."""

    command: str
    warm_ms: Spread
    cold_ms: Spread | None


class LaunchTimeResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.launch_time`.

    Attributes:
        rounds: runs of each command.
        launches: by command.
        installed_bytes: the files of each distribution of a base install, without compiled Python, largest first.
        machine: that it was measured on.
    """

    bench: str = "launch_time"
    rounds: int
    launches: tuple[Launch, ...]
    installed_bytes: dict[str, int]
    machine: Machine


@click.command(cls=Command, epilog="Example: python -m bench.launch_time --rounds 5")
@option("--rounds", group="measurement", type=click.IntRange(1), default=9, help="Runs of each command.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def launch_time(rounds: int, as_json: bool) -> None:
    """Measure the time to the first output of `--help`, `--version` and `run`, and the size of a base install."""
    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        task = bar.add_task("export of cobra-mini", total=None)
        bundle = Path(folder) / "bundle"
        subprocess.run(_ours("export", "--target", "cpu", "--out", str(bundle)), check=True, stdout=subprocess.DEVNULL)
        bar.remove_task(task)
        run = _ours("run", str(bundle), "--image", str(MINI / "demo.png"), "--prompt", QUESTION)
        commands = {"cobra-edge --help": _ours("--help"), "cobra-edge --version": _ours("--version"), "cobra-edge run": run}
        task = bar.add_task("runs", total=2 * rounds * len(commands))
        found: dict[tuple[str, bool], list[float]] = {}
        for cold in (False, True):
            for command in commands.values():
                if not cold:
                    first_output_seconds(command)  # fills the page cache
            for name, command in [*commands.items()] * rounds:
                if not cold or _drop_caches():
                    found.setdefault((name, cold), []).append(1000 * first_output_seconds(command))
                bar.advance(task)
    result = LaunchTimeResult(
        rounds=rounds,
        launches=tuple(
            Launch(name, spread(found[name, False]), spread(found[name, True]) if (name, True) in found else None)
            for name in commands
        ),
        installed_bytes=installed_bytes("cobra-edge"),
        machine=machine(),
    )
    file = save_result(NAME, result)
    if as_json:
        print_json(result)
    else:
        print_result([launch_time_table(result)], file)


def _ours(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("cobra-edge")), *arguments]


def first_output_seconds(command: Sequence[str]) -> float:
    """Return the time from starting a command to its first byte on stdout. Raises MachineError if it fails or says nothing."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stderr is not None
        first = os.read(child.stdout.fileno(), 1)
        took = time.perf_counter() - began
        child.stdout.read()
        said = child.stderr.read().decode(errors="replace")
    if child.returncode or not first:
        raise MachineError(f"{command[0]} ended with exit code {child.returncode} and said: {said or 'nothing'}")
    return took


def _drop_caches() -> bool:
    """Drop the page cache; False where this process may not."""
    try:
        os.sync()
        _DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def installed_bytes(name: str) -> dict[str, int]:
    """Return the bytes of the files of a distribution and of all that it requires, largest first, without compiled Python."""
    found: dict[str, int] = {}
    wanted = [name]
    while wanted:
        distribution = metadata.distribution(wanted.pop())
        key = canonicalize_name(distribution.metadata["Name"])
        if key in found:
            continue
        files = [Path(str(distribution.locate_file(f))) for f in distribution.files or [] if f.suffix != ".pyc"]
        found[key] = sum(file.stat().st_size for file in files if file.is_file())
        declared = map(Requirement, distribution.requires or [])
        wanted += [r.name for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def launch_time_table(result: LaunchTimeResult) -> Table:
    """Return the times beside their goals, and the size of a base install."""
    m, rows = result.machine, []
    for launch in result.launches:
        goal, cold = GOALS_MS.get(launch.command), launch.cold_ms
        verdict = "–" if goal is None else f"< {goal:.0f} ms, {_verdict(launch.warm_ms.median < goal)}"
        rows.append([
            f"`{launch.command}`",
            f"{launch.warm_ms.cell('.0f')} ms",
            NOT_MEASURED if cold is None else f"{cold.cell('.0f')} ms",
            verdict,
        ])  # fmt: skip
    total = sum(result.installed_bytes.values())
    largest = [f"{name} {size / 1e6:.0f}" for name, size in [*result.installed_bytes.items()][:_LISTED]]
    rows.append([
        "base install", f"{total / 1e6:.0f} MB", "–", f"< {GOAL_BYTES / 1e6:.0f} MB, {_verdict(total < GOAL_BYTES)}"
    ])  # fmt: skip
    return Table(
        ("what", "files in memory", "files on disk", "goal"),
        rows,
        f"To the first output on {m.processor}, {m.cores} cores, Python {m.python}: median (low–high) of {result.rounds} runs; "
        f"commit {m.commit}.",
        [f"Of the base install, MB: {', '.join(largest)}, {len(result.installed_bytes) - _LISTED} others."],
    )


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**missed**"


if __name__ == "__main__":
    main_of(launch_time)()
