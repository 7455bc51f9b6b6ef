"""The README's tables and the plot of `bench quality`: how well each build answers, beside peers, and the goals it reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cobra_edge.formats.recipe import MIXED

Row = dict[str, Any]

NOT_MEASURED = "not measured"
# What cobra-mini in float was asked to reach on its held-out suite; a caption is reported, not judged.
GOALS = {"existence": 0.95, "spatial": 0.90, "attribute": 0.95, "count": 0.85}
# What quantized builds were asked to reach.
FEW_BITS = 4.3  # of the matrices, at which ours is held against peers of 4 bits
EIGHT_BIT_PEER = "llama.cpp Q8_0"
LOST_AT_MOST = {4: 0.01, 8: 0.002}  # share of the answers of any task, by bits of a code, activations in float


def quality_table(result: Row) -> str:
    """Return drift and accuracy of each build and peer as Markdown, 95 % intervals of the KLD in brackets."""
    rows = result["rows"]
    tasks = [*GOALS, "caption"]
    head = ["build", "bits / weight: matrices", "all", "activations", "mean KLD (nats)", "p99 KLD", "top-1", "perplexity ratio"]
    lines = [_line([*head, *tasks]), "|---" * (len(head) + len(tasks)) + "|"]
    for row in rows:
        if "not_measured" in row:
            lines.append(
                _line([f"{row['label']} ({NOT_MEASURED}: {row['not_measured']})", *["–"] * (len(head) + len(tasks) - 1)])
            )
            continue
        cells = [row["label"], f"{row['bits_matrices']:.2f}", f"{row['bits_all']:.2f}", row["activations"]]
        cells += [_spread(row["kld_mean"], ".2e"), _spread(row["kld_p99"], ".1e"), f"{row['top1_agreement']['value']:.2%}"]
        cells += [f"{row['perplexity_ratio']['value']:.4f}", *(f"{row['accuracy'][t]['right']:.1%}" for t in tasks)]
        lines.append(_line(cells))
    return "\n".join(lines)


def goals_table(result: Row) -> str:
    """Return cobra-mini's accuracy in float beside its goals as Markdown."""
    row = result["rows"][0]
    lines = ["| task | held-out lines | right | goal | |", "|---|---|---|---|---|"]
    for task, goal in GOALS.items():
        found = row["accuracy"][task]
        lines.append(_line([task, str(found["lines"]), f"{found['right']:.1%}", f"{goal:.0%}", _word(found["right"] >= goal)]))
    caption = row["accuracy"]["caption"]
    exact = f"{caption['right']:.1%} exact, perplexity {row['caption_perplexity']:.3f}"
    lines.append(_line(["caption", str(caption["lines"]), exact, "–", "reported"]))
    return "\n".join(lines)


def quality_goals_table(result: Row) -> str:
    """Return the goals of quantized builds beside what was measured as Markdown.

    A goal is judged by the figure itself; where its 95 % interval reaches over the bound, the cell says so.
    """
    ours = _measured(result, "ours")
    four = _best(r for r in ours if r["bits_matrices"] <= FEW_BITS)
    lines = [_line(["goal", "build", "measured", ""]), "|---" * 4 + "|"]
    for peer in [r for r in result["rows"] if r["kind"] == "peer" and r["weight_bits"] == 4]:
        lines.append(_below(f"≤ {FEW_BITS} bits: mean KLD below that of {peer['label']}", four, peer))
    eight = [r for r in result["rows"] if r["label"] == EIGHT_BIT_PEER]
    if eight:
        within = [r for r in ours if r["weight_bits"] == 8 and r["bits_matrices"] <= eight[0].get("bits_matrices", 0)]
        lines.append(_below(f"8 bits: mean KLD below that of {EIGHT_BIT_PEER}", _best(within), eight[0]))
    for bits, lost in LOST_AT_MOST.items():
        kept = f"every task within {100 * lost:g} point{'s' * (lost != 0.01)} of float"
        alike = [r for r in ours if r["weight_bits"] == bits and r["activations"] == "float32" and MIXED not in r["label"]]
        lines.append(_every_task(f"w{bits}a16: {kept}", _best(alike), lost))
        if bits == 4:
            lines.append(_every_task(f"≤ {FEW_BITS} bits: {kept}", four, lost))
    return "\n".join(lines)


def draw_drift(result: Row, file: Path) -> None:
    """Draw bits per weight of the matrices against mean KLD, one numbered point a build, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.5))
    rows = [r for kind in ("ours", "peer") for r in _measured(result, kind)]
    for number, row in enumerate(rows, 1):
        kld, marker = row["kld_mean"], "o" if row["kind"] == "ours" else "s"
        colour = "C0" if row["kind"] == "ours" else "C1"
        errors = [[max(kld["value"] - kld["low"], 0.0)], [max(kld["high"] - kld["value"], 0.0)]]
        place = (row["bits_matrices"], kld["value"])
        axes.errorbar(
            *place,
            yerr=errors,
            fmt=marker,
            color=colour,
            capsize=3,
            label=f"{number}  {row['label']}",
            markersize=7,
            alpha=0.85,
        )
    axes.set(yscale="log", xlabel="bits per weight, all matrices", ylabel="mean KLD from float (nats)")
    axes.set_title("drift of cobra-mini on its held-out suite, 95 % intervals; ● cobra_edge, ■ peers")
    axes.grid(alpha=0.3, which="both")
    _number(axes, [(r["bits_matrices"], r["kld_mean"]["value"]) for r in rows])
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def _number(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Write each point's number beside it, at the first of some places that is clear of all points and earlier numbers."""
    axes.figure.canvas.draw()  # settles where the points lie on the picture
    places = axes.transData.transform(points)
    taken = [tuple(place) for place in places]
    for number, (x, y) in enumerate(places, 1):
        spots = [(side * far, up) for far in (18, 30, 44) for up in (0, 13, -13, 26, -26) for side in (1, -1)]
        clear = [s for s in spots if all(abs(x + s[0] - tx) > 17 or abs(y + s[1] - ty) > 12 for tx, ty in taken)]
        dx, dy = (clear or spots)[0]
        taken.append((x + dx, y + dy))
        thin = {"arrowstyle": "-", "lw": 0.5, "alpha": 0.5} if (dx, dy) not in spots[:2] else None
        axes.annotate(
            str(number), points[number - 1], (dx, dy), textcoords="offset pixels", ha="center", va="center", arrowprops=thin
        )


def _measured(result: Row, kind: str) -> list[Row]:
    return [r for r in result["rows"] if r["kind"] == kind and "not_measured" not in r]


def _best(rows: Any) -> Row | None:
    """Return the row of smallest mean KLD, or None of none."""
    return min(rows, key=lambda r: r["kld_mean"]["value"], default=None)


def _below(goal: str, ours: Row | None, peer: Row) -> str:
    ratio = ours and ours["against"].get(peer["label"], {}).get("kld_ratio")
    if not ours or not ratio:
        return _line([goal, ours["label"] if ours else "–", NOT_MEASURED, ""])
    return _line([goal, ours["label"], f"{_spread(ratio, '.2f')} times", _verdict(ratio, lambda v: v <= 1)])


def _every_task(goal: str, ours: Row | None, lost: float) -> str:
    if ours is None:
        return _line([goal, "–", NOT_MEASURED, ""])
    task, worst = min(
        ((t, a["difference"]) for t, a in ours["accuracy"].items()), key=lambda pair: (pair[1]["value"], pair[1]["low"])
    )
    points = {end: 100 * value for end, value in worst.items()}
    allowed = -100 * lost - 1e-9
    return _line([goal, ours["label"], f"{task} {_spread(points, '+.1f')}", _verdict(points, lambda v: v >= allowed)])


def _verdict(interval: dict[str, float], within: Callable[[float], bool]) -> str:
    word = _word(within(interval["value"]))
    sure = within(interval["low"]) == within(interval["high"])
    return word if sure else f"{word}, the interval reaches over"


def _word(reached: bool) -> str:
    return "reached" if reached else "**missed**"


def _spread(interval: dict[str, float], form: str) -> str:
    return f"{interval['value']:{form}} ({interval['low']:{form}}–{interval['high']:{form}})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
