"""The steps of bench/gpu.sh, with a time limit each: standard library alone, for a machine where nothing is installed yet."""

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
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
CARRIED = ROOT / "build" / "gpu"
RESULTS = Path("bench") / "results"
ALL_SECONDS = 600  # of all steps together; a lent machine gives a call no more
SCHEMES = ("w4a16-g128", "w8a16-g128", "fp16")
PEERS = ("mamba-ssm", "bitsandbytes", "transformer")
_USER = ("-m", "cobra_edge.bench", "decode", "--device", "cuda")


@dataclass(frozen=True)
class Command:
    """A child process: arguments of Python, the seconds it may take, and the result that it writes (GPU is the GPU's name)."""

    arguments: tuple[str, ...]
    seconds: int
    file: str = ""


@dataclass(frozen=True)
class Step:
    """What `--step` names: commands one after the other, and those that go on beside the steps that follow."""

    name: str
    what: str
    commands: tuple[Command, ...]
    beside: tuple[Command, ...] = ()
    awaits: tuple[str, ...] = ()  # steps whose commands beside have to be done before

    @property
    def seconds(self) -> int:
        """The most that it takes, without what goes on beside."""
        return sum(command.seconds for command in self.commands)


def _lab(module: str, *arguments: str, seconds: int, file: str = "") -> Command:
    return Command(("-m", f"bench.{module}", *arguments), seconds, file)


def _decode(name: str, seconds: int, *arguments: str) -> Command:
    return Command((*_USER, "--name", f"{name}-GPU", *arguments), seconds, f"{name}-GPU.json")


def _repeat(option: str, values: Iterable[object]) -> tuple[str, ...]:
    return tuple(word for value in values for word in (option, str(value)))


def steps_of(rehearse: bool) -> tuple[Step, ...]:
    """Return the steps, in their order; at tiny sizes for a rehearsal on the emulated GPU."""
    shape = "cobra-mini" if rehearse else "cobra-3b"
    contexts, prompts = ((4, 8), (8,)) if rehearse else ((64, 1024, 4096, 16384, 65536), (256, 768))
    schemes, rounds, tokens = (SCHEMES[:1], 1, 2) if rehearse else (SCHEMES, 5, 128)
    minis = sorted(CARRIED.glob("mini-*")) if not rehearse else sorted(CARRIED.glob("mini-w4a16-g128"))
    small = ("--only", "test_codes and w4a16-g64", "--lines", "1", "--new-tokens", "2") if rehearse else ("--workers", "8")
    sizes = ("--shape", shape, *_repeat("--prompt-tokens", prompts))
    timed = (*sizes, "--rounds", str(rounds), "--new-tokens", str(tokens))
    brief = (*sizes, "--rounds", str(min(rounds, 3)), "--new-tokens", str(min(tokens, 64)))  # peers without a graph are slow
    peers = tuple(
        _decode(
            f"gpu-peers-{peer}", 45, *brief, "--scheme", SCHEMES[0], "--peer", peer,
            *_repeat("--context", contexts if peer == "transformer" else contexts[:1]),
        )
        for peer in PEERS
    )  # fmt: skip
    return (
        Step(
            "setup",
            "packages, kernels and the native decoder; beside later steps: random weights, mamba-ssm's kernels",
            (_lab("gpu_setup", *([] if rehearse else ["--in-memory"]), seconds=60),),
            (
                *(_lab("gpu_weights", shape, scheme, seconds=150) for scheme in schemes),
                *([] if rehearse else [_lab("gpu_setup", "--peers", seconds=330)]),
            ),
        ),
        Step(
            "parity",
            "every image of kernels.xz loaded, every kernel beside its reference, cobra-mini's answers",
            (_lab("gpu_parity", *map(str, minis), *small, seconds=170, file="gpu-parity-GPU.json"),),
        ),
        Step(
            "sanitizer",
            "memcheck, racecheck and synccheck, where compute-sanitizer is installed",
            (
                _lab(
                    "gpu_sanitizer", str(CARRIED / "mini-w4a16-g128"), "--seconds", "20",
                    seconds=70, file="gpu-sanitizer-GPU.json",
                ),
            ),
        ),
        Step(
            "kernels",
            "GB/s of each kernel at full size",
            (
                _lab(
                    "gpu_kernels", "--shape", shape, *_repeat("--scheme", schemes[:2]), *_repeat("--prompt-tokens", prompts),
                    "--rounds", str(rounds), seconds=45, file="gpu-kernels-GPU.json",
                ),
            ),
            awaits=("weights",),
        ),
        Step(
            "decode",
            "tok/s by context, prefill, time to first token, memory",
            (_decode("gpu-decode", 115, *timed, *_repeat("--scheme", schemes), *_repeat("--context", contexts)),),
            awaits=("weights",),
        ),
        Step("peers", "mamba-ssm, bitsandbytes and a transformer beside w4a16-g128", peers, awaits=("weights", "setup")),
    )  # fmt: skip


@dataclass
class Session:
    """Runs steps and keeps a journal of them, which is written after each command."""

    python: str
    logs: Path
    out: Path | None
    journal: list[dict[str, object]] = field(default_factory=list)
    beside: list[tuple[Command, subprocess.Popen[bytes], float]] = field(default_factory=list)
    gpu: str = "GPU"

    def environment(self) -> dict[str, str]:
        """Return the variables of children: the source tree, then packages that were carried."""
        site = CARRIED / "site"
        paths = [str(ROOT), *([str(site)] if site.is_dir() else []), os.environ.get("PYTHONPATH", "")]
        return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}

    def _start(self, command: Command, log: Path) -> subprocess.Popen[bytes]:
        arguments = [word.replace("-GPU", f"-{self.gpu}") for word in command.arguments]
        with log.open("ab") as out:
            out.write(f"== {shlex.join(arguments)}\n".encode())
            out.flush()
            # A group of its own, so that a limit ends what the command has started too.
            return subprocess.Popen(
                [self.python, *arguments], stdout=out, stderr=subprocess.STDOUT, env=self.environment(), start_new_session=True
            )

    def _await(self, step: str, command: Command, child: subprocess.Popen[bytes], began: float) -> bool:
        left = command.seconds - (time.monotonic() - began)
        try:
            code: int | None = child.wait(max(left, 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            code = None
        taken = time.monotonic() - began
        entry = {"step": step, "command": shlex.join(command.arguments), "seconds": round(taken, 1), "exit": code}
        said = "done" if code == 0 else f"stopped after its {command.seconds} s" if code is None else f"exit code {code}"
        print(f"{step:<10} {said} in {taken:.0f} s: {shlex.join(command.arguments)}", flush=True)
        if code != 0:
            entry["log"] = (self.logs / f"gpu-{step}.log").read_text(errors="replace")[-4000:]
            print(textwrap.indent("\n".join(str(entry["log"]).splitlines()[-12:]), "  | "), flush=True)
        self.journal.append(entry)
        self._keep(command)
        return code == 0

    def _keep(self, command: Command) -> None:
        """Write the journal, and copy results to where they are wanted, at once: the machine may be gone a moment later."""
        out = self.out or self.logs
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu-session.json").write_text(json.dumps(self.journal, indent=2) + "\n")
        result = RESULTS / command.file.replace("-GPU", f"-{self.gpu}")
        if self.out is not None and command.file and result.is_file():
            shutil.copy2(result, self.out)

    def finish_beside(self, matching: str) -> None:
        """Wait for those commands beside whose arguments contain a word."""
        for entry in [e for e in self.beside if any(matching in a for a in e[0].arguments)]:
            self.beside.remove(entry)
            command, child, began = entry
            self._await("beside", command, child, began)

    def run(self, step: Step) -> bool:
        """Run a step to its end or its limit; later ones do not depend on whether it failed."""
        for word in step.awaits:
            self.finish_beside(word)
        good = True
        for command in step.commands:
            began = time.monotonic()
            child = self._start(command, self.logs / f"gpu-{step.name}.log")
            good &= self._await(step.name, command, child, began)
        for command in step.beside:
            self.beside.append((command, self._start(command, self.logs / "gpu-beside.log"), time.monotonic()))
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


def plan_text(steps: tuple[Step, ...]) -> str:
    """Return what each step runs, for how long at most, and the file it writes."""
    lines = []
    for number, step in enumerate(steps, 1):
        lines.append(f"{number} {step.name}: {step.what}; {step.seconds} s at most")
        for command in (*step.commands, *step.beside):
            beside = " (beside the next steps)" if command in step.beside else ""
            lines.append(f"    {command.seconds:>3} s{beside}: python {shlex.join(command.arguments)}")
            lines += [f"          writes {RESULTS / command.file}"] if command.file else []
    return "\n".join([*lines, f"{sum(step.seconds for step in steps)} s in all, of {ALL_SECONDS}"])


def _named(steps: tuple[Step, ...], wanted: list[str]) -> list[Step]:
    by_name = {step.name: step for step in steps} | {str(n): step for n, step in enumerate(steps, 1)}
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise SystemExit(f"unknown step {unknown[0]!r}; known: {', '.join(step.name for step in steps)}, or their numbers")
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
    steps = steps_of(given.rehearse)
    if given.plan:
        print(plan_text(steps))
        return 0
    if given.prepare:
        return subprocess.run([sys.executable, "-m", "bench.gpu_prepare"], cwd=ROOT).returncode
    wanted = _named(steps, given.step)
    logs = Path("build") / "gpu-logs"
    logs.mkdir(parents=True, exist_ok=True)
    session = Session(sys.executable, logs, given.out)
    if steps[0] not in wanted:
        session.find_gpu()
    good = [session.run(step) for step in wanted]
    session.finish_beside("")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
