"""Which questions a run asks: the bundle's golden lines, the embedded held-out suite, or a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..bundle.reader import Bundle
from ..errors import InputError
from ..inputs.image import load_image
from ..suite.reader import HELDOUT, BadLine, numbered_lines
from ..suite.tokenized import TokenizedSuite, tokenized_suite
from .golden import Golden


def select_suite(
    bundle: Bundle,
    golden: Golden | None,
    file: Path | None,
    wanted: int | None = None,
    *,
    skip_bad: bool = False,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> TokenizedSuite:
    """Return what is asked.

    Args:
        bundle: whose tokenizer and template.
        golden: the golden lines where they are the baseline: without a file they are the suite.
        file: JSON lines; None for the golden lines, or without those the embedded held-out suite.
        wanted: at most so many lines, spread evenly over the tasks; None for all.
        skip_bad: leave out lines that are not what they should be, and count them.
        on_image: told how many images were looked through, and of how many.

    Raises:
        InputError: unreadable, empty, a bad line or an image that cannot be decoded, its number named.
    """
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
        suite = _readable(suite, skip_bad, on_image)
    return suite if wanted is None or wanted >= len(suite.lines) else suite.part(wanted)


def _readable(suite: TokenizedSuite, skip_bad: bool, on_image: Callable[[int, int], None]) -> TokenizedSuite:
    """Return the suite without lines whose images cannot be decoded: known before anything is measured."""
    flaws = dict[int, str]()
    for index in range(len(suite.images)):
        on_image(index, len(suite.images))
        try:
            load_image(suite.load(index))
        except InputError as error:
            flaws[index] = str(error)
    lost = {tokenized.number: flaws[tokenized.image] for tokenized in suite.lines if tokenized.image in flaws}
    if lost and not skip_bad:
        number, reason = next(iter(lost.items()))
        raise InputError(f"{suite.name}, line {number}: {reason}; mend it, or leave such lines out with --skip-bad")
    left = [tokenized for tokenized in suite.lines if tokenized.number not in lost]
    if not left:
        raise InputError(f"{suite.name}: no line is left; every one was skipped")
    return replace(suite, lines=left, skipped=suite.skipped | lost)
