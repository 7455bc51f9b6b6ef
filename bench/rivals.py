"""`python -m bench.rivals`: Cobra's decoder beside those of the systems that its paper names, and of today's, on this CPU.

Random weights in the published shapes, 4 bit: ours by the native decoder, the others by llama.cpp (Q4_0), and Cobra by both,
since the paper's factor is one of architectures and of frameworks. All use the same threads, one after another, in an order
that is reversed every other round. Right before each, ours is timed again: ratios are to that. Vision is not measured: a prompt
is the tokens that a picture takes, and a question. Long contexts of a transformer are not read but filled with zeros, since the
time of a token depends on how many keys there are and not on what they hold; ours are read.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import click
import numpy as np
from rich.progress import Progress

from cobra_edge.bench.decode_request import BUNDLES
from cobra_edge.bench.llamacpp_runner import SCRIPT, Child, check_peer, started
from cobra_edge.bench.machine import machine
from cobra_edge.bench.random_bundle import random_bundle
from cobra_edge.bench.results import save_result
from cobra_edge.bench.roofline import Memory, token_bytes
from cobra_edge.bench.runners import Prediction, predictions_of
from cobra_edge.bench.spread import Spread, spread
from cobra_edge.bench.tables import print_result
from cobra_edge.bundle.memory_plan import state_bytes
from cobra_edge.bundle.reader import DECODER, Bundle
from cobra_edge.decode.cpu import CpuDecoder
from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.environment.available_memory import available_bytes
from cobra_edge.environment.threads import default_threads
from cobra_edge.errors import MachineError
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, print_json, progress

from .rival_gguf import write_rival
from .rival_shapes import Decoder, Rivals, System, read_rivals
from .rivals_result import OURS, DecoderRow, RivalsResult, SystemRow, crossings_table, draw_rivals, memory_table, speed_table

NAME = "rivals"
SCHEME = "w4a16-g128"
CONTEXTS = (64, 1024, 4096, 16384, 65536)
QUESTION_TOKENS, NEW_TOKENS = 32, 16
_WARM_TOKENS = 16
_SETTLE_SECONDS = 0.1  # idle threads of a child spin for a while before they sleep
_LEFT_BYTES = 3 << 29  # of memory, for what is neither weights nor cache


class Contender(Protocol):
    """A decoder that is open. Times are seconds of the work alone."""

    version: str

    def first_token(self, tokens: int) -> float:
        """Read a prompt of this many tokens from an empty state."""
        ...

    def follow_up(self, context: int, tokens: int) -> float:
        """Read this many tokens after a context of that length, whose state is there."""
        ...

    def steps(self, count: int, context: int) -> float:
        """Decode this many tokens after a context of that length."""
        ...

    def state_bytes(self, context: int) -> int:
        """Return the size of the state or cache after it."""
        ...


class Ours:
    """The native decoder with int8 activations."""

    version = ""

    def __init__(self, bundle: Bundle, threads: int, predictions: dict[int, Prediction]) -> None:
        """Open the decoder; states after contexts were read before."""
        self.decoder = CpuDecoder(bundle, DecoderOptions(threads, "int8"))
        self._bundle, self._predictions, self._random = bundle, predictions, np.random.default_rng(1)

    def _tokens(self, count: int) -> list[int]:
        return self._random.integers(0, self.decoder.config.vocab, count).tolist()

    def first_token(self, tokens: int) -> float:
        """See `Contender.first_token`."""
        prompt, state = self._tokens(tokens), self.decoder.new_state()
        began = time.perf_counter()
        self.decoder.prefill(self.decoder.embed(prompt), state)
        return time.perf_counter() - began

    def follow_up(self, context: int, tokens: int) -> float:
        """See `Contender.follow_up`; the state is copied, which is timed too."""
        prompt = self._tokens(tokens)
        began = time.perf_counter()
        self.decoder.prefill(self.decoder.embed(prompt), self._predictions[context].state.copy())
        return time.perf_counter() - began

    def steps(self, count: int, context: int) -> float:
        """See `Contender.steps`."""
        tokens, state = self._tokens(count), self._predictions[context].state.copy()
        began = time.perf_counter()
        for token in tokens:
            self.decoder.step(token, state)
        return time.perf_counter() - began

    def state_bytes(self, context: int) -> int:
        """See `Contender.state_bytes`; it is the same after every context."""
        return state_bytes(self._bundle.manifest.model)


class LlamaCppRival:
    """llama.cpp in a child process."""

    def __init__(self, child: Child) -> None:
        """Wait for the child's facts."""
        self.version, self._child = str(child.answer().get("version", "")), child

    def first_token(self, tokens: int) -> float:
        """See `Contender.first_token`."""
        return float(self._child.ask(prefill=tokens)["seconds"])

    def follow_up(self, context: int, tokens: int) -> float:
        """See `Contender.follow_up`."""
        return float(self._child.ask(question=tokens, context=context)["seconds"])

    def steps(self, count: int, context: int) -> float:
        """See `Contender.steps`."""
        self._child.ask(fill=context)
        return float(self._child.ask(steps=count)["seconds"])

    def state_bytes(self, context: int) -> int:
        """See `Contender.state_bytes`."""
        return int(self._child.ask(memory=context)["state_bytes"])


@dataclass(eq=False)
class Entry:
    """One decoder by one runtime, and what was found.

    Attributes:
        decoder, runtime: their names.
        opened: opens it.
        contexts: where decoding is timed.
        prompts: tokens of pictures.
        weights_bytes: of all tensors.
        token_bytes: bytes that a token after a context needs.
        not_measured: other contexts, and why.
        found: measurements by what and tokens.
        state: bytes by context.
        version: of llama.cpp's library.
    """

    decoder: str
    runtime: str
    opened: Callable[[], AbstractContextManager[Contender]]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    weights_bytes: int
    token_bytes: Callable[[int], int]
    not_measured: dict[int, str] = field(default_factory=dict)
    found: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    state: dict[int, int] = field(default_factory=dict)
    version: str = ""

    def row(self) -> DecoderRow:
        """Return the medians and extremes of all rounds."""

        def of(what: str) -> dict[int, Spread]:
            return {tokens: spread(values) for (name, tokens), values in self.found.items() if name == what}

        return DecoderRow(
            decoder=self.decoder,
            runtime=self.runtime,
            version=self.version,
            weights_bytes=self.weights_bytes,
            decode_tok_s=of("decode"),
            share=of("share"),
            of_ours=of("of ours"),
            state_bytes=self.state,
            first_token_seconds=of("first token"),
            follow_up_seconds=of("follow-up"),
            not_measured=self.not_measured,
        )


@click.command(cls=Command, epilog="Example: python -m bench.rivals --peer-python peers/bin/python")
@option("--rival", "chosen", group="input", multiple=True, help="A system of bench/rivals.toml; repeatable. Default: all.")
@option("--peer-python", group="input", default="python3", show_default=True, help="Interpreter that has llama-cpp-python.")
@option(
    "--context",
    "contexts",
    group="measurement",
    type=click.IntRange(64, 1 << 20),
    multiple=True,
    default=CONTEXTS,
    show_default=True,
    help="Tokens before those that are timed; repeatable.",
)
@option("--rounds", group="measurement", type=click.IntRange(1), default=3, show_default=True, help="How often each is timed.")
@option("--threads", group="measurement", type=click.IntRange(1), default=None, help="Default: one per physical core.")
@option(
    "--reading-minutes",
    group="measurement",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="Longest time to read one of our contexts; of those that take longer the shortest alone is read, the others are told.",
)
@option("--name", group="output", default=NAME, show_default=True, help="Name of the result.")
@option("--plot", group="output", type=click.Path(path_type=Path), default=None, help="Also draw speed and memory as a PNG.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def rivals(
    chosen: tuple[str, ...],
    peer_python: str,
    contexts: tuple[int, ...],
    rounds: int,
    threads: int | None,
    reading_minutes: int,
    name: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare decoders of Cobra's rivals with ours on this CPU, over the context."""
    known, team, contexts = read_rivals(), threads or default_threads(), tuple(sorted(set(contexts)))
    systems = {each: known.system(each) for each in chosen or known.systems}
    systems = {OURS: known.system(OURS)} | systems  # which the others are compared with
    command = (peer_python, str(SCRIPT))
    check_peer(command)
    _require_room(known, systems.values())
    with progress() as bar:
        ours, entries = _prepared(known, systems, command, contexts, team, reading_minutes, bar)
        began, memory = time.perf_counter(), Memory(team)
        reads = list(_measured(ours, entries, memory, rounds, bar))
        minutes = (time.perf_counter() - began) / 60
    result = RivalsResult(
        threads=team,
        rounds=rounds,
        contexts=contexts,
        new_tokens=NEW_TOKENS,
        question_tokens=QUESTION_TOKENS,
        read_gb_s=spread(reads).scaled(1e-9),
        systems=tuple(SystemRow(n, s.decoder, s.image_tokens, s.trained_context) for n, s in systems.items()),
        decoders=tuple(entry.row() for entry in entries),
        minutes=minutes,
        machine=machine(),
    )
    file = save_result(name, result)
    if plot is not None:
        draw_rivals(result, plot)
    if as_json:
        print_json(result)
    else:
        print_result([speed_table(result), memory_table(result), crossings_table(result)], file)


def _require_room(known: Rivals, systems: Iterable[System]) -> None:
    """Raise MachineError for a decoder whose weights do not fit this machine's memory beside ours."""
    there = available_bytes()
    ours = known.decoders[known.system(OURS).decoder].weights_bytes()
    for name in {s.decoder: None for s in systems}:
        needed = known.decoders[name].weights_bytes() + ours + _LEFT_BYTES
        if there is not None and needed > there:
            raise MachineError(
                f"{name} does not fit: needs {needed / 2**30:.0f} GiB, {there / 2**30:.0f} GiB are available; "
                "choose others with --rival"
            )


def _prepared(
    known: Rivals,
    systems: dict[str, System],
    command: Sequence[str],
    contexts: tuple[int, ...],
    team: int,
    reading_minutes: int,
    bar: Progress,
) -> tuple[Ours, list[Entry]]:
    """Write files, read our contexts; returns Cobra-3.5B's decoder, open, and all entries, ours first."""
    own, others = [], []
    yardstick = None
    for name in dict.fromkeys(s.decoder for s in systems.values()):
        decoder = known.decoders[name]
        prompts = tuple(sorted({s.image_tokens for s in systems.values() if s.decoder == name}))
        if decoder.architecture == "mamba":
            entry, opened = _of_ours(name, decoder, prompts, contexts, team, reading_minutes, bar)
            own.append(entry)
            yardstick = yardstick or opened
        others.append(_of_llamacpp(name, decoder, prompts, command, contexts, team, bar))
    assert yardstick is not None
    return yardstick, own + others


def _of_ours(
    name: str, decoder: Decoder, prompts: tuple[int, ...], contexts: tuple[int, ...], team: int, minutes: int, bar: Progress
) -> tuple[Entry, Ours]:
    bundle = random_bundle(decoder.mamba, SCHEME, BUNDLES / f"bench-{name}-{SCHEME}", bar)
    predictions: dict[int, Prediction] = {}
    opened = Ours(bundle, team, predictions)
    rate = QUESTION_TOKENS * 4 / opened.first_token(QUESTION_TOKENS * 4)
    skipped = {c: f"not read: {c / rate / 60:.0f} minutes" for c in contexts[1:] if c > rate * 60 * minutes}
    kept = tuple(c for c in contexts if c not in skipped)
    predictions |= predictions_of(opened.decoder, (*kept, *prompts), bar)

    @contextmanager
    def again() -> Iterator[Ours]:
        yield Ours(bundle, team, predictions)

    manifest = bundle.manifest
    bytes_a_token = token_bytes(manifest.model, manifest.recipe)
    entry = Entry(
        name, "cobra_edge int8", again, kept, prompts, manifest.files[DECODER].bytes, lambda context: bytes_a_token, skipped
    )
    return entry, opened


def _of_llamacpp(
    name: str,
    decoder: Decoder,
    prompts: tuple[int, ...],
    command: Sequence[str],
    contexts: tuple[int, ...],
    team: int,
    bar: Progress,
) -> Entry:
    task = bar.add_task(f"{name} for llama.cpp", total=1)
    file = write_rival(decoder, BUNDLES / f"rival-{name}-Q4_0.gguf")
    bar.advance(task)
    there, weights = available_bytes(), decoder.weights_bytes()

    def needed(context: int) -> int:
        return weights + decoder.cache_bytes(context) + _LEFT_BYTES

    skipped = {
        c: f"does not fit: needs {needed(c) / 2**30:.0f} GiB" for c in contexts if there is not None and needed(c) > there
    }
    kept = tuple(c for c in contexts if c not in skipped)
    if not kept:
        raise MachineError(f"{name}: no context of {contexts} fits the memory of this machine")
    longest = max(*kept, *prompts) + QUESTION_TOKENS + NEW_TOKENS + _WARM_TOKENS

    @contextmanager
    def opened() -> Iterator[LlamaCppRival]:
        with started([*command, "serve", str(file), str(team), str(longest)]) as child:
            yield LlamaCppRival(child)

    return Entry(name, "llama.cpp Q4_0", opened, kept, prompts, weights, decoder.token_bytes, skipped)


def _measured(ours: Ours, entries: Sequence[Entry], memory: Memory, rounds: int, bar: Progress) -> Iterator[float]:
    """Time all entries in rounds; yields the bandwidths that were read beside them, bytes per second."""
    task, shortest = bar.add_task("rounds", total=rounds * len(entries)), min(entries[0].contexts)
    for index in range(rounds):
        for entry in entries if index % 2 == 0 else reversed(entries):
            with entry.opened() as contender:
                yield _visit(entry, contender, ours, memory, shortest)
            bar.advance(task)


def _visit(entry: Entry, contender: Contender, ours: Ours, memory: Memory, shortest: int) -> float:
    """Time one entry once; returns the bandwidth in bytes per second."""
    entry.version = contender.version
    contender.first_token(_WARM_TOKENS)
    contender.steps(1, entry.contexts[0])
    time.sleep(_SETTLE_SECONDS)
    bandwidth = memory.read_bandwidth()
    own = NEW_TOKENS / ours.steps(NEW_TOKENS, shortest)
    for context in entry.contexts:
        rate = NEW_TOKENS / contender.steps(NEW_TOKENS, context)
        entry.found["decode", context].append(rate)
        entry.found["share", context].append(rate * entry.token_bytes(context) / bandwidth)
        entry.found["of ours", context].append(rate / own)
        if context not in entry.state:
            entry.state[context] = contender.state_bytes(context)
    for tokens in entry.prompts:
        prompt = tokens + QUESTION_TOKENS
        entry.found["first token", prompt].append(contender.first_token(prompt))
        entry.found["follow-up", tokens].append(contender.follow_up(tokens, QUESTION_TOKENS))
    return bandwidth


if __name__ == "__main__":
    main_of(rivals)()
