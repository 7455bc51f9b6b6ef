"""The lines of an export: those to calibrate on, and the golden lines that drift is measured on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import InputError
from ..formats.model_config import CobraConfig
from ..inputs.text import PromptTemplate, TextCodec
from ..regress.budget import Limits
from ..suite.calibration_lines import read_calibration
from ..suite.drawn_set import drawn_set
from ..suite.folder import MOST_IMAGES
from ..suite.line_set import FEWEST_TO_DIVIDE, LineSet
from ..suite.reader import FEWEST_IMAGES, spread
from ..suite.tokenized import TokenizedSuite, tokenized_suite
from ..terminal.output import tell

MOST_VISUAL_POSITIONS = 1 << 15  # of calibration that gradients are collected on
# Of statistics alone, if the float model answers them: more than four for each dimension of the widest second moment of a 3.5B
# model, which is what `calibrate` recommends.
MOST_STATISTICS_POSITIONS = 24 << 10
_EMBEDDED_PIXELS = 112  # width and height of the images of the embedded sets
_GOLDEN_LINES = 1000  # at most, of a small model
# (images, lines) of a large model, whose float reference takes most of a minute for each image: quantiles can be judged, or,
# where the export itself takes but minutes, means (`regress.aggregate.IMAGES_NEEDED`).
_LARGE_MODEL, _IN_MINUTES = (16, 64), (8, 16)


def calibration_and_golden(
    calibration: Path | None, golden: Path | None, *, needs_images: bool, skip_bad: bool
) -> tuple[LineSet | None, LineSet | None]:
    """Return a user's lines to calibrate on, and those that golden lines are chosen from; answers may be missing.

    Args:
        calibration: folder of images, or suite; None for the embedded set, for which None is returned.
        golden: suite; None for held-out images of `calibration`, for which None is returned where that has too few.
        needs_images: refuse a calibration set without images, which int8 vision was asked to be calibrated on.
        skip_bad: leave out what cannot be read of `calibration`.

    Raises:
        InputError: as `read_calibration` and `read_suite`, or no images.
    """
    given_golden = None if golden is None else LineSet.of_suite(golden)
    if calibration is None:
        return None, given_golden
    given = read_calibration(calibration, skip_bad=skip_bad)
    if needs_images and not given.images():
        raise InputError(f"{calibration}: int8 vision is calibrated on images, the suite has none; give one that has")
    if given_golden is not None:
        return given, given_golden
    kept, held_out = given.divided()
    if held_out.lines:
        counts = f"{len(held_out.images())} of {len(given.images())} images"
        tell(f"{calibration}: {counts} are held out of calibration, drift is measured on them; --golden measures it elsewhere")
        return kept, held_out
    tell(
        f"{calibration}: fewer than {FEWEST_TO_DIVIDE} different images, so none is held out and drift is measured on others; "
        "add images, or give --golden",
        "yellow",
    )
    return given, None


def drawn_lines(config: CobraConfig, *, quiet: bool = False) -> LineSet | None:
    """Return lines about drawn images, without answers, for a user who gives none; a part of them is to be held out.

    None for a model that takes no larger images than the embedded sets hold, or none at all: it uses those.
    """
    if config.vision is None or config.vision.image_size <= _EMBEDDED_PIXELS:
        return None
    to_read = min(MOST_IMAGES, MOST_VISUAL_POSITIONS // config.n_visual_tokens)
    found = drawn_set(max(to_read * 5 // 4, 5 * _LARGE_MODEL[0]))  # one in five is held out
    if not quiet:
        images = len(found.images())
        tell(f"no calibration data given: {images} drawn images, answered by the float model; a folder of your own is better")
    return found


def golden_lines(lines: LineSet, wanted: int | None, config: CobraConfig, *, in_minutes: bool = False) -> LineSet:
    """Return golden lines, spread over tasks and ordered by image.

    Args:
        lines: to choose from.
        wanted: how many at most; None for 1000, of a large model 64 about 16 images.
        config: of the model.
        in_minutes: whether the export takes but minutes otherwise: then 16 about 8 images of a large model, by default.
    """
    most = _GOLDEN_LINES
    if config.mamba.is_large and wanted is None:
        most_images, most = _IN_MINUTES if in_minutes else _LARGE_MODEL
        lines = lines.about(most_images)
    chosen = spread(list(lines.lines), wanted or most)
    return replace(lines, lines=sorted(chosen, key=lambda line: line.image or ""))


def require_judgeable(golden: LineSet, limits: Limits, config: CobraConfig) -> None:
    """Raise InputError for golden lines about too few images for a limit of the budget, or for any."""
    from ..regress.aggregate import IMAGES_NEEDED, kind_of

    def images(task: str) -> int:
        lines = [line for line in golden.lines if task in ("", line.task)]
        return len({line.image or number for number, line in enumerate(lines)} if config.vision is not None else lines)

    # The largest KLD is that of these lines, and has no interval.
    needed = {name: IMAGES_NEEDED[kind_of(name)] for name in limits if name != "kld_max"}
    short = {name: images(name.partition(".")[2] if name.startswith("accuracy") else "") for name in needed}
    named = [f"{name} needs {needed[name]}" for name, found in short.items() if found < needed[name]]
    if images("") < FEWEST_IMAGES:
        named = [f"an interval needs {FEWEST_IMAGES}"]
    if named:
        raise InputError(
            f"{golden.name}: {len(golden.lines)} golden lines about {images('')} images, too few to judge drift by the budget: "
            f"{', '.join(named)}; give more --golden-lines, a larger set, or a --budget without these limits"
        )


def affordable(lines: LineSet, config: CobraConfig, *, gradients: bool, quiet: bool = False) -> LineSet:
    """Return calibration lines about as many images as there is time for: all but for gradients or answers of the float model.

    Time is in proportion to positions. Of cobra-mini that is 200 images, of a model that takes 729 positions for each 44 for
    gradients and 33 for statistics.

    Args:
        lines: to calibrate on.
        config: of the model.
        gradients: whether gradients are collected on them.
        quiet: does not say which are left out.
    """
    if config.vision is None or (not gradients and all(line.answer for line in lines.lines)):
        return lines
    most = MOST_VISUAL_POSITIONS if gradients else MOST_STATISTICS_POSITIONS
    found = lines.about(max(1, most // config.n_visual_tokens))
    if found is not lines and not quiet:
        counts = f"{len(found.images())} of {len(lines.images())} images"
        tell(f"{lines.name}: {counts} are used, of {config.n_visual_tokens} visual tokens each; time grows with them")
    return found


def check_answerable(lines: LineSet, config: CobraConfig) -> None:
    """Raise InputError for lines about images, without answers, for a text-only model."""
    if config.vision is None and any(line.image is not None and not line.answer for line in lines.lines):
        raise InputError(
            f"{lines.name}: questions about images without answers, and {config.model_id} is a text-only model that cannot "
            "answer them; give lines without images, or with answers"
        )


def tokenized_lines(lines: LineSet, codec: TextCodec, config: CobraConfig, *, answered: bool = True) -> TokenizedSuite:
    """Return lines tokenized for a model; unless `answered`, answers may be missing. Raises InputError as `tokenized_suite`."""
    template, sees, numbered = PromptTemplate(config.prompt_style), config.vision is not None, list(enumerate(lines.lines, 1))
    load = lines.directory.joinpath
    return tokenized_suite(lines.name, numbered, load, codec, template, sees=sees, skipped={}, answered=answered)
