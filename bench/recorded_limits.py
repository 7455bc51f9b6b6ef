"""`python -m bench.recorded_limits`: how far runtimes that work differ from the drift that an export records.

Every build is measured by every runtime on the same lines: instruction sets, threads, backends, the CUDA kernels on the
emulated GPU. The limits that ship (export/budgets/gates.toml) are made from the largest differences. Then each measurement is
judged as a run of its own on many parts of the suite, drawn by image: what fails there is a false alarm.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from cobra_edge.bench.machine import machine
from cobra_edge.bench.random_export import budget_without_limits
from cobra_edge.bench.results import check_name, save_result
from cobra_edge.bench.tables import print_result
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.backends import open_decoder
from cobra_edge.decode.cpu import CpuDecoder
from cobra_edge.decode.decoder import Decoder, DecoderOptions
from cobra_edge.decode.native.library import kernel_names
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.files.staging import staged_file
from cobra_edge.formats.package_data import export_data
from cobra_edge.formats.targets import target_named
from cobra_edge.inference.session import Session
from cobra_edge.regress.aggregate import Aggregate
from cobra_edge.regress.all_gates import Compared, gates_of
from cobra_edge.regress.budget import read_budget
from cobra_edge.regress.expected import MEASURE, expected_gate
from cobra_edge.regress.gates import Gate
from cobra_edge.regress.golden import Golden, read_golden
from cobra_edge.regress.line_metrics import LineMetrics, measure_line
from cobra_edge.regress.predictions import predictions
from cobra_edge.regress.recorded import kind_of
from cobra_edge.regress.report import Runtime
from cobra_edge.suite.tokenized import TokenizedSuite
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, progress

from .builds import BUILDS, DEFAULT, DEFAULT_ON_GPU, Build
from .emulated_answers import plug_in
from .recorded_limits_result import (
    CHANGES,
    Alarms,
    Change,
    Foretold,
    RecordedLimitsResult,
    alarms_table,
    changes_table,
    foretold_table,
    gate_limits_text,
)

NAME = "recorded-limits"
LIMITS = export_data("budgets") / "gates.toml"
_RECORDED = (DEFAULT, DEFAULT_ON_GPU, "w8a16-g128", "w4a16-g128")
_FORETOLD = (
    DEFAULT,
    DEFAULT_ON_GPU,
    "best, 4.0 bits",
    "best, 3.5 bits",
    "best, not rotated",
    "best, w8a16-g128",
    "best, w4a16-g128",
)
_IMAGES = (8, 16, 32, 64)  # of a drawn part of the suite
_DRAWS = 4  # of each size, for each measurement
_LINES = 320  # golden lines of each build
_EMULATED, _EMULATED_LINES = "CUDA, emulated", 16  # some ten seconds a line
_LABELS = {build.label: build for build in BUILDS}
Run = tuple[Change, list[Alarms]]


def decoders(bundle: Bundle) -> Iterator[tuple[str, Decoder]]:
    """Yield (runtime, decoder) for every runtime that has the bundle's activations."""
    activations = bundle.manifest.recipe.activations
    for threads in (1, 2):
        options = DecoderOptions(threads, activations=activations)
        for kernels in kernel_names():
            yield f"native, {kernels}, {threads} threads", CpuDecoder(bundle, options, kernels)
    yield "numpy", open_decoder(bundle, "cpu", "numpy", options)
    if activations == "float32":
        yield "torch", open_decoder(bundle, "cpu", "torch", options)
        yield _EMULATED, open_decoder(bundle, "cuda", "cuda", options)


def line_metrics(session: Session, golden: Golden, suite: TokenizedSuite) -> list[LineMetrics]:
    """Return the metrics of a suite of golden lines."""
    known = {golden.suite.key(line): i for i, line in enumerate(golden.suite.lines)}
    return [
        measure_line(line, golden.predictions[known[suite.key(line)]], prediction, session.codec.decode)
        for line, prediction in zip(suite.lines, predictions(session, suite), strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Judge:
    """Judges lines of a bundle that a runtime measured, by the gates that need no flag."""

    bundle: Bundle
    golden: Golden
    runtime: Runtime

    def gates(self, suite: TokenizedSuite, metrics: Sequence[LineMetrics]) -> dict[str, Gate]:
        """Return what each gate found, with the budget that ships."""
        manifest, aggregate = self.bundle.manifest, Aggregate()
        for line, found in zip(suite.lines, metrics, strict=True):
            aggregate.add(line, found)
        precision = None if manifest.vision is None else manifest.vision.precision
        limits = read_budget().limits_of(manifest.recipe.scheme, precision, manifest.target)
        return gates_of(Compared(manifest, self.golden, suite, self.runtime), aggregate, limits)

    def alarms(self, suite: TokenizedSuite, metrics: Sequence[LineMetrics], images: int, rows: Sequence[int]) -> Alarms:
        """Return which gates failed on these lines of a suite."""
        part = replace(suite, lines=[suite.lines[row] for row in rows])
        gates = self.gates(part, [metrics[row] for row in rows])
        failed = tuple(name for name, gate in gates.items() if not all(verdict.within for verdict in gate.verdicts))
        return Alarms(images, self.runtime.activations, failed)


def runs_of(bundle: Bundle, label: str, on_run: Callable[[str], None] = lambda runtime: None) -> Iterator[Run]:
    """Yield for each runtime what it changes of a build, and which gates failed on parts of its lines."""
    golden, drift = read_golden(bundle), bundle.manifest.drift
    assert drift is not None
    for number, (name, decoder) in enumerate(decoders(bundle)):
        on_run(name)
        suite = golden.suite.part(_EMULATED_LINES) if name == _EMULATED else golden.suite
        with Session(bundle, "cpu") as session:
            session.decoder = decoder
            vision = None if session.vision is None else session.vision.name
            runtime = Runtime(decoder.name, vision, decoder.activations, None, decoder.runs_on, "")
            metrics = line_metrics(session, golden, suite)
        judge = Judge(bundle, golden, runtime)
        figures = judge.gates(suite, metrics)["recorded"].figures
        values = [figures[measure].value or 0.0 for measure in CHANGES]
        change = Change(label, name, kind_of(drift, runtime), runtime.activations, len(suite.lines), *values)
        yield change, [judge.alarms(suite, metrics, *part) for part in parts(suite, number)]


def parts(suite: TokenizedSuite, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (number of images, indices of the lines about them) of drawn parts of a suite, then of all of it."""
    random = np.random.default_rng(seed)
    images = np.array([-1 if line.image is None else line.image for line in suite.lines])
    seen = np.unique(images[images >= 0])
    for size in _IMAGES:
        for _ in range(_DRAWS if size < len(seen) else 0):
            yield size, np.flatnonzero(np.isin(images, random.choice(seen, size, replace=False))).tolist()
    yield len(seen), list(range(len(suite.lines)))


def exported(build: Build, folder: Path, **options: Any) -> Bundle:
    """Export a build of cobra-mini with its golden lines."""
    out = folder / build.label.replace(",", "").replace(" ", "-")
    given = {"budget": budget_without_limits(folder), **build.export, **options}
    return Bundle.open(export_bundle("mini", target_named(build.target), out, **given).directory)


def foretold(build: Build, bundle: Bundle) -> Foretold:
    """Return the KLD that an export measured and the one that it foretold."""
    drift = bundle.manifest.drift
    assert drift is not None and drift.expected_kld is not None
    images, floor = len(read_golden(bundle).suite.images), bundle.manifest.noise_floor
    ratio = expected_gate(drift, drift.measures["kld_mean"], images, floor, {}).figures[MEASURE].value
    return Foretold(build.label, drift.expected_kld, drift.measures["kld_mean"], ratio or 0.0)


def _show(bar: Any, task: Any, label: str, runtime: str) -> None:
    bar.update(task, description=f"{label}: {runtime}")


@click.command(name="recorded-limits", cls=Command, epilog="Example: python -m bench.recorded_limits --write")
@option("--write", group="output", is_flag=True, help="Write the limits that follow to export/budgets/gates.toml, for review.")
@option("--name", group="output", default=NAME, help="Name of the file in bench/results.")
@debug_option
def recorded_limits(write: bool, name: str) -> None:
    """Measure how far runtimes differ from the recorded drift, and count false alarms; takes half an hour."""
    check_name(name)
    found, ratios = list[Run](), list[Foretold]()
    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        bundles, wanted = dict[str, Bundle](), dict.fromkeys((*_RECORDED, *_FORETOLD))
        task = bar.add_task("builds", total=len(wanted))
        for label in wanted:
            bundles[label] = exported(_LABELS[label], Path(folder), golden_lines=_LINES)
            if label in _FORETOLD:
                ratios.append(foretold(_LABELS[label], bundles[label]))
            bar.advance(task)
        plug_in()  # from here on this process has a GPU
        for label in _RECORDED:
            found += runs_of(bundles[label], label, partial(_show, bar, task, label))
    result = RecordedLimitsResult(
        changes=tuple(change for change, _ in found),
        runs=tuple(run for _, runs in found for run in runs),
        foretold=tuple(ratios),
        machine=machine(),
    )
    file = save_result(name, result)
    if write:
        with staged_file(LIMITS, force=True) as staged:
            staged.write_text(gate_limits_text(result), encoding="utf-8")
    print_result([changes_table(result), foretold_table(result), alarms_table(result)], file)


main = main_of(recorded_limits)

if __name__ == "__main__":
    main()
