"""Table of measures: one row per measure, with its name in reports and budgets, and its description."""

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
        label: display name, with the unit.
        better: "low" or "high"; "near" if the best value is `ideal` and both sides of it are worse.
        ideal: value of a build that equals the reference.
        format_spec: of a value.
        description: one sentence.
        combine: returns the worst-case limit of a build from those of decoder and vision.
        gate: that judges it, a name of `gates.GATES`.
    """

    name: str
    label: str
    better: Literal["low", "high", "near"]
    ideal: float
    format_spec: str
    description: str
    combine: Callable[[float, float], float] = _sum
    gate: Literal["absolute", "recorded", "against", "expected"] = "absolute"


_IN_ROUNDING = "changes of lines, as magnitudes, over those that bfloat16 would make"
_TABLE = (
    Measure("kld_mean", "KLD, mean (nats)", "low", 0, ".3g", "KL(reference ‖ build) of the next token, on answers"),
    Measure("kld_median", "KLD, median (nats)", "low", 0, ".3g", "half of the answer tokens drift less"),
    Measure("kld_p90", "KLD, 90th percentile (nats)", "low", 0, ".3g", "90 % of the answer tokens drift less"),
    Measure("kld_p99", "KLD, 99th percentile (nats)", "low", 0, ".3g", "99 % of the answer tokens drift less"),
    Measure("kld_max", "KLD, largest (nats)", "low", 0, ".3g", "largest drift of an answer token"),
    Measure("prompt_kld_mean", "KLD on questions, mean (nats)", "low", 0, ".3g", "the same on question tokens"),
    Measure("prompt_kld_p99", "KLD on questions, 99th percentile", "low", 0, ".3g", "the same on question tokens"),
    Measure("top1_agreement", "top-1 agreement", "high", 1, ".2%", "the most probable token is the same, on answers", _shares),
    Measure("right_change_mean", "p(right token), mean change", "near", 0, "+.2e", "its probability, build minus reference"),
    Measure("right_change_rms", "p(right token), RMS change", "low", 0, ".3g", "the root mean square of that change"),
    Measure("perplexity", "perplexity of the answers", "low", 1, ".4f", "of the given answers, by the build", _product),
    Measure("perplexity_ratio", "perplexity, build / reference", "low", 1, ".4f", "of the given answers", _product),
    Measure("state_error", "decoder state, worst layer", "low", 0, ".3g", "relative RMS error of the final recurrent state"),
    Measure("vision_error", "visual embeddings, relative RMS", "low", 0, ".3g", "output of the projector"),
    Measure("greedy_match", "greedy answers, exact match", "high", 1, ".2%", "share of replies with identical tokens", _shares),
    Measure(
        "greedy_prefix", "greedy answers, shared prefix", "high", 1, ".2%", "part of a reply before it differs", _shares
    ),
    Measure("length_ratio", "greedy answers, length", "near", 1, ".3f", "tokens generated, build / reference", _product),
    Measure("accuracy", "accuracy", "high", 1, ".2%", "generated answers scored by the metric of each task", _sum),
    Measure("accuracy_change", "accuracy, build minus reference", "high", 0, "+.2%", "on the same lines"),
    Measure("kld_change", "KLD of each line, since export", "low", 0, ".3g", _IN_ROUNDING, gate="recorded"),
    Measure("prompt_kld_change", "KLD on questions, since export", "low", 0, ".3g", _IN_ROUNDING, gate="recorded"),
    Measure("reply_change", "shared prefixes, since export", "low", 0, ".2%", "of a line, on average", gate="recorded"),
    Measure("kld_ratio", "KLD, build / other", "low", 1, ".3f", "on the same lines, of their answers", gate="against"),
    Measure("prompt_kld_ratio", "KLD on questions, build / other", "low", 1, ".3f", "on the same lines", gate="against"),
    Measure("kld_over_expected", "KLD, measured / foretold", "near", 1, ".2f", "by calibration statistics", gate="expected"),
)  # fmt: skip
MEASURES = {m.name: m for m in _TABLE}
# Measures that also exist per part: {name: kind of part}.
PARTS = {"accuracy": "TASK", "accuracy_change": "TASK", "state_error": "LAYER"}


def measure_named(name: str) -> Measure:
    """Return a measure; `accuracy.TASK` and `accuracy_change.TASK` are of one task, `state_error.LAYER` of one layer.

    Raises:
        InputError: unknown name; the message lists near matches.
    """
    kind, dot, part = name.partition(".")
    if name in MEASURES:
        return MEASURES[name]
    if dot and part and kind in PARTS and (PARTS[kind] != "LAYER" or part.isdecimal()):
        of = MEASURES[kind]
        label = f"decoder state, layer {part}" if PARTS[kind] == "LAYER" else f"{of.label}: {part}"
        return Measure(name, label, of.better, of.ideal, of.format_spec, of.description, of.combine)
    known = (*MEASURES, *(f"{kind}.{part}" for kind, part in PARTS.items()))
    raise InputError(f"unknown measure {name!r}{near_matches(name, known)}")


def format_value(name: str, value: float | None) -> str:
    """Return the value of a measure, formatted; None and NaN are "not measured"."""
    if value is None or math.isnan(value):
        return "not measured"
    return f"{value:{measure_named(name).format_spec}}"
