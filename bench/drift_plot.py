"""The drift plot of the README: drift by bits per weight, one Pareto frontier for our builds and one for the peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .quality_result import QualityRow

# Side of the point on which its label stands: our frontier lies below the peers'.
SERIES = (("ours", "cobra_edge", "#1f6feb", "o", (-7, -13)), ("peer", "peers", "#d1570a", "s", (7, 7)))
TOO_NEAR_BITS = 0.1


def frontier(rows: Sequence[QualityRow]) -> list[QualityRow]:
    """Return the Pareto frontier of bits per weight and mean KLD, ordered by bits."""
    kept: list[QualityRow] = []
    for row in sorted(rows, key=lambda r: (r.bits_matrices, r.kld_mean.value)):
        if not kept or row.kld_mean.value < kept[-1].kld_mean.value:
            kept.append(row)
    return kept


def draw_drift(rows: Sequence[QualityRow], file: Path) -> None:
    """Draw bits per weight of the matrices against mean KLD (nats): frontiers as labelled lines with intervals, the rest faint.

    Args:
        rows: measured rows of `bench.quality`'s result.
        file: the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for kind, name, colour, marker, offset in SERIES:
        own = [row for row in rows if row.kind == kind and row.kld_mean.value > 0]
        best = frontier(own)
        others = [row for row in own if row not in best]
        axes.scatter(*_places(others), s=14, marker=marker, color=colour, alpha=0.3, linewidths=0)
        errors = [[max(r.kld_mean.value - r.kld_mean.low, 0.0) for r in best]]
        errors.append([max(r.kld_mean.high - r.kld_mean.value, 0.0) for r in best])
        axes.errorbar(*_places(best), yerr=errors, marker=marker, color=colour, capsize=3, lw=1.5, label=name)
        for row, following in zip(best, [*best[1:], None], strict=True):
            if following and following.bits_matrices - row.bits_matrices < TOO_NEAR_BITS:
                continue  # its label would lie under the better one's
            axes.annotate(
                row.label.replace(", rotated", " +rotation"),
                (row.bits_matrices, row.kld_mean.value),
                offset,
                textcoords="offset points",
                ha="right" if offset[0] < 0 else "left",
                fontsize=8,
                color=colour,
            )
    axes.set(yscale="log", xlabel="bits per weight, all matrices", ylabel="mean KLD from fp16 (nats), lower is better")
    left, right = axes.get_xlim()
    axes.set_xlim(left - 0.75, right + 0.9)  # room for labels
    axes.set_title("Drift of cobra-mini on its held-out suite, 95 % intervals", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def _places(rows: Sequence[QualityRow]) -> tuple[list[float], list[float]]:
    return [r.bits_matrices for r in rows], [r.kld_mean.value for r in rows]
