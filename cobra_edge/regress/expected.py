"""The gate "expected": the measured drift against the one that the gradients of the export foretold for its recipe.

A guided export chooses each matrix's bits by an estimate of the KLD that they cost. A build that drifts far more is not what
its recipe says: a rotation that only one side applies, scales of another layer, statistics of another model. One that drifts
far less was compared with itself. To both sides is added what the estimate leaves out, the rounding of activations and of the
vision graph: the float model's own drift in bfloat16. Where bits are many, that is all there is, and the ratio is near 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..bundle.manifest import Drift
from .budget import FLOOR, Limits, judge
from .gates import Gate
from .report import Figure, TooFew

MEASURE = "kld_over_expected"
_IMAGES_NEEDED = 16  # of 8, the mean KLD of good builds is often far from that of all lines (docs/regression-harness.md)


def expected_gate(
    drift: Drift | None, kld: float | None, images: int, noise_floor: Mapping[str, Mapping[str, float]], limits: Limits
) -> Gate:
    """Compare a measured KLD with the expected one.

    Args:
        drift: of the manifest, with what was expected.
        kld: mean KLD of this run in nats.
        images: that it is over.
        noise_floor: of the manifest.
        limits: on MEASURE.
    """
    if drift is None or drift.expected_kld is None:
        return Gate("nothing foretold it: only method guided does, on answers that were given")
    if images < _IMAGES_NEEDED:
        return Gate(str(TooFew(images, _IMAGES_NEEDED)))
    rounding = noise_floor.get(FLOOR, {}).get("kld_mean", 0.0)
    if rounding <= 0:
        return Gate(f"the bundle has no noise floor in {FLOOR} to allow for; export it again")
    figures = {MEASURE: Figure(None if kld is None else (kld + rounding) / (drift.expected_kld + rounding))}
    return Gate("", figures, judge(figures, limits, {}))
