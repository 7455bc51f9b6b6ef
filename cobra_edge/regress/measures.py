"""What the harness measures: one row a measure, with its name in reports and budgets, and what it means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from ..terminal.suggestions import near_matches


def _sum(decoder: float, vision: float) -> float:
    return decoder + vision


def _shares(decoder: float, vision: float) -> float:
    return decoder + vision - 1


def _product(decoder: float, vision: float) -> float:
    return decoder * vision


@dataclass(frozen=True)
class Measure:
    """One row.

    Attributes:
        name: in reports and budgets.
        label: for people, with its unit.
        better: "low" or "high"; "near" where the best value is `ideal` and both sides are worse.
        ideal: what a build that is the reference has.
        form: format specification of a value.
        means: one sentence.
        together: how the allowances of decoder and vision add up, at worst.
    """

    name: str
    label: str
    better: Literal["low", "high", "near"]
    ideal: float
    form: str
    means: str
    together: Callable[[float, float], float] = _sum


_TABLE = (
    Measure("kld_mean", "KLD, mean (nats)", "low", 0, ".3g", "KL(reference ‖ build) of the next token, on answers"),
    Measure("kld_median", "KLD, median (nats)", "low", 0, ".3g", "half of the answers' tokens drift less"),
    Measure("kld_p90", "KLD, 90th percentile (nats)", "low", 0, ".3g", "nine tenths of the answers' tokens drift less"),
    Measure("kld_p99", "KLD, 99th percentile (nats)", "low", 0, ".3g", "all but a hundredth of the answers' tokens drift less"),
    Measure("kld_max", "KLD, largest (nats)", "low", 0, ".3g", "the answer token that drifts most"),
    Measure("prompt_kld_mean", "KLD on questions, mean (nats)", "low", 0, ".3g", "the same over the questions' tokens"),
    Measure("prompt_kld_p99", "KLD on questions, 99th percentile", "low", 0, ".3g", "the same over the questions' tokens"),
    Measure("top1_agreement", "top-1 agreement", "high", 1, ".2%", "both find the same token likeliest, on answers", _shares),
    Measure("right_change_mean", "p(right token), mean change", "near", 0, "+.2e", "its probability, build minus reference"),
    Measure("right_change_rms", "p(right token), RMS change", "low", 0, ".3g", "the root mean square of that change"),
    Measure("perplexity", "perplexity of the answers", "low", 1, ".4f", "of the given answers, by the build", _product),
    Measure("perplexity_ratio", "perplexity, build / reference", "low", 1, ".4f", "of the given answers", _product),
    Measure("state_error", "decoder state, worst layer", "low", 0, ".3g", "relative error of the last recurrent state"),
    Measure("vision_error", "visual embeddings, relative RMS", "low", 0, ".3g", "what the projector gives"),
    Measure("greedy_match", "greedy answers alike", "high", 1, ".2%", "lines answered in the very same tokens", _shares),
    Measure(
        "greedy_prefix", "greedy answers, part alike", "high", 1, ".2%", "an answer's share before it differs", _shares
    ),
    Measure("length_ratio", "greedy answers, length", "near", 1, ".3f", "tokens said, build over reference", _product),
    Measure("accuracy", "accuracy", "high", 1, ".2%", "free answers scored by each task's own metric, all lines", _sum),
    Measure("accuracy_change", "accuracy, build minus reference", "high", 0, "+.2%", "on the same lines"),
)  # fmt: skip
MEASURES = {m.name: m for m in _TABLE}
# Measures of a part: {name: what the part is}.
PARTS = {"accuracy": "TASK", "accuracy_change": "TASK", "state_error": "LAYER"}


def measure_named(name: str) -> Measure:
    """Return a measure; `accuracy.TASK` and `accuracy_change.TASK` are those of one task, `state_error.LAYER` is a layer's.

    Raises:
        InputError: with near matches, for an unknown name.
    """
    kind, dot, part = name.partition(".")
    if name in MEASURES:
        return MEASURES[name]
    if dot and part and kind in PARTS and (PARTS[kind] != "LAYER" or part.isdecimal()):
        of = MEASURES[kind]
        label = f"decoder state, layer {part}" if PARTS[kind] == "LAYER" else f"{of.label}: {part}"
        return Measure(name, label, of.better, of.ideal, of.form, of.means, of.together)
    known = (*MEASURES, *(f"{kind}.{part}" for kind, part in PARTS.items()))
    raise InputError(f"unknown measure {name!r}{near_matches(name, known)}")


def format_value(name: str, value: float | None) -> str:
    """Write a measure's value for people; None or NaN is "not measured"."""
    if value is None or math.isnan(value):
        return "not measured"
    return f"{value:{measure_named(name).form}}"
