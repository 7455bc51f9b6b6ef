"""Write the figures of a build into a budget file, with a margin, for review."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_UP, Context, Decimal
from pathlib import Path

from ..files.parsing import utf8_text
from ..files.staging import staged_file
from .budget import Limit, read_budget
from .measures import measure_named
from .outputs.libraries import require
from .report import Figure

# Measures of a new section: drift, answers, state and vision.
LIMITED = (
    "kld_mean", "kld_p99", "prompt_kld_mean", "top1_agreement", "right_change_rms", "perplexity_ratio", "state_error",
    "vision_error", "greedy_match", "accuracy", "accuracy_change",
)  # fmt: skip
_LIMITED_PARTS = "state_error."  # of each layer too: a fault in one is not visible in that of the worst
_DIGITS = 3


def check_update(file: Path) -> None:
    """Check, before anything is measured, that `update_budget` can read the file.

    Raises:
        InputError: it exists and is not a budget. MachineError: tomlkit is not installed.
    """
    require("--update-budget", "tomlkit")
    if file.exists():
        read_budget(file)


def update_budget(
    file: Path, scheme: str, figures: Mapping[str, Figure], floor: Mapping[str, float], margin: float
) -> dict[str, Limit]:
    """Write limits for a scheme: the worse bound of each interval, with its distance from the ideal enlarged by the margin.

    No limit is tighter than the drift of the reference itself in 16 bits, which depends on the order of summation. Other
    sections and comments are kept, and so are limits relative to the noise floor. The file is replaced atomically.

    Args:
        file: a budget; created if missing.
        scheme: name of the section.
        figures: by measure.
        floor: noise floor of the reference in fp16, by measure.
        margin: 0.25 allows a quarter more drift.

    Returns:
        The limits written.

    Raises:
        InputError: not a budget, or cannot be written. MachineError: tomlkit is not installed.
    """
    check_update(file)
    import tomlkit

    known = read_budget(file).schemes.get(scheme, {}) if file.exists() else {}
    document = tomlkit.parse(utf8_text(file.read_bytes())) if file.exists() else tomlkit.document()
    schemes = document.setdefault("schemes", tomlkit.table(is_super_table=True))
    section = schemes.setdefault(scheme, tomlkit.table())
    limits = {}
    for name in known or (*LIMITED, *(name for name in figures if name.startswith(_LIMITED_PARTS))):
        noise = floor.get(name, floor.get(name.partition(".")[0]))  # that of the worst layer, for every layer
        limit = _limit(name, figures.get(name, Figure(None)), noise, margin, known.get(name))
        if limit is None:
            continue
        limits[name] = limit
        table = tomlkit.inline_table()
        table.update({key: value for key in ("max", "min", "max_times_floor") if (value := getattr(limit, key)) is not None})
        section[name] = table
    _replace(file, tomlkit.dumps(document))
    return limits


def _limit(name: str, figure: Figure, floor: float | None, margin: float, before: Limit | None) -> Limit | None:
    """Return the new limit of a measure; the one before if the measure has no value, or too few images to judge by it."""
    if figure.value is None or figure.too_few is not None:
        return before
    measure = measure_named(name)
    noise = 0.0 if floor is None else abs(floor - measure.ideal)  # on both sides: its sign is random
    low = min(figure.value if figure.low is None else figure.low, measure.ideal - noise)
    high = max(figure.value if figure.high is None else figure.high, measure.ideal + noise)
    return Limit(
        max=None if measure.better == "high" else _allowed(max(high, measure.ideal), measure.ideal, margin),
        min=None if measure.better == "low" else _allowed(min(low, measure.ideal), measure.ideal, margin),
        max_times_floor=None if before is None else before.max_times_floor,
    )


def _allowed(end: float, ideal: float, margin: float) -> float:
    """Return a limit: the distance of a bound from the ideal, plus the margin, rounded up so that it is never tighter."""
    far = (_exact(end) - _exact(ideal)) * (1 + _exact(margin))
    return float(_exact(ideal) + Context(prec=_DIGITS, rounding=ROUND_UP).plus(far))


def _exact(number: float) -> Decimal:
    return Decimal(repr(float(number)))  # the decimal value: 1.25 times 0.01 is exactly 0.0125


def _replace(file: Path, text: str) -> None:
    with staged_file(file, force=True) as staged:
        staged.write_text(text, encoding="utf-8")
