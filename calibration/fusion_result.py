"""The result of `calibration.fusion`, its tables and its plot."""

from __future__ import annotations

from pathlib import Path

import msgspec

from cobra_edge.bench.machine import Machine
from cobra_edge.bench.spread import Spread
from cobra_edge.bench.tables import NO_VALUE, Table
from cobra_edge.regress.report import Figure

NAME = "fusion"
# The paper's ablation of Cobra-3.5B (arXiv 2403.14520), in percent.
PAPER_SETS = ("VQAv2", "GQA", "VizWiz", "TextVQA", "VSR", "POPE")
PAPER = {
    "DINOv2 + SigLIP, fused-gelu-mlp": (77.8, 62.3, 49.7, 58.2, 58.4, 88.4),
    "SigLIP alone": (77.5, 61.8, 48.3, 58.8, 53.2, 88.2),
    "LDPv2": (76.2, 61.9, 50.2, 54.7, 56.1, 87.7),
}


class FusionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One variant, of one seed.

    Attributes:
        variant: its name.
        encoders, projector, image_last, heads: see `Variant`.
        seed, steps: of stage language.
        minutes: of training, pauses left out.
        visual_tokens: of an image.
        parameters: of projector and decoder.
        accuracy: of the float model by task, 0 to 1.
        accuracy_4_bits: of the fast build, w4a16-g128, over all lines; and its change.
        quality: of the other 4-bit build.
        kld_fast, kld_quality: mean KLD in nats of both builds; the latter is None where no export can read the order.
        bundle_bytes: of the build.
        first_token_ms: of an answer, vision included, on the CPU.
    """

    variant: str
    encoders: str
    projector: str
    image_last: bool
    heads: bool
    seed: int
    steps: int
    minutes: float
    visual_tokens: int
    parameters: int
    accuracy: dict[str, float]
    accuracy_4_bits: Figure
    accuracy_change: Figure
    kld_fast: Figure
    quality: str
    kld_quality: Figure | None
    bundle_bytes: int
    first_token_ms: Spread
    machine: Machine


class FusionResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m calibration.fusion`."""

    bench: str = "fusion"
    rows: tuple[FusionRow, ...]
    machine: Machine


def fusion_table(result: FusionResult) -> Table:
    """Return a row for each variant: accuracy by task, tokens, size, time and what 4 bits cost."""
    tasks = sorted(result.rows[0].accuracy)
    rows = []
    for row in result.rows:
        accuracies = [f"{100 * row.accuracy[task]:.1f}" for task in tasks]
        four = f"{_percent(row.accuracy_4_bits)} ({_percent(row.accuracy_change, '+')})"
        klds = [_kld(row.kld_fast), NO_VALUE if row.kld_quality is None else _kld(row.kld_quality)]
        cells = [row.variant, *accuracies, four, *klds, str(row.visual_tokens), f"{row.bundle_bytes / 1e6:.2f}"]
        rows.append([*cells, row.first_token_ms.cell(".1f")])
    steps, seeds = (sorted({getattr(row, name) for row in result.rows}) for name in ("steps", "seed"))
    title = (
        f"{', '.join(map(str, steps))} steps, seeds {', '.join(map(str, seeds))}; accuracy in % on held-out lines; "
        f"mean KLD in nats; commit {result.machine.commit}"
    )
    heading = [
        "variant",
        *tasks,
        "all, fast 4 bits (change)",
        "KLD, fast",
        "KLD, default",
        "visual tokens",
        "MB",
        "first token, ms",
    ]
    return Table(heading, rows, title)


def _percent(figure: Figure, sign: str = "") -> str:
    return NO_VALUE if figure.value is None else f"{100 * figure.value:{sign}.1f}"


def _kld(figure: Figure) -> str:
    ends = "" if figure.low is None or figure.high is None else f" ({figure.low:.1e}–{figure.high:.1e})"
    return NO_VALUE if figure.value is None else f"{figure.value:.1e}{ends}"


def paper_table() -> Table:
    """Return the paper's ablation."""
    rows = [[name, *(f"{value:.1f}" for value in values)] for name, values in PAPER.items()]
    return Table(["Cobra-3.5B", *PAPER_SETS], rows, "the paper's ablation, in %")


def draw_fusion(result: FusionResult, file: Path) -> None:
    """Draw mean accuracy of the tasks over the time to the first token, a point a variant; write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.6))
    markers = dict(zip(dict.fromkeys(row.encoders for row in result.rows), "osD^", strict=False))
    for row in result.rows:
        mean = 100 * sum(row.accuracy.values()) / len(row.accuracy)
        kept = "black" if row.image_last else "tab:blue" if row.heads else "tab:gray"
        axes.plot(row.first_token_ms.median, mean, markers[row.encoders], color=kept, ms=7, mfc="none")
        axes.annotate(row.variant, (row.first_token_ms.median, mean), fontsize=6.5, xytext=(5, 3), textcoords="offset points")
    axes.set(xlabel="first token of an answer about a new image, ms", ylabel="accuracy, mean over tasks, %")
    axes.grid(alpha=0.25)
    axes.margins(x=0.2)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
