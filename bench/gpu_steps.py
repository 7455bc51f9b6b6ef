"""The steps of bench/gpu.sh: what each runs, for how long at most, and which result it writes. The standard library alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .gpu_setup import CARRIED

RESULTS = Path("bench") / "results"
ALL_SECONDS = 600  # of all steps together, so that they fit ten minutes of a rented GPU
PEERS = ("mamba-ssm", "bitsandbytes", "transformer")
_OURS = "w4a16-g128"  # what peers are measured beside
_MINI = CARRIED / f"mini-{_OURS}"


@dataclass(frozen=True)
class Command:
    """A child process.

    Attributes:
        arguments: of Python; GPU stands for the GPU's name.
        seconds: it may take.
        file: the result that it writes, or "".
        optional: whether the session is good without it.
    """

    arguments: tuple[str, ...]
    seconds: int
    file: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Step:
    """What `--step` names.

    Attributes:
        name, what: for people.
        commands: one after the other.
        beside: commands that go on beside the steps that follow.
        awaits: words; commands beside that contain one have to be done before.
    """

    name: str
    what: str
    commands: tuple[Command, ...]
    beside: tuple[Command, ...] = ()
    awaits: tuple[str, ...] = ()

    @property
    def seconds(self) -> int:
        """The most that it takes, without what goes on beside."""
        return sum(command.seconds for command in self.commands)


@dataclass(frozen=True)
class Sizes:
    """What is measured: a published shape with random weights, and how much of it."""

    shape: str = "cobra-3b"
    schemes: tuple[str, ...] = (_OURS, "w8a16-g128", "fp16")
    contexts: tuple[int, ...] = (64, 1024, 4096, 16384, 65536)
    prompts: tuple[int, ...] = (256, 768)
    rounds: int = 5
    new_tokens: int = 128


FULL = Sizes()
TINY = Sizes("cobra-mini", (_OURS,), (4, 8), (8,), 1, 2)


def _repeat(option: str, values: Iterable[object]) -> tuple[str, ...]:
    return tuple(word for value in values for word in (option, str(value)))


def _lab(module: str, *arguments: str, seconds: int, file: str = "", optional: bool = False) -> Command:
    return Command(("-m", f"bench.{module}", *arguments), seconds, file, optional)


def _decode(name: str, sizes: Sizes, contexts: tuple[int, ...], *more: str, seconds: int, optional: bool = False) -> Command:
    arguments: tuple[str, ...] = ("--device", "cuda", "--name", f"{name}-GPU", "--shape", sizes.shape)
    arguments += (*_repeat("--prompt-tokens", sizes.prompts), *_repeat("--context", contexts))
    return Command(("-m", "cobra_edge.bench", "decode", *arguments, *more), seconds, f"{name}-GPU.json", optional)


def _setup(sizes: Sizes) -> Step:
    full = sizes is FULL
    weights = [_lab("gpu_weights", sizes.shape, scheme, seconds=150) for scheme in sizes.schemes]
    peers = [_lab("gpu_setup", "--peers", seconds=330, optional=True)] if full else []
    what = "packages, kernels and the native decoder; beside later steps: random weights, mamba-ssm's kernels"
    return Step("setup", what, (_lab("gpu_setup", *(["--in-memory"] if full else []), seconds=60),), (*weights, *peers))


def _parity(sizes: Sizes) -> Step:
    bundles = sorted(CARRIED.glob("mini-*")) if sizes is FULL else [_MINI]
    given: tuple[str, ...] = ("--workers", "8")
    if sizes is not FULL:
        given = ("--only", "test_codes and w4a16-g64", "--lines", "1", "--new-tokens", "2")
    what = "every image of kernels.xz loaded, every kernel beside its reference, cobra-mini's answers"
    command = _lab("gpu_parity", *map(str, bundles), *given, seconds=170, file="gpu-parity-GPU.json")
    return Step("parity", what, (command,))


def _sanitizer(_sizes: Sizes) -> Step:
    command = _lab("gpu_sanitizer", str(_MINI), "--seconds", "20", seconds=70, file="gpu-sanitizer-GPU.json")
    return Step("sanitizer", "memcheck, racecheck and synccheck, where compute-sanitizer is installed", (command,))


def _kernels(sizes: Sizes) -> Step:
    what = (*_repeat("--scheme", sizes.schemes[:2]), *_repeat("--prompt-tokens", sizes.prompts), "--rounds", str(sizes.rounds))
    command = _lab("gpu_kernels", "--shape", sizes.shape, *what, seconds=45, file="gpu-kernels-GPU.json")
    return Step("kernels", "GB/s of each kernel at full size", (command,), awaits=("weights",))


def _speed(sizes: Sizes) -> Step:
    more = ("--rounds", str(sizes.rounds), "--new-tokens", str(sizes.new_tokens), *_repeat("--scheme", sizes.schemes))
    command = _decode("gpu-decode", sizes, sizes.contexts, *more, seconds=115)
    return Step("decode", "tok/s by context, prefill, time to first token, memory", (command,), awaits=("weights",))


def _peers(sizes: Sizes) -> Step:
    # bitsandbytes has no CUDA graph: fewer rounds and tokens. Only a transformer slows down with the context.
    few = ("--rounds", str(min(sizes.rounds, 3)), "--new-tokens", str(min(sizes.new_tokens, 64)))
    commands = [
        _decode(
            f"gpu-peers-{peer}", sizes, sizes.contexts if peer == "transformer" else sizes.contexts[:1], *few,
            "--scheme", _OURS, "--peer", peer, seconds=45, optional=True,
        )
        for peer in (PEERS if sizes is FULL else PEERS[:1])  # torch sees no emulated GPU: one refusal is enough
    ]  # fmt: skip
    return Step("peers", f"{', '.join(PEERS)} beside {_OURS}", tuple(commands), awaits=("weights", "setup"))


def steps_of(sizes: Sizes) -> tuple[Step, ...]:
    """Return all steps in their order: what may run beside compilers first, then what is timed."""
    return tuple(step(sizes) for step in (_setup, _parity, _sanitizer, _kernels, _speed, _peers))


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
