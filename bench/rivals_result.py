"""The result of `bench.rivals`, its tables and its plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cobra_edge.bench.machine import Machine
from cobra_edge.bench.spread import Spread
from cobra_edge.bench.tables import NO_VALUE, Table

NAME = "rivals"
OURS = "Cobra-3.5B"
_GIB = 1 << 30


class DecoderRow(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder by one runtime. Keys are numbers of tokens.

    Attributes:
        decoder: its name in `rivals.toml`.
        runtime: "cobra_edge int8" or "llama.cpp Q4_0".
        version: of llama.cpp's library; empty for ours.
        weights_bytes: of all tensors.
        decode_tok_s: tokens per second after a context of that length.
        share: of the bandwidth bound: the bytes that a token needs, by the bandwidth measured beside it.
        of_ours: speed as a multiple of ours of Cobra-3.5B, timed right before it.
        state_bytes: of the KV cache or state after that context.
        first_token_seconds: of a prompt of that length, from an empty state.
        follow_up_seconds: of a second question after that many tokens, their state kept.
        not_measured: contexts that were not, and why.
    """

    decoder: str
    runtime: str
    version: str
    weights_bytes: int
    decode_tok_s: dict[int, Spread]
    share: dict[int, Spread]
    of_ours: dict[int, Spread]
    state_bytes: dict[int, int]
    first_token_seconds: dict[int, Spread]
    follow_up_seconds: dict[int, Spread]
    not_measured: dict[int, str]


class SystemRow(msgspec.Struct, frozen=True):
    """A system of `rivals.toml`, see there."""

    name: str
    decoder: str
    image_tokens: int
    trained_context: int


class RivalsResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.rivals`.

    Attributes:
        threads, rounds, contexts, new_tokens, question_tokens: what was timed.
        read_gb_s: memory bandwidth beside the runs.
        systems, decoders: what was compared.
        minutes: all of it, files already written.
        machine: that it was measured on.
    """

    bench: str = "rivals"
    threads: int
    rounds: int
    contexts: tuple[int, ...]
    new_tokens: int
    question_tokens: int
    read_gb_s: Spread
    systems: tuple[SystemRow, ...]
    decoders: tuple[DecoderRow, ...]
    minutes: float
    machine: Machine

    def rows(self) -> Iterator[tuple[SystemRow, DecoderRow]]:
        """Yield each system with each runtime that its decoder was run by."""
        for system in self.systems:
            for row in self.decoders:
                if row.decoder == system.decoder:
                    yield system, row


def short(tokens: int) -> str:
    """Return 4096 as "4k"."""
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def label(system: SystemRow, row: DecoderRow) -> str:
    """Return a system's name, with the runtime where it is a Cobra."""
    return f"{system.name}, {row.runtime}" if system.name.startswith("Cobra") else system.name


def speed_table(result: RivalsResult) -> Table:
    """Return time to first token, of a follow-up, and decoding speed by context, of each system."""
    m, rows = result.machine, []
    for system, row in result.rows():
        first = row.first_token_seconds[system.image_tokens + result.question_tokens]
        rows.append(
            [
                f"**{label(system, row)}**" if row.runtime.startswith("cobra") else label(system, row),
                str(system.image_tokens),
                f"{first.median:.1f}",
                f"{row.follow_up_seconds[system.image_tokens].median:.2f}",
                *(_speed(row, context) for context in result.contexts),
            ]
        )
    columns = ("system", "tokens of a picture", "first token, s", "next question, s")
    return Table(
        (*columns, *(f"tok/s at {short(c)}" for c in result.contexts)),
        rows,
        f"Decoders alone, 4 bit, random weights, on {m.processor}, {m.cores} cores: {result.threads} threads, median of "
        f"{result.rounds} rounds; memory bandwidth {result.read_gb_s.cell('.1f')} GB/s; commit {m.commit}.",
    )


def _speed(row: DecoderRow, context: int) -> str:
    if context in row.not_measured:
        return row.not_measured[context]
    return f"{row.decode_tok_s[context].median:.1f}"


def memory_table(result: RivalsResult) -> Table:
    """Return weights, and weights with cache or state by context, of each decoder."""
    seen, rows = set(), []
    for system, row in result.rows():
        if (row.decoder, row.runtime) in seen:
            continue
        seen.add((row.decoder, row.runtime))
        grown = [row.state_bytes.get(c) for c in result.contexts]
        rows.append(
            [
                label(system, row),
                f"{row.weights_bytes / 1e9:.2f}",
                *(NO_VALUE if n is None else f"{(row.weights_bytes + n) / 1e9:.2f}" for n in grown),
                str(system.trained_context),
            ]
        )
    columns = ("system", "weights, GB", *(f"with its state at {short(c)}" for c in result.contexts), "trained to, tokens")
    return Table(columns, rows)


def crossing(ours: float, contexts: Sequence[int], rates: Sequence[float]) -> float | None:
    """Return the context from which a rival is slower, None if it is not up to the longest; 0 if it always is.

    Args:
        ours: tok/s, at every context.
        contexts: lengths, ascending.
        rates: tok/s of the rival at them. Between two, time per token grows evenly, as the cache does.
    """
    slower = [1 / rate - 1 / ours for rate in rates]  # by seconds a token
    if slower[0] >= 0:
        return 0.0
    for (a, left), (b, right) in pairwise(zip(contexts, slower, strict=True)):
        if right >= 0:
            return a + (b - a) * -left / (right - left)
    return None


def crossings(result: RivalsResult) -> dict[str, float | None]:
    """Return by system the context from which our Cobra-3.5B decodes faster, see `crossing`."""
    ours = _of_ours(result)
    rate = float(np.median([s.median for s in ours.decode_tok_s.values()]))
    found = {}
    for system, row in result.rows():
        if not system.name.startswith("Cobra"):
            contexts = sorted(row.decode_tok_s)
            found[system.name] = crossing(rate, contexts, [row.decode_tok_s[c].median for c in contexts])
    return found


def _of_ours(result: RivalsResult) -> DecoderRow:
    decoder = next(s.decoder for s in result.systems if s.name == OURS)
    return next(row for row in result.decoders if row.decoder == decoder and row.runtime.startswith("cobra"))


def crossings_table(result: RivalsResult) -> Table:
    """Return from which context on Cobra-3.5B by our runtime decodes faster than each other system."""
    ours, rows = _of_ours(result), []
    for name, where in crossings(result).items():
        row = next(r for s, r in result.rows() if s.name == name)
        first, last = min(row.of_ours), max(row.of_ours)
        said = f"from {where:,.0f} tokens" if where else "always" if where == 0 else f"not up to {short(last)}"
        rows.append([name, said, *(f"{1 / row.of_ours[c].median:.2f}, at {short(c)}" for c in (first, last))])
    first, last = min(ours.decode_tok_s), max(ours.decode_tok_s)
    flat = ours.decode_tok_s[last].median / ours.decode_tok_s[first].median
    return Table(
        ("system", "Cobra-3.5B decodes faster", "times its speed, shortest context", "longest measured"),
        rows,
        notes=[
            f"Cobra-3.5B after {short(last)} tokens: {flat:.1%} of its speed after {first}, and the same "
            f"{ours.state_bytes[last] / 1e6:.0f} MB of state."
        ],
    )


def rivals_sentences(result: RivalsResult, paper_rival: str = "LLaVA-Phi") -> str:
    """Return where Cobra leads, where it does not, and what is the framework's, as a Markdown list with the measured numbers.

    Args:
        result: measured.
        paper_rival: a system of the paper, for the factor of the framework.
    """
    ours, where = _of_ours(result), crossings(result)
    own = next(system for system in result.systems if system.name == OURS)
    others = [(system, row) for system, row in result.rows() if not system.name.startswith("Cobra")]
    first, last = min(ours.decode_tok_s), max(ours.decode_tok_s)
    long = max(c for c in ours.decode_tok_s if all(c in row.decode_tok_s for _, row in others))
    rates = {system.name: row.decode_tok_s for system, row in others}
    behind = sorted((name for name in rates if where[name] != 0), key=lambda name: -rates[name][first].median)
    slower = [name for name in rates if rates[name][long].median < ours.decode_tok_s[long].median]
    caches = [row.state_bytes[long] / 1e6 for _, row in others]
    questions = [row.follow_up_seconds[system.image_tokens].median for system, row in others]
    rival = next(row for system, row in others if system.name == paper_rival)
    framework = next(row for row in result.decoders if row.decoder == ours.decoder and row is not ours)
    theirs, both = rival.decode_tok_s[first].median, framework.decode_tok_s[first].median / rival.decode_tok_s[first].median

    m, flat = result.machine, ours.decode_tok_s[last].median / ours.decode_tok_s[first].median
    faster = "; ".join(_said(name, where[name], rates[name], ours.decode_tok_s[first].median) for name in behind) or "none"
    return "\n".join(
        [
            f"Decoders alone, 4 bit, on {m.processor}, {m.cores} cores with {result.read_gb_s.median:.0f} GB/s:",
            "",
            f"* **Long contexts, further questions, fixed memory.** After {short(long)} tokens {OURS} decodes "
            f"{ours.decode_tok_s[long].median:.1f} tok/s, after {short(last)} still {flat:.1%} of its speed at {first}. Slower "
            f"at {short(long)}: {', '.join(slower) or 'none'}. Its state has {ours.state_bytes[long] / 1e6:.0f} MB, caches "
            f"there {min(caches):,.0f} to {max(caches):,.0f}. The next question about a picture takes it "
            f"{ours.follow_up_seconds[own.image_tokens].median:.2f} s to read, the others "
            f"{min(questions):.2f} to {max(questions):.2f}.",
            f"* **Not short contexts beside small models.** Faster at {first} tokens: {faster}.",
            f"* **The paper's factor of 3 to 4 was one of frameworks, too.** By one framework, llama.cpp, {OURS} decodes "
            f"{both:.2f} times as fast as {paper_rival} at {first} tokens; by ours, "
            f"{ours.decode_tok_s[first].median / theirs:.2f}.",
        ]
    )


def _said(name: str, where: float | None, rates: dict[int, Spread], ours: float) -> str:
    ends = f"not overtaken up to {short(max(rates))}" if where is None else f"overtaken at {where:,.0f}"
    return f"{name} ({rates[min(rates)].median / ours:.1f} times, {ends})"


def draw_rivals(result: RivalsResult, file: Path) -> None:
    """Draw tok/s, and memory in GiB, over the context, each decoder a line, crossings with ours marked; write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(12, 5.4))
    seen, where = set(), crossings(result)
    for system, row in result.rows():
        if (row.decoder, row.runtime) in seen:
            continue
        seen.add((row.decoder, row.runtime))
        mine = row.runtime.startswith("cobra")
        contexts = sorted(row.decode_tok_s)
        rates = [row.decode_tok_s[c].median for c in contexts]
        sizes = [(row.weights_bytes + row.state_bytes[c]) / _GIB for c in contexts]
        dashes = "--" if system.name.startswith("Cobra") and not mine else "-"
        style: dict[str, Any] = {"lw": 2.6 if mine else 1.2, "ls": dashes, "marker": "."}
        line, *_ = speed.plot(contexts, rates, label=label(system, row), **style)
        memory.plot(contexts, sizes, color=line.get_color(), **style)
        if at := where.get(system.name):
            speed.plot([at], [np.interp(at, contexts, rates)], "x", color="black", ms=7)
    for axes, what in ((speed, "decoding, tok/s"), (memory, "weights with cache or state, GiB")):
        axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel=what)
        axes.set_xticks(result.contexts, [short(c) for c in result.contexts])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    figure.legend(loc="lower center", ncol=4, frameon=False, fontsize=8)
    figure.suptitle("4-bit decoders over the context; x: from here on Cobra-3.5B is faster", fontsize=11)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
