"""Watch: ask a bundle the same question about every new image.

python -m cobra_edge.watch bundles/cobra-mini-jetson-orin-nano-best --camera 0 --prompt "Is there a red circle?"
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import click

from ..errors import CobraEdgeError
from ..frames.camera import Camera
from ..frames.directory import ImageDirectory
from ..frames.reconnect import Reconnecting
from ..frames.source import FrameSource, grab_frames
from ..frames.unreadable import Unreadable, UnreadableImages
from ..inference.session_options import Opening, session_options
from ..terminal.option_groups import Command, option
from ..terminal.output import debug_option, main_of, print_json_line, say, tell
from .answers import FrameAnswer, frame_answers
from .summary import Aggregate, Spread, Summary

_CUT = " … [cut]"  # after an answer that reached its limit
_ROW = "{:<24} {:>7} {:>14} {:>11}  {}"


@click.command(cls=Command, epilog='Example: cobra-edge watch BUNDLE --camera 0 --prompt "Is there a red circle?" --on-change')
@option(
    "--camera",
    group="input",
    help="Device number, /dev/videoN, URL of a stream or snapshot, GStreamer pipeline that ends in appsink, or video file "
    "(played at its own frame rate).",
)
@option("--directory", group="input", type=click.Path(path_type=Path), help="Directory to watch for new and rewritten images.")
@option("--prompt", group="input", required=True, help="Question about each image.")
@option(
    "--frames", group="input", type=click.IntRange(1), help="Stop after so many answers. Default: at the end of the source."
)
@option("--reconnect", group="input", is_flag=True, help="Retry with backoff while the source is unavailable.")
@option(
    "--poll-seconds",
    group="advanced",
    type=click.FloatRange(0.05, 86_400),
    default=1.0,
    help="Interval of requests to a snapshot URL, in seconds.",
)
@option("--max-new-tokens", group="generation", type=click.IntRange(1), default=32, help="Maximum length of an answer.")
@option("--on-change", group="output", is_flag=True, help="Print an answer only where it differs from the previous one.")
@session_options
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object per answer, and the summary, as lines.")
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
    """Ask BUNDLE the same question about every new image of a camera or a directory.

    Each answer is about the newest image; images that arrive meanwhile are dropped and counted. An unreadable image is reported
    once. Latencies are from the capture of a frame to the first token and to the end of the answer. A summary is always printed
    at the end.

    Exit codes: 0 the source ended, or --frames were answered; 2 bad input; 3 the source was lost, or this machine lacks
    something; 130 interrupted.
    """
    if (camera is None) == (directory is None):
        raise click.UsageError("give either --camera or --directory", click.get_current_context())
    unreadable = UnreadableImages(print_json_line if as_json else _report_unreadable)
    source: FrameSource
    if camera is not None:
        source = Camera(camera, poll_seconds, must_be_there=not reconnect)
    else:
        source = ImageDirectory(directory or Path(), unreadable)
    if reconnect:
        source = Reconnecting(source)
    session = opening.load()
    session.ask(None, prompt)  # validates the prompt before the first frame
    aggregate, failure = Aggregate(), None
    try:
        with grab_frames(source) as newest:
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


def _report_unreadable(image: Unreadable) -> None:
    frame = "" if image.frame is None else f"frame {image.frame}: "
    tell(f"{frame}{image.error}", style="red")


def _say_summary(summary: Summary) -> None:
    say(f"{summary.answered:,} frames answered, {summary.dropped:,} dropped, {summary.unreadable:,} images unreadable")
    if summary.answer_ms is not None:
        say(
            f"from capture to first token: {_spread(summary.first_token_ms)}; to the end of the answer: "
            f"{_spread(summary.answer_ms)}"
        )
    if summary.resident_bytes_start is not None and summary.resident_bytes_end is not None:
        start, end = summary.resident_bytes_start / 2**20, summary.resident_bytes_end / 2**20
        say(f"resident memory: {start:,.1f} MiB after the first answer, {end:,.1f} MiB at the end")


def _spread(spread: Spread | None) -> str:
    return "no token" if spread is None else f"median {spread.median:,.1f} ms, 95th percentile {spread.p95:,.1f} ms"


main = main_of(command)

if __name__ == "__main__":
    main()
