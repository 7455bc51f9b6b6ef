"""Table of measures: one row per measure, with its name in reports and budgets, and its description."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
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
        name: in reports and budgets; what every table shows.
        label: the name in words.
        unit: of a value.
        better: "low" or "high"; "near" if the best value is `ideal` and both sides of it are worse.
        ideal: value of a build that equals the reference.
        format_spec: of a value.
        description: what it means, one clause.
        reaction: what to do where it is off, one clause.
        combine: returns the worst-case limit of a build from those of decoder and vision.
        gate: that judges it, a name of `gates.GATES`.
    """

    name: str
    label: str
    unit: str
    better: Literal["low", "high", "near"]
    ideal: float
    format_spec: str
    description: str
    reaction: str
    combine: Callable[[float, float], float] = _sum
    gate: Literal["absolute", "recorded", "against", "expected"] = "absolute"

    @property
    def title(self) -> str:
        """The label with the unit."""
        return f"{self.label} ({self.unit})"

    @property
    def direction(self) -> str:
        """Which values are better, in words."""
        near = f"nearer to {self.ideal:g} is better"
        return (
            near
            if self.better == "near"
            else f"{'lower' if self.better == 'low' else 'higher'} is better, {self.ideal:g} at best"
        )

    def limit_line(self, value: str = "LIMIT") -> str:
        """Return the line of a budget that limits it, as TOML."""
        key = f'"{self.name}"' if "." in self.name else self.name
        return f"{key} = {{ {'min' if self.better == 'high' else 'max'} = {value} }}"


_BITS = "read the attribution: the part that drifts alone needs more bits, another method, or calibration on closer images"
_TAIL = "read the worst lines; if kld_mean holds, a few tokens drift: rare inputs, or outliers that calibration has not seen"
_QUESTIONS = "if the answers hold: suspect what comes first, the image encoder, the projector, the embeddings, the first layers"
_REPLIES = "one token that tips early changes all that follow: judge by kld_mean and accuracy_change before you spend bits"
_TASKS = "see which task moved; where its interval is wide, use more images before you change the build"
_RECORDED = "the bundle or the runtime is not what was exported: run inspect, try other --decoder-kernels, then export again"
_AGAINST = "what changed since the other build made it worse beyond doubt: undo it, or give the reason in review"
_RECORD_OF = "its changes by line since the export, as magnitudes, over those that rounding to bfloat16 would make"
_OTHER_OF = "of this build over that of the one given with --against, on the same lines"
_TABLE = (
    Measure("kld_mean", "KLD, mean", "nats", "low", 0, ".3g",
            "KL(reference ‖ build) of the next token, over the tokens of the answers", _BITS),
    Measure("kld_median", "KLD, median", "nats", "low", 0, ".3g", "half of the answer tokens drift less", _BITS),
    Measure("kld_p90", "KLD, 90th percentile", "nats", "low", 0, ".3g", "90 % of the answer tokens drift less", _BITS),
    Measure("kld_p99", "KLD, 99th percentile", "nats", "low", 0, ".3g", "99 % of the answer tokens drift less", _TAIL),
    Measure("kld_max", "KLD, largest", "nats", "low", 0, ".3g", "the largest drift of an answer token", _TAIL),
    Measure("prompt_kld_mean", "KLD on questions, mean", "nats", "low", 0, ".3g",
            "the KLD over the tokens of the questions, which are more than those of the answers", _QUESTIONS),
    Measure("prompt_kld_p99", "KLD on questions, 99th percentile", "nats", "low", 0, ".3g",
            "99 % of the question tokens drift less", _QUESTIONS),
    Measure("top1_agreement", "top-1 agreement", "share of answer tokens", "high", 1, ".2%",
            "the most probable token is the same", _BITS, _shares),
    Measure("right_change_mean", "p(right token), mean change", "probability", "near", 0, "+.2e",
            "the probability of the given answer's token, build minus reference",
            "a bias that kld_mean does not show: suspect a scale, or a bias that was lost"),
    Measure("right_change_rms", "p(right token), RMS change", "probability", "low", 0, ".3g",
            "the root mean square of that change", _BITS),
    Measure("perplexity", "perplexity", "of the given answers", "low", 1, ".4f", "by the build alone; depends on the suite",
            "limit perplexity_ratio rather, which compares with the reference", _product),
    Measure("perplexity_ratio", "perplexity, ratio", "build / reference", "low", 1, ".4f",
            "perplexity of the given answers, by the build over that by the reference", _BITS, _product),
    Measure("state_error", "decoder state, error of the worst layer", "relative RMS", "low", 0, ".3g",
            "error of the recurrent state after the last token",
            "see the layers: one alone is typical of a fault in one tensor, all of them of the method"),
    Measure("vision_error", "vision, error of the embeddings", "relative RMS", "low", 0, ".3g",
            "error of the visual embeddings, the projector's output",
            "try a higher --vision-precision, then another --vision-runtime: one of them is wrong, or too coarse"),
    Measure("greedy_match", "greedy replies, exact match", "share of replies", "high", 1, ".2%",
            "greedy replies of build and reference have the same tokens", _REPLIES, _shares),
    Measure("greedy_prefix", "greedy replies, shared prefix", "share of a reply", "high", 1, ".2%",
            "part of a greedy reply before it differs from the reference's", _REPLIES, _shares),
    Measure("length_ratio", "greedy replies, length", "build / reference", "near", 1, ".3f", "tokens generated",
            "replies that do not end, or end at once: read the worst lines, and suspect the head", _product),
    Measure("accuracy", "accuracy", "0 to 1", "high", 1, ".2%", "generated replies, scored by the metric of each task", _TASKS),
    Measure("accuracy_change", "accuracy, change", "build minus reference", "high", 0, "+.2%",
            "accuracy lost or gained on the same lines", _TASKS),
    Measure("kld_change", "KLD, change since the export", "× bfloat16's", "low", 0, ".3g",
            f"KLD of the answers: {_RECORD_OF}", _RECORDED, gate="recorded"),
    Measure("prompt_kld_change", "KLD on questions, change since the export", "× bfloat16's", "low", 0, ".3g",
            f"KLD of the questions: {_RECORD_OF}", _RECORDED, gate="recorded"),
    Measure("reply_change", "greedy replies, change since the export", "share of a reply", "low", 0, ".2%",
            "change of the shared prefix of a line, as magnitude, on average", _RECORDED, gate="recorded"),
    Measure("kld_ratio", "KLD, ratio", "build / other", "low", 1, ".3f", f"KLD of the answers, {_OTHER_OF}", _AGAINST,
            gate="against"),
    Measure("prompt_kld_ratio", "KLD on questions, ratio", "build / other", "low", 1, ".3f",
            f"KLD of the questions, {_OTHER_OF}", _AGAINST, gate="against"),
    Measure("kld_over_expected", "KLD, over the expected", "measured / foretold", "near", 1, ".2f",
            "mean KLD over the one that the gradients of the export foretold for its recipe",
            "far above: a scale or rotation is not what the recipe says; far below: it was compared with itself",
            gate="expected"),
)  # fmt: skip
MEASURES = {m.name: m for m in _TABLE}
# What a reader looks at first, after what failed and what has limits.
TELLING = (
    "kld_mean", "top1_agreement", "accuracy_change", "greedy_match", "perplexity_ratio", "kld_p99", "state_error",
    "vision_error",
)  # fmt: skip
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
        label = f"decoder state, error of layer {part}" if PARTS[kind] == "LAYER" else f"{of.label}: {part}"
        return replace(of, name=name, label=label)
    known = (*MEASURES, *(f"{kind}.{part}" for kind, part in PARTS.items()))
    raise InputError(f"unknown measure {name!r}{near_matches(name, known)}")


def format_value(name: str, value: float | None) -> str:
    """Return the value of a measure, formatted; None and NaN are "not measured", and exponents are short: 2.1e-6."""
    if value is None or math.isnan(value):
        return "not measured"
    return re.sub(r"e([+-])0(?=\d)", r"e\1", f"{value:{measure_named(name).format_spec}}")
