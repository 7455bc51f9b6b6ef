"""Selection of the suite of a run: the golden lines of the bundle, the embedded held-out suite, or a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ..bundle.reader import Bundle
from ..errors import InputError
from ..inference.choices import tokenized_choices
from ..inputs.image import load_image
from ..suite.reader import FEWEST_IMAGES, HELDOUT, BadLine, numbered_lines
from ..suite.scoring import METRICS
from ..suite.tokenized import TokenizedSuite, tokenized_suite
from .golden import Golden

Scoring = Literal["reply", "choices"]  # what is scored: the generated reply, or the most probable of a metric's answers
SCORINGS: tuple[Scoring, ...] = ("reply", "choices")


def select_suite(
    bundle: Bundle,
    golden: Golden | None,
    file: Path | None,
    wanted: int | None = None,
    *,
    skip_bad: bool = False,
    scoring: Scoring = "reply",
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> TokenizedSuite:
    """Return the suite of a run, tokenized.

    Args:
        bundle: with tokenizer and template.
        golden: the golden lines if they are the baseline; they are the suite if no file is given.
        file: JSON lines; None for the golden lines, or the embedded held-out suite if these are not the baseline.
        wanted: maximum number of lines, spread evenly over the tasks; None for all.
        skip_bad: skip invalid lines, and record the reasons.
        scoring: see `Scoring`.
        on_image: called with the number of images checked, and their total.

    Raises:
        InputError: unreadable, empty, or an invalid line or image; the message names the line number. Scoring by choices, with
            the golden lines as baseline, or a line whose metric has none.
    """
    if scoring == "choices" and golden is not None:
        raise InputError(
            "--scoring choices: the golden lines hold generated replies and not the probabilities of choices; give --baseline "
            "with the checkpoint or an fp16 bundle"
        )
    if file is None and golden is not None:
        suite = golden.suite
    else:
        bad: list[BadLine] = []
        numbered = numbered_lines(file or HELDOUT, bad=bad if skip_bad else None)
        skipped = {line.number: line.reason for line in bad}
        codec, template = bundle.text()
        directory, sees = (file or HELDOUT).parent, bundle.manifest.model.vision is not None
        suite = tokenized_suite(
            (file or HELDOUT).name, numbered, directory.joinpath, codec, template, sees=sees, skipped=skipped
        )
        suite = _without_unreadable(suite, skip_bad, on_image)
    suite = suite if wanted is None or wanted >= len(suite.lines) else suite.part(wanted)
    return suite if scoring == "reply" else _with_choices(suite, bundle)


def _with_choices(suite: TokenizedSuite, bundle: Bundle) -> TokenizedSuite:
    """Return the suite with the answers that each line's metric knows. Raises InputError for a metric of open answers."""
    codec, _ = bundle.text()
    tokenized = {m.name: tokenized_choices(m.choices, codec) for m in METRICS.values() if m.choices}
    for line in suite.lines:
        if line.line.metric not in tokenized:
            raise InputError(
                f"{suite.name}, line {line.number}: answers of metric {line.line.metric} are open; --scoring choices takes "
                f"lines of {' and '.join(sorted(tokenized))}"
            )
    lines = [replace(line, choices=tuple(map(tuple, tokenized[line.line.metric]))) for line in suite.lines]
    return replace(suite, lines=lines)


def require_images(suite: TokenizedSuite) -> None:
    """Raise InputError for a suite of fewer than two images, of which no interval can be made; each line without one counts."""
    images = {line.number if line.image is None else ("image", line.image) for line in suite.lines}
    if len(images) < FEWEST_IMAGES:
        raise InputError(
            f"{suite.name}: {len(suite.lines)} lines about one image; lines about one image fail together, so a verdict needs "
            "two images or more: give a larger suite, or export with more --golden-lines"
        )


def _without_unreadable(suite: TokenizedSuite, skip_bad: bool, on_image: Callable[[int, int], None]) -> TokenizedSuite:
    """Return the suite without lines whose images cannot be decoded; checked before anything is measured."""
    errors = dict[int, str]()
    for index in range(len(suite.images)):
        on_image(index, len(suite.images))
        try:
            load_image(suite.load(index))
        except InputError as error:
            errors[index] = str(error)
    skipped = {tokenized.number: errors[tokenized.image] for tokenized in suite.lines if tokenized.image in errors}
    if skipped and not skip_bad:
        number, reason = next(iter(skipped.items()))
        raise InputError(f"{suite.name}, line {number}: {reason}; fix it, or skip such lines with --skip-bad")
    left = [tokenized for tokenized in suite.lines if tokenized.number not in skipped]
    if not left:
        raise InputError(f"{suite.name}: all lines were skipped; fix at least one")
    return replace(suite, lines=left, skipped=suite.skipped | skipped)
