"""Make the tables of README and docs and the drift plot from bench/results; nothing in them is typed by hand.

python -m bench.figures [--check]
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cobra_edge.bench.serving_figures import serving_goals_table, serving_table
from cobra_edge.errors import InputError
from cobra_edge.terminal.output import debug_option, main_of

from .coverage_tables import coverage_table
from .cuda_paper_tables import paper_table, token_table
from .decode_tables import decode_goals_table, decode_table
from .drift_plot import draw_drift
from .fault_tables import faults_table
from .gpu_tables import card_goals_table, card_table, end_to_end_table
from .headline import headline_table, reasons
from .method_tables import methods_table
from .predict_tables import prediction_table
from .quality_tables import goals_table, measured, quality_goals_table, quality_table
from .suite_cost_tables import suite_cost_table
from .vision_tables import answers_table, engine_table, vision_goals_table, vision_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "results").glob("*.md")),
    ROOT / "docs" / "regress-intervals.md",
    ROOT / "docs" / "regress-faults.md",
)
PLOT = ROOT / "docs" / "drift.png"


def read_result(name: str) -> dict[str, Any]:
    """Read one result."""
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return data


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
        (f"vision graph, {r['vision']['precision']}", f"{vision / 1e9:.2f} GB"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def found_results(*names: str) -> list[dict[str, Any]]:
    """Return those of the results that exist, in this order."""
    return [read_result(name) for name in names if (RESULTS / f"{name}.json").is_file()]


def _of_cards(bench: str) -> list[dict[str, Any]]:
    """Return what a bench found on cards, a result a card, by their names."""
    return found_results(*sorted(file.stem for file in RESULTS.glob(f"gpu-{bench}-*.json")))


def _maybe(name: str) -> dict[str, Any] | None:
    return next(iter(found_results(name)), None)


TABLES: dict[str, Callable[[], str]] = {
    "reasons": lambda: reasons(read_result("quality"), read_result("cpu-decode"), read_result("serve-cobra-3b")),
    "headline": lambda: headline_table(read_result("quality")),
    "quality": lambda: quality_table(read_result("quality")),
    "quality_goals": lambda: quality_goals_table(read_result("quality")),
    "export": export_table,
    "goals": lambda: goals_table(read_result("quality")),
    "decode": lambda: decode_table(found_results("cpu-decode", "cpu-decode-avx2")),
    "decode_goals": lambda: decode_goals_table(found_results("cpu-decode", "cpu-decode-avx2")),
    "card": lambda: card_table(_of_cards("decode")),
    "card_goals": lambda: card_goals_table(_of_cards("decode")),
    "end_to_end": lambda: end_to_end_table(_of_cards("end-to-end")),
    "cuda_token": lambda: token_table(_maybe("cuda-paper")),
    "cuda_paper": lambda: paper_table(_maybe("cuda-paper")),
    "prediction": lambda: prediction_table(_of_cards("decode")),
    "vision": lambda: vision_table(_maybe("vision-cobra-3b")),
    "vision_mini": lambda: vision_table(_maybe("vision-cobra-mini")),
    "vision_answers": lambda: answers_table(_maybe("vision-cobra-mini")),
    "vision_engines": lambda: engine_table(_maybe("vision-cobra-3b")),
    "vision_goals": lambda: vision_goals_table(_maybe("vision-cobra-3b"), _maybe("vision-cobra-mini")),
    "regress": lambda: suite_cost_table(_maybe("regress-cobra-mini")),
    "methods": lambda: methods_table(_maybe("methods-cobra-3b")),
    "coverage": lambda: coverage_table(_maybe("interval-coverage"), small=False),
    "serve": lambda: serving_table(found_results("serve-cobra-mini", "serve-cobra-3b")),
    "serve_goals": lambda: serving_goals_table(found_results("serve-cobra-mini", "serve-cobra-3b")),
    "faults": lambda: faults_table(_maybe("regress-faults")),
    "coverage_small": lambda: coverage_table(_maybe("interval-coverage"), small=True),
}


def with_tables(text: str) -> str:
    """Return the text with each `<!-- table: NAME -->` … `<!-- end -->` filled from its result."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


@click.command(epilog="Example: python -m bench.figures --check")
@click.option("--check", is_flag=True, help="Write nothing; exit with 2 where a page is not up to date.")
@debug_option
def command(check: bool) -> None:
    """Fill the tables of README and docs and draw the drift plot from bench/results."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fresh = with_tables(text)
        if check and fresh != text:
            raise InputError(f"{page.relative_to(ROOT)} differs from bench/results; run: make figures")
        if not check:
            page.write_text(fresh, encoding="utf-8")
    if not check:
        quality = read_result("quality")
        draw_drift([row for kind in ("ours", "peer") for row in measured(quality, kind)], PLOT)


main = main_of(command)

if __name__ == "__main__":
    main()
