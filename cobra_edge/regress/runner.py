"""One run: compare a build with its baseline line by line, aggregate, judge by the budget, and make a report."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import numpy as np

from ..bundle.reader import MANIFEST, Bundle, file_sha256
from ..decode.decoder import DecoderOptions
from ..environment.cpu_name import cpu_name
from ..formats.precision import PrecisionName
from ..inference.session import Session
from ..suite.tokenized import TokenizedSuite
from ..version import __version__
from . import report as reports
from .against import lines_of, open_against
from .aggregate import Aggregate
from .all_gates import Compared, gates_of
from .attribution import attribution
from .baseline import Reference, open_baseline
from .budget import Budget
from .bundle_tables import bits_per_weight
from .gates import Judgement, judged
from .journal import Journal, fingerprint_of, journal
from .line_metrics import measure_line
from .measures import MEASURES
from .predictions import predictions
from .report import Attribution, Report, Runtime, Times
from .state_sketch import SKETCH_SIZE
from .suite_selection import Scoring, require_images, select_suite

OnStep = Callable[[str, int, int], None]  # a stage, how much of it is done, how much there is
_FEW, _MANY = 16, 2  # attribution lines of a small model, and of a large one


@dataclass(frozen=True)
class Run:
    """What to measure, and on what.

    Attributes:
        bundle: directory of the build.
        baseline: see `open_baseline`.
        suite, lines, skip_bad: see `select_suite`.
        device, kernels, vision_runtime, options: see `session.load`.
        attribution_lines: number of lines for attribution; None for a default by model size, 0 for no attribution.
        commit: of the user's repository; None asks git.
        against: see `open_against`.
        scoring: see `suite_selection.Scoring`.
    """

    bundle: Path
    baseline: str
    suite: Path | None
    lines: int | None
    skip_bad: bool
    device: str
    kernels: str
    vision_runtime: str
    options: DecoderOptions
    attribution_lines: int | None
    commit: str | None
    against: Path | None = None
    scoring: Scoring = "reply"


@dataclass(frozen=True, eq=False)
class RunResult:
    """A report, and the suite that it is about (for its images)."""

    report: Report
    suite: TokenizedSuite


@dataclass(frozen=True, eq=False)
class _Opened:
    """A run's build, baseline and suite, opened."""

    run: Run
    session: Session
    reference: Reference
    suite: TokenizedSuite
    against: dict[str, np.ndarray] | None = None  # see `lines_of`

    @property
    def bundle(self) -> Bundle:
        return self.session.bundle

    @cached_property
    def suite_sha256(self) -> str:
        return self.suite.sha256()

    @cached_property
    def bundle_fingerprint(self) -> str:
        return file_sha256(self.bundle.path(MANIFEST))

    @cached_property
    def runtime(self) -> Runtime:
        decoder, vision = self.session.decoder, self.session.vision
        return Runtime(
            decoder=decoder.name,
            vision=None if vision is None else vision.name,
            activations=decoder.activations,
            threads=self.run.options.threads,
            device=decoder.runs_on,
            machine=f"{cpu_name()}, {platform.machine()}",
        )

    def fingerprint(self) -> str:
        """Return a hash over everything that the metrics of a line depend on."""
        return fingerprint_of(
            __version__,
            self.bundle_fingerprint,
            self.reference.kind,
            self.reference.fingerprint,
            self.suite_sha256,
            repr(self.runtime),
            str(len(self.suite.lines)),
        )


def measure(
    run: Run,
    budget: Budget | None,
    budget_name: str | None,
    directory: Path | None,
    on_step: OnStep = lambda name, done, total: None,
) -> RunResult:
    """Measure a build.

    Args:
        run: what to measure, and on what.
        budget: to judge by; None judges nothing.
        budget_name: file name of the budget, for the report.
        directory: existing directory for the journal, from which an interrupted run resumes; None for no journal.
        on_step: called with the name of a stage, how much of it is done, and how much there is.

    Raises:
        InputError: an invalid build, baseline, suite or budget, or fewer than two images.
        DriftError: an answer that is not finite. MachineError: a library, a device or memory is missing.
    """
    began, clock = datetime.now(timezone.utc), time.monotonic()
    bundle = Bundle.open(run.bundle)
    manifest = bundle.manifest
    scheme, precision = manifest.recipe.scheme, _vision_precision(bundle)
    limits = None if budget is None else budget.limits_of(scheme, precision, manifest.target)
    opened = _open(run, bundle, on_step)
    with journal(directory, opened.fingerprint()) as kept:
        aggregate = _aggregate(opened, kept, on_step)
        parts = _attribution(opened, on_step)  # while the journal is open: if interrupted here, the lines are kept
    compared = Compared(manifest, opened.reference.golden, opened.suite, opened.runtime, opened.against)
    found = judged(gates_of(compared, aggregate, limits, _not_taken(opened.session)))
    seconds, new = time.monotonic() - clock, len(opened.suite.lines) - len(kept.done)
    times = Times(began.isoformat(timespec="seconds"), round(seconds, 2), round(new / seconds, 2))
    return RunResult(_report(opened, aggregate, found, parts, times, budget_name), opened.suite)


def _report(
    opened: _Opened, aggregate: Aggregate, found: Judgement, parts: Attribution | None, times: Times, budget_name: str | None
) -> Report:
    return Report(
        schema_version=reports.REPORT_VERSION,
        cobra_edge=__version__,
        commit=opened.run.commit or _commit(),
        build=_build(opened),
        runtime=opened.runtime,
        baseline=_baseline(opened.reference, aggregate),
        suite=_suite(opened, aggregate),
        measures={name: figure for name, figure in found.figures.items() if name in MEASURES},
        not_taken=_not_taken(opened.session),
        noise_floor=opened.bundle.manifest.noise_floor,
        tasks=aggregate.tasks(),
        positions=aggregate.positions(),
        layers=aggregate.layers(),
        worst=aggregate.worst(),
        attribution=parts,
        budget=budget_name,
        verdicts=found.verdicts,
        passed=all(verdict.within for verdict in found.verdicts),
        times=times,
        not_judged=found.not_judged,
    )


def _open(run: Run, bundle: Bundle, on_step: OnStep) -> _Opened:
    """Open the build and its baseline, and select the suite."""

    def open_session(of: Bundle) -> Session:
        return Session(of, run.device, run.kernels, run.options, run.vision_runtime)

    on_step("opening", 0, 1)
    session, reference = open_session(bundle), open_baseline(run.baseline, bundle, open_session)
    suite = select_suite(
        bundle,
        reference.golden,
        run.suite,
        run.lines,
        skip_bad=run.skip_bad,
        scoring=run.scoring,
        on_image=lambda done, total: on_step("images", done, total),
    )
    opened = _Opened(run, session, reference, suite)
    require_images(opened.suite)
    if run.against is None:
        return opened
    other, model = open_against(run.against), bundle.manifest.model.model_id
    return replace(opened, against=lines_of(other, model, reference.kind, suite, opened.suite_sha256))


def _aggregate(opened: _Opened, kept: Journal, on_step: OnStep) -> Aggregate:
    """Return the aggregate of all lines: those of the journal, and those that are left, which are measured now."""
    suite, session = opened.suite, opened.session
    aggregate, total, first = Aggregate(), len(suite.lines), len(kept.done)
    for tokenized, metrics in zip(suite.lines, kept.done, strict=False):
        aggregate.add(tokenized, metrics)
    left = (
        zip(suite.lines[first:], opened.reference.predictions(suite, first), predictions(session, suite, first), strict=True)
        if first < total
        else ()  # interrupted after the last line
    )
    for done, (tokenized, reference, build) in enumerate(left, first):
        on_step("lines", done, total)
        metrics = measure_line(tokenized, reference, build, session.codec.decode)
        kept.write(metrics)
        aggregate.add(tokenized, metrics)
    on_step("lines", total, total)
    return aggregate


def _attribution(opened: _Opened, on_step: OnStep) -> Attribution | None:
    lines = opened.run.attribution_lines
    if lines is None:
        lines = _MANY if opened.bundle.manifest.model.mamba.is_large else _FEW
    if not lines:
        return None
    return attribution(opened.session, opened.reference, opened.suite.part(lines), opened.run.options, on_step)


def _vision_precision(bundle: Bundle) -> PrecisionName | None:
    return None if bundle.manifest.model.vision is None else bundle.vision_graph.precision


def _build(opened: _Opened) -> reports.Build:
    bundle, manifest = opened.bundle, opened.bundle.manifest
    return reports.Build(
        name=bundle.directory.resolve().name,
        fingerprint=opened.bundle_fingerprint,
        model=manifest.model.model_id,
        source=manifest.source.id,
        source_sha256=manifest.source.sha256,
        target=manifest.target,
        scheme=manifest.recipe.scheme,
        method=manifest.recipe.method,
        rotations=tuple(manifest.recipe.rotations),
        vision_precision=_vision_precision(bundle),
        bits_per_weight=bits_per_weight(manifest),
        bundle_bytes=sum(entry.bytes for entry in manifest.files.values()),
    )


def _baseline(reference: Reference, aggregate: Aggregate) -> reports.Baseline:
    return reports.Baseline(
        kind=reference.kind,
        name=reference.name,
        computed_by=reference.computed_by,
        top_k=None if reference.golden is None else int(aggregate.largest("kept")),
        tail_mass_max=aggregate.largest("tail"),
        prompt_tail_mass_max=aggregate.largest("prompt_tail"),
        state_sketch=SKETCH_SIZE,
    )


def _suite(opened: _Opened, aggregate: Aggregate) -> reports.Suite:
    return reports.Suite(
        name=opened.suite.name,
        sha256=opened.suite_sha256,
        lines=aggregate.total("lines"),
        images=aggregate.images,
        answer_tokens=aggregate.total("tokens"),
        prompt_tokens=aggregate.total("prompt_tokens"),
        skipped=opened.suite.skipped,
        scoring=opened.run.scoring,
    )


def _not_taken(session: Session) -> dict[str, str]:
    return {} if session.vision is not None else {"vision_error": "the model has no vision encoder"}


def _commit() -> str | None:
    """Return the commit of the current directory; None outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
