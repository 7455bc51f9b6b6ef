"""`python -m bench.closed_sets BUNDLE`: questions of few possible answers, by the probability of each or by generating one.

On cobra-mini's held-out suite: the answers of a task are the choices for each of its questions. Both ways start from the same
state after the image and alternate in who goes first. A choice's probability is calibrated if, of the answers given with 90 %,
nine of ten are right. Source of the expected calibration error: Guo et al., "On Calibration of Modern Neural Networks" (2017).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import click
import msgspec
import numpy as np

from cobra_edge.bench.machine import Machine, machine
from cobra_edge.bench.results import save_result
from cobra_edge.bench.tables import NO_VALUE, Table, print_result
from cobra_edge.inference.choices import Normalization
from cobra_edge.inference.session import Session, load
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, print_json, progress

NAME = "closed-sets"
MOST_ANSWERS = 16  # of a task, to be a closed set
BINS = 10
SURE = 0.9
Result = TypeVar("Result")


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One task.

    Attributes:
        task: its name.
        choices: how many answers there are.
        lines: questions.
        chosen, chosen_by_length, generated: how many were right, by the probability of whole answers, by its mean over tokens,
            and as generated.
        choose_ms, generate_ms: median time of a question, from the state after the image.
    """

    task: str
    choices: int
    lines: int
    chosen: int
    chosen_by_length: int
    generated: int
    choose_ms: float
    generate_ms: float


class Bin(msgspec.Struct, frozen=True):
    """Questions whose best choice has a probability in [low, high): how many, their mean probability, how many were right."""

    low: float
    high: float
    lines: int
    probability: float
    right: int


class ClosedSetsResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.closed_sets`.

    Attributes:
        model, scheme, decoder: that answered.
        tasks: closed sets of the suite.
        bins: of all their questions, by probability.
        calibration_error: expected: the mean over questions of |probability - share of right ones| of its bin.
        sure, sure_right: questions of a best probability of at least 0.9, and how many of them were right.
        machine: that it was measured on.
    """

    bench: str = "closed_sets"
    model: str
    scheme: str
    decoder: str
    tasks: tuple[Task, ...]
    bins: tuple[Bin, ...]
    calibration_error: float
    sure: int
    sure_right: int
    machine: Machine


def draw_reliability(result: ClosedSetsResult, file: Path) -> None:
    """Draw the share of right answers over the probability of the best choice, by bin, with the number of questions; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.6, 4.2))
    axes.plot([0, 1], [0, 1], color="gray", lw=0.8, ls=":")
    axes.plot([b.probability for b in result.bins], [b.right / b.lines for b in result.bins], "o", color="tab:blue")
    for b in result.bins:
        axes.annotate(f"{b.lines}", (b.probability, b.right / b.lines), (-6, -3), textcoords="offset points", ha="right")
    lowest = min(b.low for b in result.bins)
    axes.set(
        xlim=(lowest - 0.1, 1.03), ylim=(-0.05, 1.05), xlabel="probability of the best choice", ylabel="share of right answers"
    )
    axes.set_title(f"{result.model}: expected calibration error {result.calibration_error:.1%}", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


@dataclass(frozen=True)
class Asked:
    """One question: whether each way was right, the probability of the best choice, and seconds."""

    task: str
    chosen: bool
    chosen_by_length: bool
    generated: bool
    probability: float
    choose_seconds: float
    generate_seconds: float


@click.command(cls=Command, epilog="Example: python -m bench.closed_sets bundles/demo")
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--lines", group="input", type=click.IntRange(1), default=None, help="Questions per task at most.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def closed_sets(bundle: Path, lines: int | None, as_json: bool) -> None:
    """Compare choosing with generating on cobra-mini's held-out suite, by BUNDLE, and measure calibration."""
    session = load(bundle)
    answers, suite = closed_tasks(read_suite(HELDOUT), lines)
    asked = []
    with progress() as bar:
        task, states = bar.add_task("questions", total=len(suite)), {}
        for number, line in enumerate(suite):
            if line.image not in states:
                states = {line.image: session.look(HELDOUT.parent / str(line.image))}
            asked.append(ask(session, states[line.image], line, answers[line.task], choose_first=number % 2 == 0))
            bar.advance(task)
    manifest = session.bundle.manifest
    bins, error = reliability([a.probability for a in asked], [a.chosen for a in asked])
    sure = [a for a in asked if a.probability >= SURE]
    result = ClosedSetsResult(
        model=manifest.model.model_id,
        scheme=manifest.recipe.scheme,
        decoder=session.decoder.name,
        tasks=tuple(_task(name, len(found), [a for a in asked if a.task == name]) for name, found in answers.items()),
        bins=bins,
        calibration_error=error,
        sure=len(sure),
        sure_right=sum(a.chosen for a in sure),
        machine=machine(),
    )
    file = save_result(NAME, result)
    if as_json:
        print_json(result)
    else:
        print_result([closed_sets_table(result), reliability_table(result)], file)


def closed_tasks(lines: Sequence[Line], most: int | None) -> tuple[dict[str, list[str]], list[Line]]:
    """Return the answers of each task that has few, sorted, and the lines of these tasks by image, at most `most` of each."""
    answers: dict[str, set[str]] = {}
    for line in lines:
        answers.setdefault(line.task, set()).add(line.answer)
    closed = {task: sorted(found) for task, found in answers.items() if len(found) <= MOST_ANSWERS}
    kept = [line for task in closed for line in [x for x in lines if x.task == task][:most]]
    return closed, sorted(kept, key=lambda line: str(line.image))


def ask(session: Session, state: object, line: Line, answers: Sequence[str], *, choose_first: bool) -> Asked:
    """Ask a question both ways."""

    def chosen(normalization: Normalization) -> Callable[[], tuple[str, float]]:
        def run() -> tuple[str, float]:
            best = session.choose(state, line.prompt, answers, normalization=normalization).best  # type: ignore[arg-type]
            return best.text, best.probability

        return run

    def generated() -> str:
        return session.ask(state, line.prompt).read()  # type: ignore[arg-type]

    if choose_first:
        (best, probability), choose_seconds = _timed(chosen("none"))
        text, generate_seconds = _timed(generated)
    else:
        text, generate_seconds = _timed(generated)
        (best, probability), choose_seconds = _timed(chosen("none"))
    by_length, _ = chosen("length")()
    right = line.answer.strip().lower()
    return Asked(
        line.task,
        best.lower() == right,
        by_length.lower() == right,
        text.strip().lower() == right,
        probability,
        choose_seconds,
        generate_seconds,
    )


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def _task(name: str, choices: int, asked: Sequence[Asked]) -> Task:
    return Task(
        task=name,
        choices=choices,
        lines=len(asked),
        chosen=sum(a.chosen for a in asked),
        chosen_by_length=sum(a.chosen_by_length for a in asked),
        generated=sum(a.generated for a in asked),
        choose_ms=1000 * median(a.choose_seconds for a in asked),
        generate_ms=1000 * median(a.generate_seconds for a in asked),
    )


def reliability(probabilities: Sequence[float], right: Sequence[bool]) -> tuple[tuple[Bin, ...], float]:
    """Return bins of equal width that are not empty, and the expected calibration error."""
    values, hits = np.asarray(probabilities), np.asarray(right)
    index = np.minimum((values * BINS).astype(int), BINS - 1)
    bins = tuple(
        Bin(i / BINS, (i + 1) / BINS, int(own.sum()), float(values[own].mean()), int(hits[own].sum()))
        for i in range(BINS)
        if (own := index == i).any()
    )
    return bins, sum(abs(b.probability * b.lines - b.right) for b in bins) / len(values)


def closed_sets_table(result: ClosedSetsResult) -> Table:
    """Return accuracy and time by task, both ways."""
    m = result.machine
    rows = [
        [
            t.task,
            str(t.choices),
            str(t.lines),
            f"{t.chosen / t.lines:.1%}",
            f"{t.chosen_by_length / t.lines:.1%}",
            f"{t.generated / t.lines:.1%}",
            f"{t.choose_ms:.1f}",
            f"{t.generate_ms:.1f}",
        ]
        for t in result.tasks
    ]
    return Table(
        ("task", "choices", "questions", "right, chosen", "by length", "generated", "choosing, ms", "generating, ms"),
        rows,
        f"{result.model}, {result.scheme}, decoder {result.decoder}, on {m.processor}, {m.cores} cores; commit {m.commit}.",
    )


def reliability_table(result: ClosedSetsResult) -> Table:
    """Return how often the best choice was right, by its probability."""
    rows = [
        [f"{b.low:.1f}–{b.high:.1f}", str(b.lines), f"{b.probability:.1%}", f"{b.right / b.lines:.1%}"] for b in result.bins
    ]
    share = f"{result.sure_right / result.sure:.1%}" if result.sure else NO_VALUE
    return Table(
        ("probability of the best choice", "questions", "mean", "right"),
        rows,
        notes=[
            f"Expected calibration error {result.calibration_error:.1%}. With `--unsure-below {SURE}` "
            f"{result.sure} of {sum(b.lines for b in result.bins)} questions are answered, {share} of them right."
        ],
    )


if __name__ == "__main__":
    main_of(closed_sets)()
