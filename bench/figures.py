"""`python -m bench.figures`: fill the tables of README and docs, and draw the drift plot, from bench/results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import click

from calibration.fusion_result import NAME as FUSION
from calibration.fusion_result import FusionResult, draw_fusion, fusion_table
from calibration.fusion_result import paper_table as paper_ablation_table
from cobra_edge.bench.decode_result import CpuDecodeResult, GpuDecodeResult
from cobra_edge.bench.end_to_end import EndToEndResult
from cobra_edge.bench.export_result import ExportResult, export_table
from cobra_edge.bench.results import read_result
from cobra_edge.bench.serving_result import ServeResult, serving_table
from cobra_edge.bench.tables import Table, markdown
from cobra_edge.bench.vision_result import VisionResult, engine_table, vision_table
from cobra_edge.errors import InputError
from cobra_edge.formats.quality import QUALITIES
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of

from .closed_sets import NAME as CLOSED_SETS
from .closed_sets import ClosedSetsResult, closed_sets_table, draw_reliability, reliability_table
from .container_size import NAME as CONTAINER_SIZE
from .container_size import ContainerSizeResult, container_size_table
from .cuda_paper import CudaPaperResult
from .cuda_paper_tables import paper_table, token_table
from .decode_goals import decode_goals_table, decode_table
from .drift_plot import draw_drift
from .emulated_answers_result import EmulatedAnswersResult, emulated_answers_table
from .fault_result import FaultResult, faults_table
from .gpu_goals import end_to_end_table, gpu_goals_table, gpu_table
from .gpu_result import (
    GpuKernelsResult,
    GpuParityResult,
    GpuSanitizerResult,
    kernels_tables,
    parity_table,
    sanitizer_table,
)
from .headline import headline_table, reasons
from .interval_coverage_result import CoverageResult, coverage_table, needed_table, tails_table
from .launch_time import NAME as LAUNCH_TIME
from .launch_time import LaunchTimeResult, installs_table, launch_time_table
from .methods_result import MethodsResult, methods_tables
from .narrow_calibration import NAME as NARROW
from .narrow_calibration import NarrowResult, narrow_table
from .predictions import prediction_table, published_table
from .quality_result import QualityResult, draws_table, goals_table, quality_goals_table, quality_table, rows_of
from .recorded_limits import NAME as RECORDED_LIMITS
from .recorded_limits_result import RecordedLimitsResult, alarms_table, changes_table, foretold_table
from .rivals_result import NAME as RIVALS
from .rivals_result import RivalsResult, crossings_table, draw_rivals, memory_table, rivals_sentences, speed_table
from .serving_goals import serving_goals_table
from .suite_cost_result import SuiteCostResult, suite_cost_table
from .vision_goals import MiniVisionResult, answers_table, vision_goals_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "results").glob("*.md")),
    ROOT / "export" / "containers" / "README.md",
    ROOT / "docs" / "regress-intervals.md",
    ROOT / "docs" / "regress-faults.md",
    ROOT / "docs" / "regression-harness.md",
)
PLOT = ROOT / "docs" / "drift.png"

AnyResult = TypeVar("AnyResult")


def _all(kind: type[AnyResult], *names: str) -> list[AnyResult]:
    """Return those of the results that exist, in this order."""
    files = [RESULTS / f"{name}.json" for name in names]
    return [read_result(file, kind) for file in files if file.is_file()]


def _of_gpus(kind: type[AnyResult], bench: str) -> list[AnyResult]:
    """Return the results of a benchmark on GPUs, by their names."""
    return _all(kind, *_gpu_names(bench))


def _gpu_names(bench: str) -> list[str]:
    return sorted(file.stem for file in RESULTS.glob(f"gpu-{bench}-*.json"))


def _first(found: list[AnyResult]) -> AnyResult | None:
    return next(iter(found), None)


def quality_result() -> QualityResult:
    """Return the result of `python -m bench.quality`."""
    return read_result(RESULTS / "quality.json", QualityResult)


def _cpu() -> list[CpuDecodeResult]:
    return _all(CpuDecodeResult, "cpu-decode", "cpu-decode-avx2")


def _gpu() -> list[GpuDecodeResult]:
    """Return what was measured of our schemes on each GPU, then beside peers."""
    return [*_of_gpus(GpuDecodeResult, "decode"), *_of_gpus(GpuDecodeResult, "peers")]


def _cuda_paper() -> list[CudaPaperResult]:
    return _all(CudaPaperResult, "cuda-paper")


def _vision(shape: str) -> list[VisionResult]:
    return _all(VisionResult, f"vision-{shape}")


def _mini_vision() -> list[MiniVisionResult]:
    return _all(MiniVisionResult, "vision-cobra-mini")


def _serve() -> list[ServeResult]:
    return _all(ServeResult, "serve-cobra-mini", "serve-cobra-3b")


def _coverage(table: Callable[[CoverageResult], Table]) -> list[Table]:
    return [table(result) for result in _all(CoverageResult, "interval-coverage")]


def _predictions() -> list[Table]:
    results: list[dict[str, Any]] = [json.loads((RESULTS / f"{name}.json").read_bytes()) for name in _gpu_names("decode")]
    return [prediction_table(results), published_table()]


def _not_empty(tables: Iterable[Table]) -> list[Table]:
    return [table for table in tables if table.rows]


TABLES: dict[str, Callable[[], Iterable[Table]]] = {
    "headline": lambda: [headline_table(quality_result())],
    "quality": lambda: [quality_table(quality_result())],
    "quality_goals": lambda: [quality_goals_table(quality_result())],
    "quality_draws": lambda: _not_empty([draws_table(quality_result())]),
    "goals": lambda: [goals_table(quality_result())],
    "export": lambda: map(export_table, _all(ExportResult, *(f"export-cobra-3b-{quality}" for quality in QUALITIES))),
    "narrow": lambda: map(narrow_table, _all(NarrowResult, NARROW)),
    "methods": lambda: (table for result in _all(MethodsResult, "methods-cobra-3b") for table in methods_tables(result)),
    "decode": lambda: map(decode_table, _cpu()),
    "decode_goals": lambda: _not_empty([decode_goals_table(_cpu())]),
    "gpu": lambda: map(gpu_table, _gpu()),
    "gpu_goals": lambda: [gpu_goals_table(_gpu())],
    "gpu_parity": lambda: [parity_table(_of_gpus(GpuParityResult, "parity"))],
    "gpu_sanitizer": lambda: [sanitizer_table(_of_gpus(GpuSanitizerResult, "sanitizer"))],
    "gpu_kernels": lambda: chain.from_iterable(map(kernels_tables, _of_gpus(GpuKernelsResult, "kernels"))),
    "end_to_end": lambda: [end_to_end_table(_of_gpus(EndToEndResult, "end-to-end"))],
    "cuda_token": lambda: map(token_table, _cuda_paper()),
    "cuda_paper": lambda: map(paper_table, _cuda_paper()),
    "emulated_answers": lambda: map(emulated_answers_table, _all(EmulatedAnswersResult, "emulated-answers")),
    "prediction": _predictions,
    "vision": lambda: map(vision_table, _vision("cobra-3b")),
    "vision_mini": lambda: map(vision_table, _vision("cobra-mini")),
    "vision_answers": lambda: _not_empty(map(answers_table, _mini_vision())),
    "vision_engines": lambda: _not_empty(map(engine_table, _vision("cobra-3b"))),
    "vision_goals": lambda: [vision_goals_table(_first(_vision("cobra-3b")), _first(_mini_vision()))],
    "serve": lambda: [serving_table(found)] if (found := _serve()) else [],
    "serve_goals": lambda: [serving_goals_table(_serve())],
    "regress": lambda: map(suite_cost_table, _all(SuiteCostResult, "regress-cobra-mini")),
    "closed_sets": lambda: map(closed_sets_table, _all(ClosedSetsResult, CLOSED_SETS)),
    "reliability": lambda: map(reliability_table, _all(ClosedSetsResult, CLOSED_SETS)),
    "container_size": lambda: map(container_size_table, _all(ContainerSizeResult, CONTAINER_SIZE)),
    "launch_time": lambda: map(launch_time_table, _all(LaunchTimeResult, LAUNCH_TIME)),
    "installs": lambda: map(installs_table, _all(LaunchTimeResult, LAUNCH_TIME)),
    "rivals_speed": lambda: map(speed_table, _all(RivalsResult, RIVALS)),
    "rivals_memory": lambda: map(memory_table, _all(RivalsResult, RIVALS)),
    "rivals_crossings": lambda: map(crossings_table, _all(RivalsResult, RIVALS)),
    "fusion": lambda: map(fusion_table, _all(FusionResult, FUSION)),
    "fusion_paper": lambda: [paper_ablation_table()],
    "recorded-limits": lambda: map(changes_table, _all(RecordedLimitsResult, RECORDED_LIMITS)),
    "foretold": lambda: map(foretold_table, _all(RecordedLimitsResult, RECORDED_LIMITS)),
    "false-alarms": lambda: map(alarms_table, _all(RecordedLimitsResult, RECORDED_LIMITS)),
    "faults": lambda: map(faults_table, _all(FaultResult, "regress-faults")),
    "coverage": lambda: _coverage(coverage_table),
    "coverage_tails": lambda: _coverage(tails_table),
    "images_needed": lambda: _coverage(needed_table),
}


def _text(name: str) -> str:
    if name == "rivals_sentences":
        return "\n".join(map(rivals_sentences, _all(RivalsResult, RIVALS)))
    if name == "reasons":
        decode = read_result(RESULTS / "cpu-decode.json", CpuDecodeResult)
        return reasons(quality_result(), decode, read_result(RESULTS / "serve-cobra-3b.json", ServeResult))
    return markdown(TABLES[name]())


def with_tables(text: str) -> str:
    """Return the text with each `<!-- table: NAME -->` … `<!-- end -->` filled from its result."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{_text(match[1])}\n<!-- end -->"

    return re.sub(r"<!-- table: ([^>\n]+?) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


@click.command(cls=Command, epilog="Example: python -m bench.figures --check")
@option("--check", group="output", is_flag=True, help="Write nothing; exit with 2 if a page is not up to date.")
@debug_option
def figures(check: bool) -> None:
    """Fill the tables of README and docs, and draw the drift plot, from bench/results."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fresh = with_tables(text)
        if check and fresh != text:
            raise InputError(f"{page.relative_to(ROOT)} differs from bench/results; run: make figures")
        if not check:
            page.write_text(fresh, encoding="utf-8")
    if not check:
        quality = quality_result()
        for closed in _all(ClosedSetsResult, CLOSED_SETS):
            draw_reliability(closed, ROOT / "docs" / "reliability.png")
        for rivals in _all(RivalsResult, RIVALS):
            draw_rivals(rivals, ROOT / "docs" / "rivals.png")
        for studied in _all(FusionResult, FUSION):
            draw_fusion(studied, ROOT / "docs" / "fusion.png")
        draw_drift([row for kind in ("ours", "peer") for row in rows_of(quality, kind) if row.draw is None], PLOT)


main = main_of(figures)

if __name__ == "__main__":
    main()
