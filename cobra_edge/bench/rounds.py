"""Rounds: every runner is timed once per round, in an order that is reversed every other round.

Ratios are taken within a round, so that both runners saw the machine in the same condition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from .decode_result import Limits, Ratios, RunnerResult
from .runners import Runner
from .spread import spread

Figures = dict[str, float]
AnyRunner = TypeVar("AnyRunner", bound=Runner)


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        reads: memory bandwidth in bytes per second, one value per runner.
        peaks: peak multiply-accumulates per second, by instruction set or data type.
        figures: by runner.
    """

    reads: tuple[float, ...]
    peaks: dict[str, float]
    figures: dict[str, Figures]


def in_turns(runners: Sequence[AnyRunner], index: int, timed: Callable[[AnyRunner], Figures]) -> dict[str, Figures]:
    """Time each runner once, in reverse order in every other round; returns figures by runner."""
    order = list(runners) if index % 2 == 0 else list(reversed(runners))
    return {runner.name: timed(runner) for runner in order}


def step_figures(runner: Runner, new_tokens: int, bound_seconds: Callable[[int], float]) -> Figures:
    """Time decoding at each context length; `bound_seconds` is the shortest time per token that the bandwidth allows."""
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
    """Return tokens and MACs per second of a prefill, and the share of the peak if there is one for its data type."""
    found = {f"prefill_{tokens}_tok_s": tokens / seconds, f"prefill_{tokens}_macs_per_s": products / seconds}
    if peak is not None:
        found[f"prefill_{tokens}_peak_share"] = products / seconds / peak
    return found


def described(runner: Runner, rounds: Sequence[Round]) -> RunnerResult:
    """Return a runner's facts, and each figure over all rounds."""
    found = [r.figures[runner.name] for r in rounds]
    return RunnerResult(
        name=runner.name,
        weights_bytes=runner.weights_bytes,
        figures={name: spread([figures[name] for figures in found]) for name in found[0]},
        **msgspec.structs.asdict(runner.facts()),
    )


def limits_of(rounds: Sequence[Round]) -> Limits:
    """Return the limits of the machine in these rounds."""
    peaks = {kernels: spread([r.peaks[kernels] for r in rounds]) for kernels in rounds[0].peaks}
    return Limits(spread([read / 1e9 for r in rounds for read in r.reads]), peaks)


def ratios(rounds: Sequence[Round], ours: Sequence[str], peer: str) -> Ratios:
    """Return the speedup of each of our runners over a peer, within a round, for each rate that both have."""
    shared = [f for f in rounds[0].figures[peer] if f.endswith("_tok_s")]
    return {
        name: {
            f: spread([r.figures[name][f] / r.figures[peer][f] for r in rounds]) for f in shared if f in rounds[0].figures[name]
        }
        for name in ours
    }
