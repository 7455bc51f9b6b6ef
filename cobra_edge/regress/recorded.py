"""The gate "recorded": on every golden line a build drifts as it did when it was exported.

Kernels, threads and devices round differently, which changes the drift of a line a little. What changes it a lot is another
build than the one that was exported, or a runtime that is wrong: a scale, a code, a tokenizer, a graph, a kernel. Changes are
summed as magnitudes, line by line, so that a fault shows that makes half of the lines better and half of them worse. The limits
are in export/budgets/gates.toml, by activations, and are made from what runtimes that work were measured to differ by
(`python -m bench.recorded_margins`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..bundle.manifest import Drift
from ..suite.tokenized import TokenizedSuite
from .aggregate import Aggregate
from .budget import Limits, judge
from .gates import Gate
from .golden import Golden
from .report import Figure

_LEAST_KLD = 1e-7  # nats a token, added to what was recorded: where a build is almost the float model, rounding is all there is
# {measure: column of `Aggregate`, column of what one of it is counted in, what is added of the second to the first}
_MEASURES = {
    "kld_change": ("kld", "tokens", _LEAST_KLD),
    "prompt_kld_change": ("prompt_kld", "prompt_tokens", _LEAST_KLD),
    "reply_change": ("prefix", "lines", 0.0),
}
COLUMNS = tuple(column for column, _, _ in _MEASURES.values())


def recorded_by_line(aggregate: Aggregate) -> dict[str, tuple[float, ...]]:
    """Return what a manifest records of each line, by column of COLUMNS, to seven digits."""
    return {name: tuple(float(f"{value:.7g}") for value in aggregate.by_line(name)) for name in COLUMNS}


def recorded_gate(
    drift: Drift | None,
    golden: Golden | None,
    suite: TokenizedSuite,
    aggregate: Aggregate,
    activations: str,
    limits: Mapping[str, Limits],
) -> Gate:
    """Compare the drift of each line with the one recorded at the export.

    Args:
        drift: of the manifest.
        golden: the golden lines, in the order of the record; None if they are not the baseline.
        suite: lines of these that were measured.
        aggregate: of the suite, in its order.
        activations: of the decoder that ran.
        limits: by activations; empty judges nothing.
    """
    if golden is None:
        return Gate("the baseline is not the golden lines of the bundle, which the recorded drift is of")
    if drift is None or not drift.by_line:
        return Gate("the bundle records no drift by line: an earlier version exported it; export it again")
    if drift.activations != activations:
        return Gate(f"the drift was recorded with {drift.activations} activations, this decoder has {activations}")
    lines = len(golden.suite.lines)
    if sorted(drift.by_line) != sorted(COLUMNS) or any(len(values) != lines for values in drift.by_line.values()):
        return Gate(f"what is recorded is not of the {lines} golden lines; export the bundle again")
    figures = _changes(drift, golden.suite, suite, aggregate)
    own = {name: limit for name, limit in limits.get(activations, {}).items() if name in figures}
    return Gate("", figures, judge(figures, own, {}))


def _changes(drift: Drift, golden: TokenizedSuite, suite: TokenizedSuite, aggregate: Aggregate) -> dict[str, Figure]:
    """Return the sum of changes over the sum recorded, by measure."""
    rows: Any = slice(None)
    if suite is not golden:
        index = {golden.key(line): i for i, line in enumerate(golden.lines)}
        rows = [index[suite.key(line)] for line in suite.lines]
    found = {}
    for measure, (column, counted_in, least) in _MEASURES.items():
        before, now = np.array(drift.by_line[column])[rows], aggregate.by_line(column)
        of = float(before.sum() + least * aggregate.by_line(counted_in).sum())
        if of > 0:
            found[measure] = Figure(float(np.abs(now - before).sum() / of))
    return found
