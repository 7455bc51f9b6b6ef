"""The gate "recorded": on every golden line a build drifts as it did when it was exported.

Kernels, threads and devices round differently, which changes the drift of a line a little. What changes it a lot is another
build than the one that was exported, or a runtime that is wrong: a scale, a code, a tokenizer, a graph, a kernel. Changes are
summed as magnitudes, line by line, so that a fault shows that makes half of the lines better and half of them worse. Their unit
is what rounding to bfloat16 would change, which is more where a build drifts more. The limits are in export/budgets/gates.toml,
by runtime and activations: three times what runtimes that work were measured to differ by (`python -m bench.recorded_limits`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..bundle.manifest import Drift, Manifest
from ..suite.tokenized import TokenizedSuite
from .aggregate import Aggregate
from .budget import FLOOR, Limits, judge
from .gates import Gate
from .golden import Golden
from .report import Figure, Runtime

# {measure: column of `Aggregate`, column that it is counted in, the mean of the first by the second in a noise floor}
_KLDS = {
    "kld_change": ("kld", "tokens", "kld_mean"),
    "prompt_kld_change": ("prompt_kld", "prompt_tokens", "prompt_kld_mean"),
}
_REPLIES = "prefix"
# Whether decoder and vision are of the kinds that the drift was recorded with: then only instruction sets and threads differ.
SAME, OTHER = "same", "other"
COLUMNS = (*(column for column, _, _ in _KLDS.values()), _REPLIES)


def recorded_by_line(aggregate: Aggregate) -> dict[str, tuple[float, ...]]:
    """Return what a manifest records of each line, by column of COLUMNS, to seven digits."""
    # A divergence of nothing can come out a rounding below 0, which a manifest may not hold.
    return {name: tuple(float(f"{max(value, 0.0):.7g}") for value in aggregate.by_line(name)) for name in COLUMNS}


def recorded_gate(
    manifest: Manifest,
    golden: Golden | None,
    suite: TokenizedSuite,
    aggregate: Aggregate,
    runtime: Runtime,
    limits: Mapping[str, Mapping[str, Limits]],
) -> Gate:
    """Compare the drift of each line with the one recorded at the export.

    Args:
        manifest: with that drift, and the noise floor.
        golden: the golden lines, in the order of the record; None if they are not the baseline.
        suite: lines of these that were measured.
        aggregate: of the suite, in its order.
        runtime: that ran it.
        limits: by SAME and OTHER, and by activations; empty judges nothing.
    """
    drift, floor = manifest.drift, manifest.noise_floor.get(FLOOR, {})
    if golden is None:
        return Gate("the baseline is not the golden lines of the bundle, which the recorded drift is of")
    if drift is None or not drift.by_line:
        return Gate("the bundle records no drift by line: an earlier version exported it; export it again")
    if drift.activations != runtime.activations:
        return Gate(f"the drift was recorded with {drift.activations} activations, this decoder has {runtime.activations}")
    lines = len(golden.suite.lines)
    if sorted(drift.by_line) != sorted(COLUMNS) or any(len(values) != lines for values in drift.by_line.values()):
        return Gate(f"what is recorded is not of the {lines} golden lines; export the bundle again")
    if any(floor.get(mean, 0) <= 0 for _, _, mean in _KLDS.values()):
        return Gate(f"the bundle has no noise floor in {FLOOR} to compare changes with; export it again")
    figures = _changes(drift, floor, _rows(golden.suite, suite), aggregate)
    return Gate("", figures, judge(figures, limits.get(kind_of(drift, runtime), {}).get(runtime.activations, {}), {}))


def kind_of(drift: Drift, runtime: Runtime) -> str:
    """Return SAME for the kinds of decoder and vision runtime that the drift was recorded with, else OTHER."""
    return SAME if (drift.runtime, drift.vision_runtime) == (runtime.decoder, runtime.vision) else OTHER


def _rows(golden: TokenizedSuite, suite: TokenizedSuite) -> list[int]:
    """Return the number of each line of a suite among the golden lines, from 0."""
    if suite is golden:
        return list(range(len(golden.lines)))
    index = {golden.key(line): i for i, line in enumerate(golden.lines)}
    return [index[suite.key(line)] for line in suite.lines]


def _changes(drift: Drift, floor: Mapping[str, float], rows: list[int], aggregate: Aggregate) -> dict[str, Figure]:
    """Return the changes of all lines as magnitudes, by measure: of KLDs over those that rounding to bfloat16 would make."""
    found = {}

    def changes(column: str) -> tuple[float, float]:
        """Return the sum of changes, and the sum recorded."""
        before = np.array(drift.by_line[column])[rows]
        return float(np.abs(aggregate.by_line(column) - before).sum()), float(before.sum())

    for measure, (column, counted_in, mean) in _KLDS.items():
        changed, recorded = changes(column)
        rounding = floor[mean] * aggregate.total(counted_in)
        if rounding > 0:
            # A divergence is the square of a distance: an error that alone makes f adds up to 2√(K·f) + f to a divergence K.
            found[measure] = Figure(changed / (2 * math.sqrt(recorded * rounding) + rounding))
    found["reply_change"] = Figure(changes(_REPLIES)[0] / len(rows))
    return found
