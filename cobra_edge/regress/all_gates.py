"""What every gate finds of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..bundle.manifest import Manifest
from ..suite.tokenized import TokenizedSuite
from .against import against_gate
from .aggregate import Aggregate
from .budget import Limits
from .expected import expected_gate
from .gates import Gate, GateLimits, absolute_gate, gate_limits
from .golden import Golden
from .recorded import recorded_gate
from .report import Runtime


@dataclass(frozen=True, eq=False)
class Compared:
    """A build that was measured, and what it is compared with.

    Attributes:
        manifest: of the build, with the drift at its export.
        golden: the golden lines; None if they are not the baseline.
        suite: the lines that were measured.
        runtime: that ran it.
        against: see `against.lines_of`; None if nothing was given.
    """

    manifest: Manifest
    golden: Golden | None
    suite: TokenizedSuite
    runtime: Runtime
    against: Mapping[str, np.ndarray] | None = None


def gates_of(
    compared: Compared, aggregate: Aggregate, limits: Limits | None, not_taken: Mapping[str, str] = {}
) -> dict[str, Gate]:
    """Return what each gate found, by name.

    Args:
        compared: what was measured.
        aggregate: of all lines of the suite, in its order.
        limits: of the budget; None judges nothing but what `against` finds.
        not_taken: reason by measure without a value.
    """
    figures, manifest = aggregate.figures(), compared.manifest
    ours = GateLimits() if limits is None else gate_limits()
    kld = figures["kld_mean"].value
    return {
        "absolute": absolute_gate(figures, limits, manifest.noise_floor, not_taken),
        "recorded": recorded_gate(manifest, compared.golden, compared.suite, aggregate, compared.runtime, ours.recorded),
        "against": against_gate(compared.against, aggregate, manifest.noise_floor),
        "expected": expected_gate(manifest.drift, kld, aggregate.images, manifest.noise_floor, ours.expected),
    }
