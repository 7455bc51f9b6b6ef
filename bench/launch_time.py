"""`python -m bench.launch_time`: from starting a command to its first output, cold and warm; and what a base install takes.

The commands alternate. Cold: the kernel drops its page cache before each run, for which root is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
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

ROOT = Path(__file__).resolve().parents[1]
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


class Install(msgspec.Struct, frozen=True):
    """From an empty environment to the first answer.

    Attributes:
        what: "wheel", or "source", which compiles the native decoder and the CUDA kernels.
        seconds: pip's, with the libraries already downloaded.
        answer_seconds: of the first `run`, which imports modules that were never compiled.
        megabytes: of the environment.
    """

    what: str
    seconds: float
    answer_seconds: float
    megabytes: float


class LaunchTimeResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.launch_time`.

    Attributes:
        rounds: runs of each command.
        launches: by command.
        installs: by what is installed.
        installed_bytes: the files of each distribution of a base install, without compiled Python, largest first.
        machine: that it was measured on.
    """

    bench: str = "launch_time"
    rounds: int
    launches: tuple[Launch, ...]
    installs: tuple[Install, ...]
    installed_bytes: dict[str, int]
    machine: Machine


@click.command(cls=Command, epilog="Example: python -m bench.launch_time --rounds 5")
@option("--rounds", group="measurement", type=click.IntRange(1), default=9, help="Runs of each command.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def launch_time(rounds: int, as_json: bool) -> None:
    """Measure the time to the first output of `--help`, `--version` and `run`, and the base install: its size and its time."""
    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        task = bar.add_task("export of cobra-mini", total=None)
        bundle = Path(folder) / "bundle"
        export = _ours(
            "export", "--target", "cpu", "--quality", "fast", "--out", str(bundle)
        )  # its weights cost the same to open
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
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
        task = bar.add_task("installs", total=2)
        installs = []
        for what, source in (("wheel", _wheel(Path(folder))), ("source", ROOT)):
            installs.append(install(what, source, Path(folder) / what, run[1:]))
            bar.advance(task)
    result = LaunchTimeResult(
        rounds=rounds,
        launches=tuple(
            Launch(name, spread(found[name, False]), spread(found[name, True]) if (name, True) in found else None)
            for name in commands
        ),
        installs=tuple(installs),
        installed_bytes=installed_bytes("cobra-edge"),
        machine=machine(),
    )
    file = save_result(NAME, result)
    if as_json:
        print_json(result)
    else:
        print_result([launch_time_table(result), installs_table(result)], file)


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


def _wheel(folder: Path) -> Path:
    """Build the wheel of this tree, for this machine."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(what: str, source: Path, environment: Path, answer: Sequence[str]) -> Install:
    """Install a wheel or a tree without extras into a new environment, with this Python's exact versions; then answer.

    Args:
        what: name of the row.
        source: a wheel, or a tree, of which a copy without builds is installed.
        environment: directory to make.
        answer: arguments of cobra-edge.
    """
    venv.create(environment)
    python = str(environment / "bin" / "python")
    if source.is_dir():
        copy = environment.with_name(f"{what}-tree")
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "bundles", "__pycache__"))
        source = copy
    pins = ROOT / "constraints" / f"python{sys.version_info[0]}.{sys.version_info[1]}.txt"
    exact = ["--constraint", str(pins), "--build-constraint", str(ROOT / "constraints" / "build.txt")]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", *exact]
    base = [f"{name}=={metadata.version(name)}" for name in installed_bytes("cobra-edge") if name != "cobra-edge"]
    subprocess.run([*pip[:3], "download", "--quiet", "--no-deps", "--dest", str(environment), *base], check=True)
    began = time.perf_counter()
    subprocess.run([*pip, "--find-links", str(environment), str(source)], check=True)
    installed = time.perf_counter() - began
    for file in environment.glob("*.whl"):
        file.unlink()
    size = sum(file.stat().st_size for file in environment.rglob("*") if file.is_file() and not file.is_symlink())
    took = first_output_seconds([str(environment / "bin" / "cobra-edge"), *answer])
    return Install(what, round(installed, 1), round(took, 2), round(size / 1e6, 1))


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


def installs_table(result: LaunchTimeResult) -> Table:
    """Return what installing costs up to the first answer."""
    return Table(
        ("from an empty environment, by", "install, s", "first answer, s", "environment, MB"),
        [[i.what, f"{i.seconds:.1f}", f"{i.answer_seconds:.2f}", f"{i.megabytes:.0f}"] for i in result.installs],
    )


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**missed**"


if __name__ == "__main__":
    main_of(launch_time)()
