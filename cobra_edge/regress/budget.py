"""Drift budgets: limits beyond which a build counts as broken, read from export/budgets/*.toml.

A limit is absolute (`max`, `min`, in the unit of the measure) or relative to the noise floor (`max_times_floor`, a multiple of
the drift of the reference itself in bf16). It is compared with the worse bound of the measure's interval, unrounded. A limit on
a measure without a value, or of which too few images say something, is not held: a gate that cannot judge does not pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..errors import InputError
from ..formats.package_data import export_data
from ..formats.precision import PrecisionName
from ..formats.targets import read_toml
from ..terminal.suggestions import near_matches
from .measures import PARTS, measure_named
from .report import Figure, Verdict

FLOOR = "bf16"  # precision of the noise floor that `max_times_floor` refers to


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Limits of one measure."""

    max: float | None = None
    min: float | None = None
    max_times_floor: float | None = None


Limits = Mapping[str, Limit]  # by measure


class PartBudget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits by scheme of the decoder, and what the precision of the vision graph may add to them."""

    schemes: dict[str, dict[str, Limit]] = {}
    vision: dict[PrecisionName, dict[str, Limit]] = {}


class Budget(PartBudget, frozen=True, forbid_unknown_fields=True):
    """Limits for every target; those in `targets` override them measure by measure."""

    targets: dict[str, PartBudget] = {}

    def limits_of(self, scheme: str, precision: PrecisionName | None = None, target: str | None = None) -> Limits:
        """Return the limits of a build: those of its scheme, combined with those of the vision precision.

        In the worst case two small drifts add up, so limits are combined as `measures` defines. A measure is limited only
        if the scheme limits it, except `vision_error`; limits relative to the noise floor are those of the scheme.

        Raises:
            InputError: the budget has no section for the scheme; the message lists near matches.
        """
        own = self.targets.get(target or "", PartBudget())
        if scheme not in self.schemes and scheme not in own.schemes:
            known = dict.fromkeys((*self.schemes, *own.schemes))
            raise InputError(f"the budget has no limits for scheme {scheme!r}{near_matches(scheme, known)}")
        limits = self.schemes.get(scheme, {}) | own.schemes.get(scheme, {})
        if precision is None:
            return limits
        for name, vision in (self.vision.get(precision, {}) | own.vision.get(precision, {})).items():
            if name in limits:
                limits[name] = _combined(name, limits[name], vision)
            elif name == "vision_error":
                limits[name] = vision
        return limits


def _combined(name: str, decoder: Limit, vision: Limit) -> Limit:
    combine = measure_named(name).combine

    def of(a: float | None, b: float | None) -> float | None:
        return a if a is None or b is None else combine(a, b)

    return Limit(of(decoder.max, vision.max), of(decoder.min, vision.min), decoder.max_times_floor)


def read_budget(file: Path | None = None) -> Budget:
    """Read a budget file; the default budget without an argument.

    Raises:
        InputError: no such file; unknown keys or measures, limits of another form, empty ones, and such that are not finite.
    """
    if file is not None and not file.exists():
        raise InputError(
            f"{file}: no such budget; write one from a build that you trust: cobra-edge regress BUNDLE --budget {file} "
            "--update-budget"
        )
    file = file or export_data("budgets") / "default.toml"
    parts = read_toml(file, dict[str, Any])
    for heading, section in _sections(parts):
        for name, limit in section.items():
            if why := _why_no_limit(name, limit):
                raise InputError(f"{file}: [{heading}] {why}")
    try:
        budget = read_toml(file, Budget)
    except InputError as error:
        raise InputError(f"{error}; its sections are [schemes.SCHEME], [vision.PRECISION] and [targets.TARGET.…]") from error
    assert isinstance(budget, Budget)
    return budget


def _sections(parts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (heading, content) of each section that has limits."""
    for kind, names in parts.items():
        for name, section in names.items() if isinstance(names, dict) else ():
            if not isinstance(section, dict):
                continue
            if kind == "targets":
                yield from _sections(section, f"targets.{name}.")
            elif kind in ("schemes", "vision"):
                yield f"{prefix}{kind}.{name}", section


def _why_no_limit(name: str, limit: object) -> str:
    """Return what is wrong with a limit and how it is written, or ""."""
    try:
        measure = measure_named(name)
    except InputError as error:
        return str(error)
    if name in PARTS and isinstance(limit, dict) and any(isinstance(of, dict) for of in limit.values()):
        part = next(key for key, of in limit.items() if isinstance(of, dict))
        return f"{name}.{part} needs quotes: {measure_named(f'{name}.{part}').limit_line()}"
    if not isinstance(limit, dict):
        return f"{name} = {limit!r} is no limit; write {measure.limit_line(str(limit))}"
    if limit and all(key in Limit.__struct_fields__ and _is_finite(value) for key, value in limit.items()):
        return ""
    written = ", ".join(f"{key} = {value!r}" for key, value in limit.items())
    return f"{name} = {{ {written} }} is no limit: it needs a finite max, min or max_times_floor; write {measure.limit_line()}"


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def judge(
    figures: Mapping[str, Figure],
    limits: Limits,
    noise_floor: Mapping[str, Mapping[str, float]],
    not_taken: Mapping[str, str] = {},
) -> tuple[Verdict, ...]:
    """Compare each limit with the worse bound of the measure's interval, or with its value if there is no interval.

    Args:
        figures: by measure.
        limits: of the build.
        noise_floor: measures of the reference in 16 bits, by precision.
        not_taken: reason by measure without a value.
    """
    verdicts = []
    for name, limit in limits.items():
        figure = figures.get(name, Figure(None))
        missing = "" if figure.value is not None else not_taken.get(name, "not measured")
        highest = figure.value if figure.high is None else figure.high
        lowest = figure.value if figure.low is None else figure.low
        if figure.too_few is not None:
            missing, highest, lowest = f"{figure.too_few}: use a larger suite, or export with more --golden-lines", None, None
        if limit.max is not None:
            verdicts.append(_verdict(name, "max", limit.max, highest, figure.value, missing))
        if limit.min is not None:
            verdicts.append(_verdict(name, "min", limit.min, lowest, figure.value, missing))
        if limit.max_times_floor is not None:
            verdicts.append(_times_floor(name, limit.max_times_floor, highest, noise_floor.get(FLOOR, {}).get(name), missing))
    return tuple(verdicts)


def _verdict(name: str, rule: str, limit: float, bound: float | None, value: float | None, missing: str) -> Verdict:
    sign = 1 if rule == "max" else -1
    within = bound is not None and sign * bound <= sign * limit
    unsure = bound is not None and not within and value is not None and sign * value <= sign * limit
    wide = "its value is within, the bound of its interval is not: use more lines"
    return Verdict(name, rule, limit, bound, within, wide if unsure else missing)


def _times_floor(name: str, times: float, highest: float | None, floor: float | None, missing: str) -> Verdict:
    if floor is None:
        note = f"no noise floor of {name} in {FLOOR} was measured; export the bundle again"
        return Verdict(name, "max_times_floor", None, highest, False, missing or note)
    limit = times * floor
    note = missing or f"{times:g} times the reference's own {floor:.3g} in {FLOOR}"
    return Verdict(name, "max_times_floor", limit, highest, highest is not None and highest <= limit, note)
