"""report.json: everything a run of the harness found, as frozen structs with a versioned schema.

All that is printed, drawn or compared is made from these. Two runs of one build give the same report but for `times`.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from ..errors import InputError
from ..files.parsing import ParseError, parse_json
from .intervals import Interval

REPORT_VERSION = 1
_LIMIT_BYTES = 64 << 20


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A measure with the ends of its 95 % interval; None where it could not be taken."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, interval: Interval) -> Figure:
        """Return an interval as a figure; what is not finite could not be taken."""
        ends = (interval.value, interval.low, interval.high)
        return cls(*(end if math.isfinite(end) else None for end in ends))


class Build(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured: a bundle, by what its manifest says.

    Attributes:
        name: the directory's.
        fingerprint: sha256 over the manifest, which has the hash of every file.
        model, source, source_sha256: the checkpoint it was made from.
        bits_per_weight: of the decoder's file, everything counted.
    """

    name: str
    fingerprint: str
    model: str
    source: str
    source_sha256: str
    target: str
    scheme: str
    method: str
    rotations: tuple[str, ...]
    vision_precision: str | None
    bits_per_weight: float
    bundle_bytes: int


class Runtime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ran the build: the runtimes that ship, by name."""

    decoder: str
    vision: str | None
    activations: str
    threads: int | None
    device: str
    machine: str


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What it was compared with.

    Attributes:
        kind: "golden" (outputs of the float model in the bundle), "bundle" or "checkpoint".
        name: of the bundle or checkpoint.
        computed_by: what ran it, such as "torch, float32".
        top_k: how many of the likeliest tokens are kept of each distribution; None for all.
        tail_mass_max, prompt_tail_mass_max: largest probability, in any distribution on answers and on questions, of all tokens
            that are not kept: bounds what KLDs lack.
        state_sketch: numbers kept of each layer's state.
    """

    kind: str
    name: str
    computed_by: str
    top_k: int | None
    tail_mass_max: float
    prompt_tail_mass_max: float
    state_sketch: int


class Suite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was asked. `skipped` says of each bad line that was left out its number and why."""

    name: str
    sha256: str
    lines: int
    images: int
    answer_tokens: int
    prompt_tokens: int
    skipped: dict[int, str] = {}


class TaskFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One task of the suite.

    Attributes:
        metric: a name of `scoring.METRICS`.
        score, change: of the build, and build minus reference on the same lines, 0 to 1.
        reference: the reference's score.
        kld_mean: over the tokens of its answers.
        summary, reference_summary: what the task's own metric reports besides, such as precision and recall.
    """

    task: str
    metric: str
    lines: int
    score: Figure
    reference: float
    change: Figure
    kld_mean: Figure
    greedy_match: Figure
    summary: dict[str, float] = {}
    reference_summary: dict[str, float] = {}


class PositionFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Mean KLD of all tokens at one place: `at` counts from the answer's first token, the question's are negative."""

    at: int
    tokens: int
    kld_mean: float


class LayerFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Relative RMS of a layer's final recurrent state."""

    layer: int
    state_error: Figure


class WorstLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line that drifted most.

    Attributes:
        number: in the suite, from 1.
        image: the image's name, or None.
        diverges_at: the first token in which the free answers differ, None where they are alike.
    """

    number: int
    task: str
    image: str | None
    prompt: str
    answer: str
    reference_reply: str
    reply: str
    kld_mean: float
    kld_max: float
    diverges_at: int | None


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One limit of the budget, held against the worse end of a measure's interval.

    Attributes:
        measure: a name of `measures.MEASURES`, or `accuracy.TASK`.
        rule: "max", "min" or "max_times_floor".
        limit: in the measure's unit, for every rule.
        judged: the end that was held against it; None where the measure could not be taken, which fails.
        within: whether it passed.
        note: why it could not be taken, or where the limit comes from.
    """

    measure: str
    rule: str
    limit: float | None
    judged: float | None
    within: bool
    note: str = ""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Drift with only one part of the build in the reference's place; a part that could not be tried says why."""

    name: str
    kld_mean: float | None
    top1_agreement: float | None
    note: str = ""


class Attribution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the drift comes from, on some of the suite's lines.

    Attributes:
        lines: how many.
        parts: vision tower, projector, decoder, …, alone and together.
        layers, tensors: of the decoder, alone, worst first.
    """

    lines: int
    parts: tuple[Part, ...]
    layers: tuple[Part, ...] = ()
    tensors: tuple[Part, ...] = ()


class Times(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that differs between two runs of one build: when it began (ISO 8601, UTC), and how long it took."""

    began: str
    seconds: float
    lines_per_second: float


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run.

    Attributes:
        commit: of the user's repository, where there is one or one was given.
        measures: by name of `measures.MEASURES`; a value of None could not be taken.
        not_taken: why, by measure.
        noise_floor: measures of the reference itself in "fp16" and "bf16" against float32, on the bundle's golden lines.
        worst: lines that drifted most, worst first.
        verdicts: empty without a budget.
        passed: every verdict is within.
    """

    schema_version: int
    cobra_edge: str
    commit: str | None
    build: Build
    runtime: Runtime
    baseline: Baseline
    suite: Suite
    measures: dict[str, Figure]
    not_taken: dict[str, str]
    noise_floor: dict[str, dict[str, float]]
    tasks: tuple[TaskFigures, ...]
    positions: tuple[PositionFigures, ...]
    layers: tuple[LayerFigures, ...]
    worst: tuple[WorstLine, ...]
    attribution: Attribution | None
    budget: str | None
    verdicts: tuple[Verdict, ...]
    passed: bool
    times: Times


def read_report(file: Path) -> Report:
    """Read a report.json. Raises InputError where it is not one of this version."""
    try:
        if file.stat().st_size > _LIMIT_BYTES:
            raise InputError(f"{file}: {file.stat().st_size} bytes, too large for a report")
        data = parse_json(file.read_bytes())
    except (OSError, ParseError) as error:
        raise InputError(f"{file}: cannot be read ({error}); expected a report.json of cobra_edge.regress") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != REPORT_VERSION:
        raise InputError(f"{file}: schema_version is {version!r}, this cobra_edge reads {REPORT_VERSION}; measure again")
    try:
        return msgspec.convert(data, Report, str_keys=True)  # JSON has no other keys, `skipped` has numbers
    except msgspec.ValidationError as error:
        raise InputError(f"{file}: {error}; measure again") from error
