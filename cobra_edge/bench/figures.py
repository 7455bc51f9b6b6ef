"""Make the README's tables and the drift plot from bench/results; nothing in them is typed by hand.

python -m cobra_edge.bench.figures [--check]
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..terminal import debug_option, main_of
from .decode_figures import decode_goals_table, decode_table
from .methods_figures import methods_table

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "drift.png"
# What cobra-mini in float was asked to reach on its held-out suite; a caption is reported, not judged.
GOALS = {"existence": 0.95, "spatial": 0.90, "attribute": 0.95, "count": 0.85}


def read_result(name: str) -> dict[str, Any]:
    """Read one result."""
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return data


def quality_table() -> str:
    """Return drift and accuracy of each scheme as Markdown."""
    rows = read_result("quality")["rows"]
    tasks = [*GOALS, "caption"]
    head = ["scheme", "activations", "bits / weight", "mean KLD (nats)", "p99 KLD", "top-1", *tasks, "caption perplexity"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        cells = [r["scheme"], r["activations"], f"{r['bits_per_weight']:.2f}", f"{r['kld_mean']:.2e}", f"{r['kld_p99']:.2e}"]
        cells += [f"{r['top1_agreement']:.2%}", *(f"{r['accuracy'][t]:.1%}" for t in tasks)]
        lines.append("| " + " | ".join([*cells, f"{r['caption_perplexity']:.3f}"]) + " |")
    return "\n".join(lines)


def export_table() -> str:
    """Return the full-size export as Markdown."""
    r = read_result("export-cobra-3b")
    files = r["bundle_bytes"]
    vision = sum(size for name, size in files.items() if name.startswith("vision"))
    rows = [
        ("machine", f"{r['machine']['processor']}, {r['machine']['cores']} cores, {r['machine']['memory_gb']} GB"),
        ("wall time", f"{r['seconds'] / 60:.1f} min"),
        ("peak resident memory, mapped files included", f"{r['peak_gib']:.1f} GiB"),
        ("checkpoint", f"{r['checkpoint_bytes'] / 1e9:.2f} GB"),
        (f"decoder as {r['scheme']}", f"{files['decoder.safetensors'] / 1e9:.2f} GB"),
        ("vision graph, float32", f"{vision / 1e9:.2f} GB"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def goals_table() -> str:
    """Return cobra-mini's accuracy in float beside its goals as Markdown."""
    row = next(r for r in read_result("quality")["rows"] if r["scheme"] == "fp16")
    lines = ["| task | held-out lines | right | goal | |", "|---|---|---|---|---|"]
    for task, goal in GOALS.items():
        value = row["accuracy"][task]
        word = "reached" if value >= goal else "**missed**"
        lines.append(f"| {task} | {row['lines_by_task'][task]} | {value:.1%} | {goal:.0%} | {word} |")
    caption = f"| {row['lines_by_task']['caption']} | {row['accuracy']['caption']:.1%} exact, perplexity "
    lines.append(f"| caption {caption}{row['caption_perplexity']:.3f} | – | reported |")
    return "\n".join(lines)


def found_results(*names: str) -> list[dict[str, Any]]:
    """Return those of the results that exist, in this order."""
    return [read_result(name) for name in names if (RESULTS / f"{name}.json").is_file()]


TABLES: dict[str, Callable[[], str]] = {
    "quality": quality_table,
    "export": export_table,
    "goals": goals_table,
    "decode": lambda: decode_table(found_results("cpu-decode", "cpu-decode-avx2")),
    "decode_goals": lambda: decode_goals_table(found_results("cpu-decode", "cpu-decode-avx2")),
    "methods": lambda: methods_table(next(iter(found_results("methods-cobra-3b")), None)),
}


def with_tables(text: str) -> str:
    """Return the text with each `<!-- table: NAME -->` … `<!-- end -->` filled from its result."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def label(row: dict[str, Any]) -> str:
    """Name a row of the quality result in a plot."""
    return f"{row['scheme']}, {row['activations']}"


def draw_drift(file: Path) -> None:
    """Draw bits per weight against mean KLD and against lost accuracy, one point a scheme."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_result("quality")["rows"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    colours = {label(r): f"C{index}" for index, r in enumerate(rows)}  # the same on both sides; the legend is on the right
    shapes = {"float32": "o", "int8": "^"}
    for r in rows:
        if r["kld_mean"] > 0:
            marker = shapes[r["activations"]]
            left.plot(r["bits_per_weight"], r["kld_mean"], marker, markersize=10, color=colours[label(r)], alpha=0.8)
    left.set(yscale="log", xlabel="bits per weight of the decoder", ylabel="mean KLD from float (nats)", xlim=(3, 12))
    left.margins(y=0.15)
    left.set_title("drift of cobra-mini, held-out suite")
    left.grid(alpha=0.3, which="both")
    tasks = [*GOALS, "caption"]
    width = 0.8 / len(rows)
    for index, r in enumerate(rows):
        places = [i + (index - (len(rows) - 1) / 2) * width for i in range(len(tasks))]
        right.bar(places, [100 * r["accuracy"][t] for t in tasks], width, label=label(r), color=colours[label(r)])
    right.set_xticks(range(len(tasks)), tasks)
    right.set(ylabel="exact answers (%)", ylim=(0, 135), title="answers")
    right.legend(ncols=2, fontsize="small", loc="upper center", frameon=False)
    right.grid(alpha=0.3, axis="y")
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})


@click.command(epilog="Example: python -m cobra_edge.bench.figures --check")
@click.option("--check", is_flag=True, help="Write nothing; exit with 2 where the README is not up to date.")
@debug_option
def command(check: bool) -> None:
    """Fill the README's tables and draw the drift plot from bench/results."""
    text = README.read_text(encoding="utf-8")
    fresh = with_tables(text)
    if check:
        if fresh != text:
            raise InputError("README.md differs from bench/results; run: make figures")
        return
    README.write_text(fresh, encoding="utf-8")
    draw_drift(PLOT)


main = main_of(command)

if __name__ == "__main__":
    main()
