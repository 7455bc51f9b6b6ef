"""Text that all outputs of a report share: headline, one row per measure, what could not be measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..gates import GATES, gate_of
from ..measures import MEASURES, PARTS, TELLING, format_value, measure_named
from ..report import Figure, Report, Verdict

FLOORS = ("fp16", "bf16")
_SIGNS = {"max": "≤", "min": "≥", "max_times_floor": "≤"}
FAILED, HELD, NOT_JUDGED = "FAILED", "held", "NOT JUDGED"
SHOWN = 8  # rows that are shown before the rest folds


@dataclass(frozen=True)
class MeasureRow:
    """One measure, formatted.

    Attributes:
        name: of the measure, as in a budget; "state_error.LAYER" for all layers whose limits held.
        value, interval: formatted with the digits of the measure; the interval is empty, or the reason, if there is none.
        floors: noise floor at each of FLOORS; empty if unknown.
        limits: (limit, HELD, FAILED or NOT_JUDGED) of each verdict, such as "≤ 0.02"; empty without a limit.
    """

    name: str
    value: str
    interval: str
    floors: tuple[str, ...]
    limits: tuple[tuple[str, str], ...]

    @property
    def failed(self) -> bool:
        """Whether any limit was exceeded, or could not be judged."""
        return any(word != HELD for _, word in self.limits)


def all_figures(report: Report) -> dict[str, Figure]:
    """Return every measure by name: those of all lines in the order of `measures.MEASURES`, then those of tasks and layers.

    Raises:
        InputError: the report has an unknown measure.
    """
    found = dict(report.measures)
    for task in report.tasks:
        found.setdefault(f"accuracy.{task.task}", task.score)
        found.setdefault(f"accuracy_change.{task.task}", task.change)
    for layer in report.layers:
        found.setdefault(f"state_error.{layer.layer}", layer.state_error)
    return {name: found[name] for name in sorted(found, key=_order)}


def _order(name: str) -> tuple[bool, int, int, str]:
    """Return the sort key of a measure. Raises InputError for an unknown one."""
    measure_named(name)
    kind, _, part = name.partition(".")
    return part != "", list(MEASURES).index(kind), int(part) if part.isdecimal() else 0, part


def is_layer(name: str) -> bool:
    """Return whether a measure is that of one layer; these are many, and shown only if they matter."""
    return PARTS.get(name.partition(".")[0]) == "LAYER" and "." in name


def measure_rows(report: Report) -> list[MeasureRow]:
    """Return a row for each whole measure and each that has limits; layers whose limits held share one row.

    What failed comes first, then what has limits, then the rest as telling as it is.

    Raises:
        InputError: an unknown measure.
    """
    figures, verdicts = all_figures(report), dict[str, list[Verdict]]()
    for verdict in report.verdicts:
        verdicts.setdefault(verdict.measure, []).append(verdict)
    names = sorted({*(name for name in figures if "." not in name), *verdicts}, key=_order)
    held = [name for name in names if is_layer(name) and all(v.within for v in verdicts[name])]
    rows = [_row(report, name, figures.get(name, Figure(None)), verdicts.get(name, [])) for name in names if name not in held]
    if held:
        of = f"{len(held)} layers, a limit each"
        rows.append(MeasureRow("state_error.LAYER", "", "", ("",) * len(FLOORS), ((of, HELD),)))
    return sorted(rows, key=lambda row: (not row.failed, not row.limits, (*TELLING, row.name).index(row.name)))


def _row(report: Report, name: str, figure: Figure, verdicts: list[Verdict]) -> MeasureRow:
    floors = (report.noise_floor.get(precision, {}).get(name) for precision in FLOORS)
    return MeasureRow(
        name,
        format_value(name, figure.value),
        format_interval(name, figure),
        tuple("" if floor is None else format_value(name, floor) for floor in floors),
        tuple((format_limit(verdict), _word(verdict)) for verdict in verdicts),
    )


def _word(verdict: Verdict) -> str:
    return HELD if verdict.within else NOT_JUDGED if verdict.judged is None else FAILED


def format_interval(name: str, figure: Figure) -> str:
    """Return the bounds of an interval as "low – high"; if there is none, that there are too few images, or nothing."""
    if figure.too_few is not None:
        return str(figure.too_few)
    if figure.value is None or figure.low is None or figure.high is None:
        return ""
    return f"{format_value(name, figure.low)} – {format_value(name, figure.high)}"


def format_limit(verdict: Verdict) -> str:
    """Return a limit with its direction, such as "≤ 0.02"."""
    if verdict.limit is None:
        return "limit unknown"
    floor = " (floor)" if verdict.rule == "max_times_floor" else ""
    return f"{_SIGNS.get(verdict.rule, verdict.rule)} {format_value(verdict.measure, verdict.limit)}{floor}"


def describe_verdict(verdict: Verdict) -> str:
    """Return a sentence on why a limit was held or exceeded."""
    if verdict.judged is None:
        return f"could not be judged: {verdict.note or 'reason unknown'}"
    note = f" ({verdict.note})" if verdict.note else ""
    held = "is within" if verdict.within else "exceeds"
    return f"{format_value(verdict.measure, verdict.judged)} {held} {format_limit(verdict)}{note}"


def headline(report: Report) -> str:
    """Return one line on whether the budget was held."""
    failed = [v for v in report.verdicts if not v.within]
    if not report.verdicts:
        why = "no budget" if report.budget is None else f"budget {report.budget} has no limits"
        return f"NOT JUDGED: {why}" if report.passed else f"FAILED: {why}, and the run did not pass"
    if report.passed and not failed:
        held = "the one limit" if len(report.verdicts) == 1 else f"all {len(report.verdicts)} limits"
        return f"PASSED: {held} held"
    names = list(dict.fromkeys(v.measure for v in failed))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    unjudged = sum(v.judged is None for v in failed)
    counts = ((len(failed) - unjudged, "exceeded"), (unjudged, "not judged"))
    (first, word), *rest = [(count, word) for count, word in counts if count] or counts[:1]
    words = f"{first} of {len(report.verdicts)} limits {word}" + "".join(f", {count} {word}" for count, word in rest)
    return f"FAILED: {words}: {', '.join(names[:3])}{more}"


def gate_rows(report: Report) -> Iterator[tuple[str, str]]:
    """Yield (gate, what it found, or why it did not judge) of each gate that the report knows."""
    for name, compared_with in GATES.items():
        own = [verdict for verdict in report.verdicts if gate_of(verdict) == name]
        failed = sum(not verdict.within for verdict in own)
        if own:
            limits = "1 limit" if len(own) == 1 else f"{len(own)} limits"
            yield name, f"{FAILED}, {failed} of {limits}: {compared_with}" if failed else f"{HELD}, {limits}: {compared_with}"
        elif name in report.not_judged:
            yield name, f"not judged: {report.not_judged[name]}"


def not_taken_rows(report: Report) -> Iterator[tuple[str, str]]:
    """Yield (what could not be measured, reason): measures, limits, parts of the attribution."""
    yield from report.not_taken.items()
    figures = all_figures(report)
    for verdict in report.verdicts:
        if figures.get(verdict.measure, Figure(None)).too_few is not None:
            continue  # said beside its value
        if verdict.judged is None and verdict.measure not in report.not_taken:
            yield f"the limit of {verdict.measure}", verdict.note or "reason unknown"
    if report.attribution is not None:
        found = report.attribution
        for part in (*found.parts, *found.layers, *found.tensors):
            if part.kld_mean is None:
                yield f"attribution to {part.name}", part.note or "reason unknown"


def notes_of(report: Report) -> list[str]:
    """Return each note on measured parts of the attribution once, with the names of its parts."""
    parts = report.attribution.parts if report.attribution is not None else ()
    noted = dict.fromkeys(part.note for part in parts if part.note and part.kld_mean is not None)
    return [f"{', '.join(p.name for p in parts if p.note == note and p.kld_mean is not None)}: {note}" for note in noted]


def describe_runtime(report: Report) -> str:
    """Return the runtime in words."""
    runtime = report.runtime
    vision = "no vision" if runtime.vision is None else f"vision by {runtime.vision}"
    threads = "" if runtime.threads is None else f", {runtime.threads} threads"
    return f"decoder {runtime.decoder}, {vision}, activations {runtime.activations}, on {runtime.device}{threads}"


def describe_baseline(report: Report) -> str:
    """Return the baseline in words, and what was kept of it."""
    base = report.baseline
    kept = (
        "probabilities of all tokens"
        if base.top_k is None
        else f"at most {base.top_k} most probable tokens kept, omitted probability at most {base.tail_mass_max:.2g} on answers "
        f"and {base.prompt_tail_mass_max:.2g} on questions"
    )
    sketch = f", {base.state_sketch} numbers per layer state" if base.state_sketch else ""
    return f"{base.kind} {base.name}, computed by {base.computed_by}, {kept}{sketch}"


def describe_suite(report: Report) -> str:
    """Return the suite in words."""
    suite = report.suite
    text = f"{suite.name}: {suite.lines} lines, {suite.images} images"
    left = f", {len(suite.skipped)} lines skipped" if suite.skipped else ""
    scored = ", scored by the most probable choice" if suite.scoring == "choices" else ""
    return f"{text}, {suite.answer_tokens} answer tokens, {suite.prompt_tokens} question tokens{left}{scored}"
