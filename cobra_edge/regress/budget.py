"""Drift budgets: what a build may drift before it counts as broken, read from export/budgets/*.toml."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from ..errors import InputError, near_matches
from ..manifest import Drift
from ..precision import PrecisionName
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
    """Limits by the decoder's scheme, and what the vision graph's precision may add to them."""

    schemes: dict[str, Limits]
    vision: dict[PrecisionName, Limits] = {}

    def limits_of(self, scheme: str, precision: PrecisionName | None = None) -> Limits:
        """Return the limits of a build: of its scheme, and of its vision graph's precision where it has one.

        Two small drifts add up at worst, so allowances do: divergences are added, shares of disagreement too, ratios
        multiplied. Whether a drift of the answers is judged at all is the scheme's to say.

        Raises:
            InputError: with near matches, where the budget knows nothing of the scheme.
        """
        if scheme not in self.schemes:
            raise InputError(f"the budget has no limits for scheme {scheme!r}{near_matches(scheme, self.schemes)}")
        decoder, vision = self.schemes[scheme], Limits() if precision is None else self.vision.get(precision, Limits())
        rms = decoder.vision_relative_rms_max
        return Limits(
            kld_mean_max=_both(decoder.kld_mean_max, vision.kld_mean_max, lambda a, b: a + b),
            kld_p99_max=_both(decoder.kld_p99_max, vision.kld_p99_max, lambda a, b: a + b),
            top1_agreement_min=_both(decoder.top1_agreement_min, vision.top1_agreement_min, lambda a, b: a + b - 1),
            perplexity_ratio_max=_both(decoder.perplexity_ratio_max, vision.perplexity_ratio_max, lambda a, b: a * b),
            vision_relative_rms_max=vision.vision_relative_rms_max if rms is None else rms,
        )


def _both(decoder: float | None, vision: float | None, together: Callable[[float, float], float]) -> float | None:
    return decoder if decoder is None or vision is None else together(decoder, vision)


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
