"""Drift budgets: what a build may drift before it counts as broken, read from export/budgets/*.toml."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..bundle import Drift
from ..errors import InputError, near_matches
from ..resources import export_data
from ..targets import read_toml


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one scheme; a measure without a limit is reported and not judged."""

    kld_mean_max: float | None = None
    kld_p99_max: float | None = None
    top1_agreement_min: float | None = None
    perplexity_ratio_max: float | None = None
    vision_relative_rms_max: float | None = None


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits by scheme name."""

    schemes: dict[str, Limits]

    def limits_of(self, scheme: str) -> Limits:
        """Return a scheme's limits. Raises InputError, with near matches, where the budget knows nothing of it."""
        if scheme not in self.schemes:
            raise InputError(f"the budget has no limits for scheme {scheme!r}{near_matches(scheme, self.schemes)}")
        return self.schemes[scheme]


class Verdict(msgspec.Struct, frozen=True):
    """One measure beside its limit. `within` is None where there is no limit."""

    measure: str
    value: float | None
    limit: float | None
    within: bool | None


def read_budget(file: Path | None = None) -> Budget:
    """Read a budget file; the default one without an argument. Raises InputError for unknown keys."""
    budget = read_toml(file or export_data("budgets") / "default.toml", Budget)
    assert isinstance(budget, Budget)
    return budget


def judge(drift: Drift, limits: Limits) -> list[Verdict]:
    """Hold each measure of a drift against the limits of its scheme.

    A measure that does not apply (vision, for a text-only model) is not judged; NaN is never within.
    """
    verdicts = []
    for name in limits.__struct_fields__:
        measure, _, side = name.rpartition("_")
        value, limit = getattr(drift, measure), getattr(limits, name)
        within = None
        if limit is not None and value is not None:
            within = value <= limit if side == "max" else value >= limit
        verdicts.append(Verdict(measure, value, limit, within))
    return verdicts
