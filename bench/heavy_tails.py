"""Simulated suites with heavy tails: how often their intervals contain the true value.

Each image has a difficulty, by which the KLD of its tokens is multiplied. A suite of few images is likely to lack the hardest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from msgspec.structs import replace

from cobra_edge.regress import intervals
from cobra_edge.regress.report import Figure

from .interval_coverage_result import LIKE_OURS, CoverageRow
from .interval_coverage_run import SIZES, OnStep, coverage

_WHOLE = 130  # images, as the held-out suite
_IMAGES, _TOKENS = 4000, 40  # of the population, and of an image
_SEED = 2
# {name: difficulty of images (images,) from a generator}. The first has the spread of cobra-mini's images in mean KLD.
DIFFICULTIES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    LIKE_OURS: lambda random: np.exp(random.normal(size=_IMAGES)),
    "Pareto, α = 2.5": lambda random: random.pareto(2.5, _IMAGES) + 1,
    "one image in 20 is 20 times as hard": lambda random: np.where(random.random(_IMAGES) < 0.05, 20.0, 1.0),
}


class TailedSuite:
    """Tokens' KLD in nats, (images, tokens) float64, with some of the figures that `Aggregate` gives."""

    def __init__(self, klds: np.ndarray) -> None:
        """Keep the values."""
        self._klds = klds

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self._klds)

    def resampled(self, images: Sequence[int]) -> TailedSuite:
        """Return the suite of these images, given by index."""
        return TailedSuite(self._klds[images])

    def figures(self) -> dict[str, Figure]:
        """Return a mean and quantiles, with their intervals."""
        mean = intervals.mean(self._klds.sum(1), np.full(len(self._klds), float(self._klds.shape[1])))
        p90, p99 = intervals.quantiles(list(self._klds), [0.9, 0.99])
        return {"kld_mean": Figure.of(mean), "kld_p90": Figure.of(p90), "kld_p99": Figure.of(p99)}


def measure_tails(replicates: int, on_step: OnStep) -> list[CoverageRow]:
    """Return the coverage of intervals over suites drawn from each simulated population, with its name as the build."""
    rows = []
    for name, difficulty in DIFFICULTIES.items():
        random = np.random.default_rng(_SEED)
        population = TailedSuite(difficulty(random)[:, None] * random.gamma(0.3, size=(_IMAGES, _TOKENS)))
        for images in (*SIZES, _WHOLE):
            on_step(f"{name}, suites of {images}", 0, 1)
            rows += [replace(row, build=name) for row in coverage(population, images, replicates)]
    return rows
