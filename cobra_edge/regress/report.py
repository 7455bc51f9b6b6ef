"""report.json: the result of a run, as frozen structs with a versioned schema.

All outputs are made from it. Two runs of one build give the same report except for `times`.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from ..errors import InputError
from ..files.parsing import ParseError, parse_json
from .intervals import Interval

REPORT_VERSION = 2
_LIMIT_BYTES = 64 << 20


class TooFew(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a figure has no interval: the number of images that have the measure, and how many its interval needs."""

    images: int
    needed: int

    def __str__(self) -> str:
        """Return it in words."""
        return f"too few to judge ({self.images} image{'s' if self.images > 1 else ''}; {self.needed} needed)"


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A measure with the bounds of its 95 % interval; None if there is no value, or no interval of it.

    Attributes:
        too_few: there is no interval, because of too few images; a limit cannot be judged.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    too_few: TooFew | None = None

    @classmethod
    def of(cls, interval: Interval) -> Figure:
        """Return an interval as a figure; numbers that are not finite become None."""
        ends = (interval.value, interval.low, interval.high)
        value, low, high = (end if math.isfinite(end) else None for end in ends)
        return cls(value, low, high)


class Build(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bundle that was measured, from its manifest.

    Attributes:
        name: of the directory.
        fingerprint: sha256 of the manifest, which has the hashes of all files.
        model, source, source_sha256: the checkpoint.
        bits_per_weight: of the decoder's file, including scales.
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
    """The runtimes that ran the build, by name."""

    decoder: str
    vision: str | None
    activations: str
    threads: int | None
    device: str
    machine: str


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The baseline that the build was compared with.

    Attributes:
        kind: "golden" (predictions of the float model in the bundle), "bundle" or "checkpoint".
        name: of the bundle or checkpoint.
        computed_by: what ran it, such as "torch, float32".
        top_k: largest number of tokens kept of a distribution; None for all.
        tail_mass_max, prompt_tail_mass_max: largest probability not kept of a distribution, on answers and on questions.
        state_sketch: size of the sketch of each layer's state.
    """

    kind: str
    name: str
    computed_by: str
    top_k: int | None
    tail_mass_max: float
    prompt_tail_mass_max: float
    state_sketch: int


class Suite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The suite. `skipped` has the reason by number of each skipped line; `scoring` is "reply" or "choices"."""

    name: str
    sha256: str
    lines: int
    images: int
    answer_tokens: int
    prompt_tokens: int
    skipped: dict[int, str] = {}
    scoring: str = "reply"


class TaskFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One task of the suite.

    Attributes:
        metric: a name of `scoring.METRICS`.
        score, reference: of build and reference, 0 to 1.
        change: build minus reference, on the same lines.
        kld_mean: over the answer tokens of the task.
        summary, reference_summary: further values of the metric, such as precision and recall.
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
    """Mean KLD of all tokens at one position, relative to the first answer token; those of the question are negative."""

    at: int
    tokens: int
    kld_mean: float


class LayerFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Relative RMS error of the final recurrent state of one layer."""

    layer: int
    state_error: Figure


class WorstLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the lines with the largest drift.

    Attributes:
        number: in the suite, from 1.
        image: name of the image, or None.
        diverges_at: index of the first token in which the replies differ; None if they are equal.
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
    """One limit of the budget, compared with the worse bound of a measure's interval.

    Attributes:
        measure: see `measures.measure_named`.
        rule: "max", "min" or "max_times_floor".
        limit: in the unit of the measure, for every rule.
        judged: the bound that was compared with it; None if the measure has no value, or too few images, which fails.
        within: whether it passed.
        note: why it could not be judged, or where the limit comes from.
    """

    measure: str
    rule: str
    limit: float | None
    judged: float | None
    within: bool
    note: str = ""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Drift with only one part of the build in the baseline; without a value, `note` is the reason."""

    name: str
    kld_mean: float | None
    top1_agreement: float | None
    note: str = ""


class Attribution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Attribution of the drift to parts, on some lines of the suite.

    Attributes:
        lines: number of lines.
        parts: vision tower, projector, decoder, …, alone and together.
        layers, tensors: of the decoder, alone, worst first.
    """

    lines: int
    parts: tuple[Part, ...]
    layers: tuple[Part, ...] = ()
    tensors: tuple[Part, ...] = ()


class Times(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that differs between two runs of one build: start (ISO 8601, UTC) and duration."""

    began: str
    seconds: float
    lines_per_second: float


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run.

    Attributes:
        commit: of the user's repository, or None.
        measures: by name of `measures.MEASURES`.
        not_taken: reason by measure without a value.
        noise_floor: that of the bundle's manifest.
        worst: lines with the largest drift, worst first.
        verdicts: empty without a budget.
        passed: every verdict is within.
        not_judged: reason by name of each of `gates.GATES` that did not judge.
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
    not_judged: dict[str, str] = {}


def read_report(file: Path) -> Report:
    """Read a report.json. Raises InputError if it is invalid or of another version."""
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
        return msgspec.convert(data, Report, str_keys=True)  # JSON keys are strings, those of `skipped` are integers
    except msgspec.ValidationError as error:
        raise InputError(f"{file}: {error}; measure again") from error
