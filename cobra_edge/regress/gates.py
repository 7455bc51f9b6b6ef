"""The gates that judge a build. Each is named in every report, with what it found or why it did not judge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from ..formats.package_data import export_data
from ..formats.targets import read_toml
from .budget import Limit, Limits, judge
from .measures import measure_named
from .report import Figure, Verdict

# {name: what a build is compared with}
GATES = {
    "absolute": "the limits of a budget, for its scheme and target",
    "recorded": "its own drift at the export, line by line",
    "against": "another report or bundle of the same model, line by line (--against)",
    "expected": "the drift that the gradients of the export foretold for its recipe",
}


class GateLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """gates.toml: limits of "recorded" by kind of runtime and activations (see `recorded`), and of "expected"; by measure."""

    recorded: dict[str, dict[str, dict[str, Limit]]] = {}
    expected: dict[str, Limit] = {}


def gate_limits() -> GateLimits:
    """Return the limits that ship, export/budgets/gates.toml."""
    found = read_toml(export_data("budgets") / "gates.toml", GateLimits)
    assert isinstance(found, GateLimits)
    return found


@dataclass(frozen=True)
class Gate:
    """What one gate found.

    Attributes:
        why_not: why it does not judge, or ""; then it has no verdicts.
        figures: what it measured, by measure.
        verdicts: on its limits.
    """

    why_not: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """What all gates found: figures by measure, verdicts, and by name of a gate why it did not judge."""

    figures: dict[str, Figure]
    verdicts: tuple[Verdict, ...]
    not_judged: dict[str, str]


def judged(gates: Mapping[str, Gate]) -> Judgement:
    """Return what all gates found together, by name."""
    return Judgement(
        {measure: figure for gate in gates.values() for measure, figure in gate.figures.items()},
        tuple(verdict for gate in gates.values() for verdict in gate.verdicts),
        {name: gate.why_not or "no limit applies" for name, gate in gates.items() if not gate.verdicts},
    )


def absolute_gate(
    figures: Mapping[str, Figure],
    limits: Limits | None,
    noise_floor: Mapping[str, Mapping[str, float]],
    not_taken: Mapping[str, str],
) -> Gate:
    """Judge by the limits of a budget, as `judge`; None without a budget."""
    why = "no budget was given" if limits is None else "" if limits else "the budget has no limits for this build"
    return Gate(why, figures, judge(figures, limits or {}, noise_floor, not_taken))


def failures(verdicts: Iterable[Verdict]) -> list[str]:
    """Return by gate which limits were exceeded, and which could not be judged and why."""
    names: dict[str, list[str]] = {}
    for verdict in verdicts:
        if not verdict.within:
            failed = f"gate {gate_of(verdict)} failed:"
            reason = failed if verdict.judged is not None else f"{failed} {verdict.note}; not judged:"
            names.setdefault(reason, []).append(f"{verdict.measure} ({verdict.rule})")
    return [f"{reason} {', '.join(of)}" for reason, of in names.items()]


def gate_of(verdict: Verdict) -> str:
    """Return the name of the gate that a verdict is of. Raises InputError for an unknown measure."""
    return measure_named(verdict.measure).gate
