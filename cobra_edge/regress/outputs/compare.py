"""Comparison of two reports: which measures became better or worse.

The interval of the difference d = b - a, after minus before, is computed from the intervals of a and b:

    d - √((b - low_b)² + (high_a - a)²)   to   d + √((high_b - b)² + (a - low_a)²)

A measure is better or worse if it excludes 0, otherwise alike. The formula assumes that a and b are independent. They are not:
both builds answer the same lines, so their errors are correlated and the true interval is narrower. "Worse" is therefore
reliable, but a small change may be reported as "alike".
Source: Zou and Donner, "Construction of confidence limits about effect measures: a general approach",
Statistics in Medicine 27, 2008, section 2.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec

from ...errors import InputError
from ..measures import format_value, measure_named
from ..report import Figure, Report
from .rows import all_figures, format_interval, is_layer

# "lost": had a value and no longer has one, counts as worse; "unsure": differs, and has no interval or one of zero width.
Word = Literal["worse", "lost", "better", "unsure", "new", "alike", "not measured"]
_ROUNDING = 1e-9  # relative; rounding of the same sum in another order


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measure of both reports. `difference` is after minus before, in the measure's unit, with its 95 % interval."""

    measure: str
    before: Figure
    after: Figure
    difference: Figure
    word: Word


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two reports of one model.

    Attributes:
        before, after: names of the builds.
        changes: in the order of the measures, without those that are ratios to a build which only one of the reports knows.
        differs: (before, after) of each field of build, runtime, baseline and suite that differs.
        warnings: why the figures may not be comparable.
    """

    before: str
    after: str
    changes: tuple[Change, ...]
    differs: dict[str, tuple[str, str]]
    warnings: tuple[str, ...]

    @property
    def worse(self) -> list[str]:
        """Names of the measures that became worse or were lost."""
        return [c.measure for c in self.changes if c.word in ("worse", "lost")]

    @property
    def better(self) -> list[str]:
        """Names of the measures that became better."""
        return [c.measure for c in self.changes if c.word == "better"]


def compare(before: Report, after: Report) -> Comparison:
    """Compare two reports of one model.

    Raises:
        InputError: reports of different models, or with an unknown measure.
    """
    if before.build.model != after.build.model:
        raise InputError(
            f"reports of {before.build.model} and {after.build.model} cannot be compared; give two reports of one model"
        )
    old, new = all_figures(before), all_figures(after)
    nothing = Figure(None)
    names = [name for name in {**old, **new} if measure_named(name).gate != "against"]  # of which each report has another
    changes = [_change(name, old.get(name, nothing), new.get(name, nothing)) for name in names]
    differs = _differences(before, after)
    return Comparison(before.build.name, after.build.name, tuple(changes), differs, tuple(_warnings(before, after)))


def difference(before: Figure, after: Figure) -> Figure:
    """Return after minus before, with an interval if both have one; the formula is in the module's docstring."""
    if before.value is None or after.value is None:
        return Figure(None)
    a, b = before.value, after.value
    if before.low is None or before.high is None or after.low is None or after.high is None:
        return Figure(b - a)
    return Figure(b - a, b - a - math.hypot(b - after.low, before.high - a), b - a + math.hypot(after.high - b, a - before.low))


def _change(name: str, before: Figure, after: Figure) -> Change:
    return Change(name, before, after, difference(before, after), _word(name, before, after))


def _word(name: str, before: Figure, after: Figure) -> Word:
    measure = measure_named(name)
    if before.value is None or after.value is None:
        return "not measured" if before.value is after.value else "lost" if after.value is None else "new"
    if math.isclose(before.value, after.value, rel_tol=_ROUNDING, abs_tol=_ROUNDING**2):
        return "alike"
    if measure.better == "near":
        before, after = _distance(before, measure.ideal), _distance(after, measure.ideal)
    found = difference(before, after)
    if found.low is None or found.high is None or found.low == found.high:
        return "unsure"  # zero width: a maximum, or all images have the same value, which says nothing about others
    if found.low <= 0 <= found.high:
        return "alike"
    return "better" if (found.low > 0) == (measure.better == "high") else "worse"


def _distance(figure: Figure, ideal: float) -> Figure:
    """Return the distance of a figure from the ideal value, with its interval."""
    assert figure.value is not None
    value = abs(figure.value - ideal)
    if figure.low is None or figure.high is None:
        return Figure(value)
    ends = sorted((abs(figure.low - ideal), abs(figure.high - ideal)))
    return Figure(value, 0.0 if figure.low <= ideal <= figure.high else ends[0], ends[1])


def _differences(before: Report, after: Report) -> dict[str, tuple[str, str]]:
    found = {}
    for part in ("build", "runtime", "baseline", "suite"):
        old, new = getattr(before, part), getattr(after, part)
        for field in old.__struct_fields__:
            a, b = getattr(old, field), getattr(new, field)
            if a != b:
                found[f"{part}.{field}"] = _text(a), _text(b)
    if before.commit != after.commit:
        found["commit"] = _text(before.commit), _text(after.commit)
    return found


def _text(value: object) -> str:
    if isinstance(value, dict):
        return f"{len(value)} lines"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _warnings(before: Report, after: Report) -> list[str]:
    pairs = (
        ("checkpoints", before.build.source_sha256, after.build.source_sha256),
        ("suites", (before.suite.sha256, before.suite.lines), (after.suite.sha256, after.suite.lines)),
        ("baselines", before.baseline, after.baseline),
    )
    return [f"the {what} differ, so the figures are not directly comparable" for what, a, b in pairs if a != b]


def changes_to_show(found: Comparison) -> list[Change]:
    """Return the changes in the order of `Word`, without layers that are alike and what neither report has."""
    shown = [c for c in found.changes if c.word != "not measured" and not (is_layer(c.measure) and c.word == "alike")]
    return sorted(shown, key=lambda change: get_args(Word).index(change.word))


def change_cells(change: Change) -> tuple[str, str, str, str, str]:
    """Return (before, after, difference, interval, word), formatted."""
    name, step = change.measure, change.difference
    return (
        format_value(name, change.before.value),
        format_value(name, change.after.value),
        "" if step.value is None else _signed(name, step.value),
        "" if step.value is None else format_interval(name, step),
        change.word,
    )


def _signed(name: str, value: float) -> str:
    text = format_value(name, value)
    return text if text[0] in "+-" else f"+{text}"
