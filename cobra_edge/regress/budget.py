"""Drift budgets: what a build may drift before it counts as broken, read from export/budgets/*.toml.

A limit is absolute (`max`, `min`, in the measure's unit) or relative to the noise floor (`max_times_floor`: how many times what
the reference itself loses in bf16). It is held against the worse end of the measure's interval, unrounded. A limit on a measure
that could not be taken is exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ..errors import InputError
from ..formats.package_data import export_data
from ..formats.precision import PrecisionName
from ..formats.targets import read_toml
from ..terminal.suggestions import near_matches
from .measures import measure_named
from .report import Figure, Verdict

FLOOR = "bf16"  # whose noise floor `max_times_floor` is times of


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one measure may be."""

    max: float | None = None
    min: float | None = None
    max_times_floor: float | None = None


Limits = Mapping[str, Limit]  # by name of a measure


class PartBudget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits by the decoder's scheme, and what the vision graph's precision may add to them."""

    schemes: dict[str, dict[str, Limit]] = {}
    vision: dict[PrecisionName, dict[str, Limit]] = {}


class Budget(PartBudget, frozen=True, forbid_unknown_fields=True):
    """Limits for every target, and those of `targets` that take their place measure by measure."""

    targets: dict[str, PartBudget] = {}

    def limits_of(self, scheme: str, precision: PrecisionName | None = None, target: str | None = None) -> Limits:
        """Return the limits of a build: of its scheme, and of its vision graph's precision where it has one.

        Two small drifts add up at worst, so allowances do, as `measures` says of each. Whether a drift of the answers is judged
        at all is the scheme's to say; limits relative to the noise floor are the scheme's alone.

        Raises:
            InputError: with near matches, where the budget knows nothing of the scheme.
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
                limits[name] = _both(name, limits[name], vision)
            elif name == "vision_error":
                limits[name] = vision
        return limits


def _both(name: str, decoder: Limit, vision: Limit) -> Limit:
    together = measure_named(name).together

    def of(a: float | None, b: float | None) -> float | None:
        return a if a is None or b is None else together(a, b)

    return Limit(of(decoder.max, vision.max), of(decoder.min, vision.min), decoder.max_times_floor)


def read_budget(file: Path | None = None) -> Budget:
    """Read a budget file; the default one without an argument.

    Raises:
        InputError: unknown keys or measures, limits that are not finite or say nothing.
    """
    file = file or export_data("budgets") / "default.toml"
    budget = read_toml(file, Budget)
    assert isinstance(budget, Budget)
    for part in (budget, *budget.targets.values()):
        for section in (*part.schemes.values(), *part.vision.values()):
            for name, limit in section.items():
                try:
                    measure_named(name)
                except InputError as error:
                    raise InputError(f"{file}: {error}") from error
                given = [v for v in (limit.max, limit.min, limit.max_times_floor) if v is not None]
                if not given or not all(math.isfinite(v) for v in given):
                    raise InputError(f"{file}: {name} needs max, min or max_times_floor, a finite number each")
    return budget


def judge(
    figures: Mapping[str, Figure],
    limits: Limits,
    noise_floor: Mapping[str, Mapping[str, float]],
    not_taken: Mapping[str, str] = {},
) -> tuple[Verdict, ...]:
    """Hold each limit against the worse end of its measure's interval, or the value where there is no interval.

    Args:
        figures: measures by name.
        limits: of the build.
        noise_floor: measures of the reference in 16 bits, by precision.
        not_taken: why a measure could not be taken.
    """
    verdicts = []
    for name, limit in limits.items():
        figure = figures.get(name, Figure(None))
        missing = "" if figure.value is not None else not_taken.get(name, "not measured")
        wide = "its value is within, the end of its interval is not: more lines would tell"
        highest = figure.value if figure.high is None else figure.high
        lowest = figure.value if figure.low is None else figure.low
        if limit.max is not None:
            within = highest is not None and highest <= limit.max
            unsure = not within and figure.value is not None and figure.value <= limit.max
            verdicts.append(Verdict(name, "max", limit.max, highest, within, wide if unsure else missing))
        if limit.min is not None:
            within = lowest is not None and lowest >= limit.min
            unsure = not within and figure.value is not None and figure.value >= limit.min
            verdicts.append(Verdict(name, "min", limit.min, lowest, within, wide if unsure else missing))
        if limit.max_times_floor is not None:
            verdicts.append(_times_floor(name, limit.max_times_floor, highest, noise_floor.get(FLOOR, {}).get(name), missing))
    return tuple(verdicts)


def _times_floor(name: str, times: float, highest: float | None, floor: float | None, missing: str) -> Verdict:
    if floor is None:
        note = f"no noise floor of {name} in {FLOOR} was measured; export the bundle again"
        return Verdict(name, "max_times_floor", None, highest, False, missing or note)
    limit = times * floor
    note = missing or f"{times:g} times the reference's own {floor:.3g} in {FLOOR}"
    return Verdict(name, "max_times_floor", limit, highest, highest is not None and highest <= limit, note)
