"""Run the steps of bench/gpu.sh, with a time limit each: standard library alone, as nothing may be installed yet."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

from .gpu_setup import CARRIED, ROOT
from .gpu_steps import FULL, RESULTS, TINY, Command, Step, plan_text, steps_of


@dataclass(frozen=True, eq=False)
class Running:
    """A command that was started: its process, when, its log, and where that began."""

    command: Command
    child: subprocess.Popen[bytes]
    began: float
    log: Path
    begin: int

    def said(self) -> str:
        """Return the end of what it wrote."""
        return self.log.read_bytes()[self.begin :].decode(errors="replace")[-4000:]


@dataclass
class Session:
    """Runs steps and keeps a journal of them, which is written after each command."""

    python: str
    logs: Path
    out: Path | None
    journal: list[dict[str, object]] = field(default_factory=list)
    beside: list[Running] = field(default_factory=list)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    gpu: str = "GPU"

    def environment(self) -> dict[str, str]:
        """Return the variables of children: the source tree, then packages that were carried."""
        site = CARRIED / "site"
        paths = [str(ROOT), *([str(site)] if site.is_dir() else []), os.environ.get("PYTHONPATH", "")]
        commit = CARRIED / "commit"
        told = {"COBRA_COMMIT": commit.read_text().strip()} if commit.is_file() else {}
        return os.environ | told | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}

    def _start(self, command: Command, step: str) -> Running:
        arguments = [word.replace("-GPU", f"-{self.gpu}") for word in command.arguments]
        log = self.logs / f"gpu-{step}.log"
        with log.open("ab") as out:
            begin = out.tell()
            # A group of its own, so that a limit ends what the command has started too.
            child = subprocess.Popen(
                [self.python, *arguments], stdout=out, stderr=subprocess.STDOUT, env=self.environment(), start_new_session=True
            )
        self.started.append(child)
        return Running(command, child, time.monotonic(), log, begin)

    def stop(self) -> None:
        """End everything that was started and still runs."""
        for child in self.started:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def _finish(self, step: str, running: Running) -> bool:
        """Wait for a command until its limit; returns whether the session is good with what came of it."""
        command, child = running.command, running.child
        try:
            code: int | None = child.wait(max(command.seconds - (time.monotonic() - running.began), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            code = None
        taken, words = time.monotonic() - running.began, shlex.join(command.arguments)
        entry: dict[str, object] = {"step": step, "command": words, "seconds": round(taken, 1), "exit": code}
        said = "done" if code == 0 else f"stopped after its {command.seconds} s" if code is None else f"exit code {code}"
        print(f"{step:<10} {said} in {taken:.0f} s: {words}", flush=True)
        if code != 0:
            entry["log"] = running.said()
            print(textwrap.indent("\n".join(running.said().splitlines()[-12:]), "  | "), flush=True)
        self.journal.append(entry)
        self._keep(command)
        return code == 0 or command.optional

    def _keep(self, command: Command) -> None:
        """Write the journal, and copy results to where they are wanted, at once: the machine may be gone a moment later."""
        out = self.out or self.logs
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu-session.json").write_text(json.dumps(self.journal, indent=2) + "\n")
        result = RESULTS / command.file.replace("-GPU", f"-{self.gpu}")
        if self.out is not None and command.file and result.is_file():
            shutil.copy2(result, self.out)

    def finish_beside(self, matching: str) -> bool:
        """Wait for those commands beside whose arguments contain a word; returns whether all are good."""
        found = [r for r in self.beside if any(matching in a for a in r.command.arguments)]
        self.beside = [r for r in self.beside if r not in found]
        return all([self._finish("beside", running) for running in found])

    def run(self, step: Step) -> bool:
        """Run a step to its end or its limit, whether earlier ones failed or not; returns whether it was good."""
        good = all([self.finish_beside(word) for word in step.awaits])
        for command in step.commands:
            good &= self._finish(step.name, self._start(command, step.name))
        self.beside += [self._start(command, "beside") for command in step.beside]
        if step.name == "setup":
            self.find_gpu()
        return good

    def find_gpu(self) -> None:
        """Ask for the GPU's name, which results bear."""
        self.gpu = self._gpu_name() or self.gpu

    def _gpu_name(self) -> str:
        code = "from cobra_edge.bench.gpu import gpu_here, short_name; print(short_name(gpu_here().name))"
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, env=self.environment())
        if done.returncode:
            print(f"no GPU can be used here: {''.join(done.stderr.strip().splitlines()[-1:])}", flush=True)
        return done.stdout.strip()


def _named(steps: tuple[Step, ...], wanted: list[str]) -> list[Step]:
    """Return the steps with these names or numbers, all for none. Raises ArgumentTypeError for another."""
    by_name = {step.name: step for step in steps} | {str(n): step for n, step in enumerate(steps, 1)}
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        known = ", ".join(step.name for step in steps)
        raise argparse.ArgumentTypeError(f"unknown step {unknown[0]!r}; known: {known}, or their numbers")
    return [by_name[name] for name in wanted] if wanted else list(steps)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps that are named, or print the plan; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--plan", action="store_true", help="print the steps, their limits and files; needs no GPU")
    parser.add_argument("--step", action="append", default=[], metavar="N", help="run one step, by number or name; repeatable")
    parser.add_argument("--prepare", action="store_true", help="gather in build/gpu what a machine without a network lacks")
    parser.add_argument("--rehearse", action="store_true", help="run the steps at tiny sizes on the emulated GPU")
    parser.add_argument("--out", type=Path, metavar="DIR", help="copy each result there as soon as it is written")
    given = parser.parse_args(arguments)
    steps = steps_of(TINY if given.rehearse else FULL)
    try:
        wanted = _named(steps, given.step)
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if given.plan:
        print(plan_text(steps))
        return 0
    if given.prepare:
        return subprocess.run([sys.executable, "-m", "bench.gpu_prepare"], cwd=ROOT).returncode
    logs = Path("build") / "gpu-logs"
    logs.mkdir(parents=True, exist_ok=True)
    session = Session(sys.executable, logs, given.out)
    if steps[0] not in wanted:
        session.find_gpu()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        good = [session.run(step) for step in wanted]
        return 0 if session.finish_beside("") and all(good) else 1
    finally:
        session.stop()


if __name__ == "__main__":
    sys.exit(main())
