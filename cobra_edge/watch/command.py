"""Watch: ask a bundle the same question of every new image.

python -m cobra_edge.watch bundles/cobra-mini-jetson-orin-nano-w4a16-g128 --camera 0 --prompt "Is there a red circle?"
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import click

from ..errors import CobraEdgeError
from ..inference.session_options import Opening, session_options
from ..terminal.output import debug_option, main_of, print_json_line, say, tell
from .answers import FrameAnswer, frame_answers
from .camera import Camera
from .directory import ImageDirectory
from .frames import FrameSource, grabbing
from .reconnect import Reconnecting
from .summary import Aggregate, Spread, Summary
from .unreadable import Unreadable, UnreadableImages

_CUT = " … [cut]"  # behind an answer that did not come to its end
_ROW = "{:<24} {:>7} {:>14} {:>11}  {}"


@click.command(epilog='Example: python -m cobra_edge.watch BUNDLE --camera 0 --prompt "Is there a red circle?" --on-change')
@click.option("--prompt", required=True, help="The question.")
@click.option(
    "--camera",
    help="A device's number, /dev/videoN, the URL of a stream or of a snapshot, a GStreamer pipeline that ends in appsink, "
    "or a video file, which is played at its own rate.",
)
@click.option("--directory", type=click.Path(path_type=Path), help="Images that appear here, or are written anew.")
@click.option("--reconnect", is_flag=True, help="Try again, ever more slowly, when the source goes away or is not there yet.")
@click.option(
    "--poll-seconds",
    type=click.FloatRange(0.05, 86_400),
    default=1.0,
    show_default=True,
    help="Between two requests, where --camera is a URL that answers with one image.",
)
@click.option("--frames", type=click.IntRange(1), help="Stop after that many answers; default: when the source ends.")
@click.option("--on-change", is_flag=True, help="Print an answer only where it differs from the one printed before.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True, help="The limit of an answer.")
@session_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a frame, on one line, and one with the summary.")
@debug_option
def command(
    opening: Opening,
    prompt: str,
    camera: str | None,
    directory: Path | None,
    reconnect: bool,
    poll_seconds: float,
    frames: int | None,
    on_change: bool,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Ask BUNDLE the same question of every new image from a camera or a directory.

    The newest image is asked about, again and again; those that come while the model is busy are dropped and counted. Images
    that cannot be looked at are told once each, and counted.
    Latencies are from a frame's capture to the first token and to the end of its answer. The summary comes however it ends.

    Exit codes: 0 the source ended, or --frames were answered; 2 bad input; 3 the camera or the directory went away, or this
    machine lacks something; 130 interrupted.
    """
    if (camera is None) == (directory is None):
        raise click.UsageError("give either --camera or --directory", click.get_current_context())
    unreadable = UnreadableImages(print_json_line if as_json else _tell_unreadable)
    source: FrameSource
    if camera is not None:
        source = Camera(camera, poll_seconds, must_be_there=not reconnect)
    else:
        source = ImageDirectory(directory or Path(), unreadable)
    if reconnect:
        source = Reconnecting(source)
    session = opening.load()
    session.ask(None, prompt)  # a prompt that cannot be asked is known before the first frame
    aggregate, failure = Aggregate(), None
    try:
        with grabbing(source) as newest:
            answers = frame_answers(session, prompt, newest, max_new_tokens, unreadable)
            _print_answers(islice(answers, frames), aggregate, on_change, as_json)
    except (CobraEdgeError, KeyboardInterrupt) as error:
        failure = error
    summary = aggregate.summary(unreadable.count)
    if as_json:
        print_json_line({"summary": summary})
    else:
        _say_summary(summary)
    if failure is not None:
        raise failure


def _print_answers(answers: Iterable[FrameAnswer], aggregate: Aggregate, on_change: bool, as_json: bool) -> None:
    if not as_json:
        say(_ROW.format("frame", "dropped", "first token ms", "answer ms", "answer"))
    printed: str | None = None
    for answer in answers:
        aggregate.add(answer)
        if on_change and answer.answer == printed:
            continue
        printed = answer.answer
        if as_json:
            print_json_line(answer)
        else:
            first = "–" if answer.first_token_ms is None else f"{answer.first_token_ms:,.1f}"
            frame = f"{answer.frame}" + ("" if answer.name is None else f" {answer.name}")
            text = " ".join(answer.answer.split()) + ("" if answer.finish == "end" else _CUT)
            say(_ROW.format(frame, answer.dropped, first, f"{answer.answer_ms:,.1f}", text))


def _tell_unreadable(image: Unreadable) -> None:
    frame = "" if image.frame is None else f"frame {image.frame}: "
    tell(f"{frame}{image.error}", style="red")


def _say_summary(summary: Summary) -> None:
    say(f"{summary.answered:,} frames answered, {summary.dropped:,} dropped, {summary.unreadable:,} images unreadable")
    if summary.answer_ms is not None:
        say(
            f"from capture to first token: {_spread(summary.first_token_ms)}; to the answer's end: {_spread(summary.answer_ms)}"
        )
    if summary.resident_bytes_start is not None and summary.resident_bytes_end is not None:
        start, end = summary.resident_bytes_start / 2**20, summary.resident_bytes_end / 2**20
        say(f"resident memory: {start:,.1f} MiB after the first answer, {end:,.1f} MiB at the end")


def _spread(spread: Spread | None) -> str:
    return "no token" if spread is None else f"median {spread.median:,.1f} ms, 95th percentile {spread.p95:,.1f} ms"


main = main_of(command)

if __name__ == "__main__":
    main()
