"""The tables of `bench.quality`: how well each build answers, beside peers, and the goals it reaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    ours = measured(result, "ours")
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


def measured(result: Row, kind: str) -> list[Row]:
    """Return the rows of a kind, "ours" or "peer", that were measured."""
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
