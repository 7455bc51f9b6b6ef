"""Rounds: each runner has its turn, in an order that turns round every time; what is made of all of them in the end.

Ratios are taken within a round, where the machine was the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .runners import Runner
from .spread import spread

Figures = dict[str, float]
AnyRunner = TypeVar("AnyRunner", bound=Runner)


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        reads: bytes a second that the memory gave, one value a turn.
        peaks: multiply-accumulates a second by instruction set, or by what is multiplied.
        figures: by runner.
    """

    reads: tuple[float, ...]
    peaks: dict[str, float]
    figures: dict[str, Figures]


def in_turns(runners: Sequence[AnyRunner], index: int, timed: Callable[[AnyRunner], Figures]) -> dict[str, Figures]:
    """Give each runner its turn, the last one first in every other round; returns figures by name."""
    order = list(runners) if index % 2 == 0 else list(reversed(runners))
    return {runner.name: timed(runner) for runner in order}


def step_figures(runner: Runner, new_tokens: int, bound_seconds: Callable[[int], float]) -> Figures:
    """Step at each context; the bound says how long a token takes there at the least, as the bandwidth allows."""
    found, rates = {}, {}
    for context in runner.contexts:
        rates[context] = new_tokens / runner.steps(new_tokens, context)
        found[f"decode_at_{context}_tok_s"] = rates[context]
        found[f"decode_at_{context}_share"] = rates[context] * bound_seconds(context)
    short, long = min(rates), max(rates)
    if short != long:
        found[f"decode_{long}_over_{short}"] = rates[long] / rates[short]
    return found


def prompt_figures(tokens: int, seconds: float, products: int, peak: float | None) -> Figures:
    """Return the rate of a prompt, and its share of a peak where there is one that its products could reach."""
    found = {f"prefill_{tokens}_tok_s": tokens / seconds, f"prefill_{tokens}_macs_per_s": products / seconds}
    if peak is not None:
        found[f"prefill_{tokens}_peak_share"] = products / seconds / peak
    return found


def described(runner: Runner, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return a runner as a result keeps it: its name, facts, and each figure over all rounds."""
    seen = [r.figures[runner.name] for r in rounds]
    facts = {"name": runner.name, "weights_bytes": runner.weights_bytes} | runner.facts()
    return facts | {"figures": {figure: spread([s[figure] for s in seen]) for figure in seen[0]}}


def limits_of(rounds: Sequence[Round]) -> dict[str, Any]:
    """Return what the machine could do in these rounds."""
    peaks = {kernels: spread([r.peaks[kernels] for r in rounds]) for kernels in rounds[0].peaks}
    return {"read_gb_s": spread([read / 1e9 for r in rounds for read in r.reads]), "peak_macs_per_s": peaks}


def ratios(rounds: Sequence[Round], ours: Sequence[str], peer: str) -> dict[str, dict[str, Any]]:
    """Return by runner how many times the peer's speed it has, for each rate that both have; taken within a round."""
    shared = [f for f in rounds[0].figures[peer] if f.endswith("_tok_s")]
    return {
        name: {
            f: spread([r.figures[name][f] / r.figures[peer][f] for r in rounds]) for f in shared if f in rounds[0].figures[name]
        }
        for name in ours
    }
