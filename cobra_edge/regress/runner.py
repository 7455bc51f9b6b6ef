"""One run of the harness: ask a build and its baseline every line, add up, judge, and put it all into a report."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..bundle.reader import MANIFEST, Bundle, file_sha256
from ..decode.decoder import DecoderOptions
from ..decode.processor import processor_name
from ..inference.session import Session
from ..suite.tokenized import TokenizedSuite
from ..version import __version__
from . import report as reports
from .aggregate import Aggregate
from .attribution import attribution
from .baseline import Reference, open_baseline
from .budget import Budget, judge
from .bundle_tables import bits_per_weight
from .journal import Journal, fingerprint_of, journal
from .line_metrics import measure_line
from .measures import MEASURES
from .predictions import predictions
from .report import Report, Runtime
from .state_sketch import SKETCH_SIZE
from .suite_selection import select_suite

OnStep = Callable[[str, int, int], None]  # a stage, how much of it is done, how much there is
_FEW, _MANY = 16, 2  # lines for attribution, of a small model and of one with more than 10⁹ weights


@dataclass(frozen=True)
class Run:
    """What to measure, and on what.

    Attributes:
        bundle: the build's directory.
        baseline: see `open_baseline`.
        suite, lines, skip_bad: see `chosen_suite`.
        device, kernels, vision_runtime, options: as `session.load` takes them.
        attribution_lines: how many lines every part is tried on; None for a few, 0 for none.
        commit: of the user's repository; None asks git.
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


@dataclass(frozen=True, eq=False)
class RunResult:
    """A report, and the suite it is about (for its images)."""

    report: Report
    suite: TokenizedSuite


def measure(
    run: Run,
    budget: Budget | None,
    budget_name: str | None,
    directory: Path | None,
    on_step: OnStep = lambda name, done, total: None,
) -> RunResult:
    """Measure a build.

    Args:
        run: what and on what.
        budget: to judge by; None judges nothing.
        budget_name: of its file, for the report.
        directory: for the journal, so that an interrupted run goes on; it exists.
        on_step: told a stage's name, how much of it is done, and of what.

    Raises:
        InputError: a build, baseline, suite or budget that is not what it should be, or fewer than two images.
        DriftError: an answer that is not finite. MachineError: something is missing here.
    """
    began, clock = datetime.now(timezone.utc), time.monotonic()
    bundle = Bundle.open(run.bundle)
    manifest = bundle.manifest
    precision = None if manifest.model.vision is None else bundle.vision_graph.precision
    limits = {} if budget is None else budget.limits_of(manifest.recipe.scheme, precision, manifest.target)

    def opened(of: Bundle) -> Session:
        return Session(of, run.device, run.kernels, run.options, run.vision_runtime)

    on_step("opening", 0, 1)
    session, reference = opened(bundle), open_baseline(run.baseline, bundle, opened)
    suite = select_suite(
        bundle,
        reference.golden,
        run.suite,
        run.lines,
        skip_bad=run.skip_bad,
        on_image=lambda done, total: on_step("images", done, total),
    )
    runtime = _runtime(session, run)
    digest = suite.sha256()
    identity = fingerprint_of(
        __version__, _fingerprint(bundle), reference.kind, reference.fingerprint, digest, repr(runtime), str(len(suite.lines))
    )
    found, few = None, run.attribution_lines
    if few is None:
        few = _FEW if manifest.model.mamba.n_parameters < 10**9 else _MANY
    with journal(directory, identity) as kept:
        aggregate = _measure_lines(session, reference, suite, kept, on_step)
        if few:  # while the journal is open: interrupted here, a run does not ask its lines again
            found = attribution(session, reference, suite.part(few), run.options, on_step)
    new = len(suite.lines) - len(kept.done)
    figures = aggregate.figures()
    floor, not_taken = manifest.noise_floor, _not_taken(session)
    verdicts = judge(figures, limits, floor, not_taken)
    seconds = time.monotonic() - clock
    report = Report(
        schema_version=reports.REPORT_VERSION,
        cobra_edge=__version__,
        commit=run.commit or _commit(),
        build=_build(bundle),
        runtime=runtime,
        baseline=_baseline(reference, aggregate),
        suite=reports.Suite(
            name=suite.name,
            sha256=digest,
            lines=aggregate.total("lines"),
            images=aggregate.images,
            answer_tokens=aggregate.total("tokens"),
            prompt_tokens=aggregate.total("prompt_tokens"),
            skipped=suite.skipped,
        ),
        measures={name: figure for name, figure in figures.items() if name in MEASURES},
        not_taken=not_taken,
        noise_floor=floor,
        tasks=aggregate.tasks(),
        positions=aggregate.positions(),
        layers=aggregate.layers(),
        worst=aggregate.worst(),
        attribution=found,
        budget=budget_name,
        verdicts=verdicts,
        passed=all(v.within for v in verdicts),
        times=reports.Times(began.isoformat(timespec="seconds"), round(seconds, 2), round(new / seconds, 2)),
    )
    return RunResult(report, suite)


def _measure_lines(session: Session, reference: Reference, suite: TokenizedSuite, kept: Journal, on_step: OnStep) -> Aggregate:
    """Ask every line that an interrupted run left; returns what all of them add up to."""
    aggregate, total, first = Aggregate(), len(suite.lines), len(kept.done)
    for tokenized, line in zip(suite.lines, kept.done, strict=False):
        aggregate.add(tokenized, line)
    pairs = (
        zip(suite.lines[first:], reference.predictions(suite, first), predictions(session, suite, first), strict=True)
        if first < total
        else ()  # interrupted after the last line
    )
    for done, (tokenized, told, said) in enumerate(pairs, first):
        on_step("lines", done, total)
        line = measure_line(tokenized, told, said, session.codec.decode)
        kept.write(line)
        aggregate.add(tokenized, line)
    on_step("lines", total, total)
    return aggregate


def _runtime(session: Session, run: Run) -> Runtime:
    vision = None if session.vision is None else session.vision.name
    machine, decoder = f"{processor_name()}, {platform.machine()}", session.decoder
    return Runtime(decoder.name, vision, decoder.activations, run.options.threads, decoder.runs_on, machine)


def _fingerprint(bundle: Bundle) -> str:
    return file_sha256(bundle.path(MANIFEST))


def _build(bundle: Bundle) -> reports.Build:
    manifest = bundle.manifest
    return reports.Build(
        name=bundle.directory.resolve().name,
        fingerprint=_fingerprint(bundle),
        model=manifest.model.model_id,
        source=manifest.source.id,
        source_sha256=manifest.source.sha256,
        target=manifest.target,
        scheme=manifest.recipe.scheme,
        method=manifest.recipe.method,
        rotations=tuple(manifest.recipe.rotations),
        vision_precision=None if manifest.model.vision is None else bundle.vision_graph.precision,
        bits_per_weight=bits_per_weight(manifest),
        bundle_bytes=sum(entry.bytes for entry in manifest.files.values()),
    )


def _baseline(reference: Reference, aggregate: Aggregate) -> reports.Baseline:
    whole = reference.golden is None
    top_k = None if whole else int(aggregate.largest("kept"))
    return reports.Baseline(
        kind=reference.kind,
        name=reference.name,
        computed_by=reference.computed_by,
        top_k=top_k,
        tail_mass_max=aggregate.largest("tail"),
        prompt_tail_mass_max=aggregate.largest("prompt_tail"),
        state_sketch=SKETCH_SIZE,
    )


def _not_taken(session: Session) -> dict[str, str]:
    return {} if session.vision is not None else {"vision_error": "the model has no eyes"}


def _commit() -> str | None:
    """Return the commit of the directory that this is run in, None where it is in no repository."""
    try:
        done: Any = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
