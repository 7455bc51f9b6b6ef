"""Run: ask a bundle one question.

python -m cobra_edge.run bundles/cobra-mini-jetson-orin-nano-best --image scene.png --prompt "Is there a red circle?"
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import msgspec

from .decode.sampling import Sampling
from .errors import InputError
from .files.parsing import without_mark
from .inference import forms
from .inference.answer_metrics import CUT, AnswerMetrics
from .inference.choices import NORMALIZATIONS, Choices, Normalization
from .inference.forms import Form
from .inference.session_options import Opening, sampling_options, session_options
from .inputs.image import load_image
from .terminal.option_groups import Command, option
from .terminal.output import debug_option, main_of, plain, print_json, tell

UNSURE = "unsure"
SCORE_HELP = "How choices are compared: by the probability of the whole answer, or by its mean over tokens (length)."


@click.command(cls=Command, epilog='Example: cobra-edge run BUNDLE --image scene.png --prompt "What is in the image?"')
@option("--image", group="input", type=click.Path(path_type=Path), help="Image file. A text-only model takes none.")
@option("--prompt", group="input", required=True, help="Question.")
@option("--max-new-tokens", group="generation", type=click.IntRange(1), default=256, help="Maximum length of the answer.")
@option(
    "--choices", group="generation", help='Closed question: answers to choose from, such as "Yes,No"; nothing is generated.'
)
@option(
    "--json-schema",
    group="generation",
    type=click.Path(path_type=Path),
    help="File with a JSON schema: the answer is JSON that fits it.",
)
@option("--regex", "pattern", group="generation", help="Regular expression that the whole answer matches.")
@option("--choice-score", group="generation", type=click.Choice(NORMALIZATIONS), default="none", help=SCORE_HELP)
@option("--unsure-below", group="generation", type=click.FloatRange(0, 1), help='Answer "unsure" if no choice is as probable.')
@sampling_options
@session_options
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of streaming the answer.")
@debug_option
def command(
    opening: Opening,
    image: Path | None,
    prompt: str,
    max_new_tokens: int,
    choices: str | None,
    json_schema: Path | None,
    pattern: str | None,
    choice_score: Normalization,
    unsure_below: float | None,
    sampling: Sampling,
    as_json: bool,
) -> None:
    """Ask BUNDLE a question about an image, and stream the answer.

    The answer goes to stdout; a missing image, a cut answer and the probabilities of choices are reported on stderr.
    """
    if unsure_below is not None and choices is None:
        raise InputError("--unsure-below is about --choices; give the answers to choose from")
    form = _form(json_schema, pattern, choices)
    with ThreadPoolExecutor(1) as reader:  # the image is decoded while the model opens
        decoded = None if image is None else reader.submit(load_image, image)
        session = opening.load()
    if decoded is None and session.config.vision is not None:
        tell("no image given (--image): the answer is not about an image", style="yellow")
    seen = image if decoded is None or session.config.vision is None else decoded.result()
    about = {
        "image": None if image is None else str(image),
        "decoder": session.decoder.name,
        "device": session.decoder.runs_on,
        "vision": None if session.vision is None else session.vision.name,
    }
    if choices is not None:
        found = session.choose(seen, prompt, [text.strip() for text in choices.split(",")], normalization=choice_score)
        _print_choices(found, unsure_below, about if as_json else None)
        return
    answer = session.ask(seen, prompt, max_new_tokens=max_new_tokens, sampling=sampling, form=form)
    for piece in answer:
        if not as_json:
            sys.stdout.write(plain(piece))
            sys.stdout.flush()
    if not as_json:
        sys.stdout.write("\n")
        sys.stdout.flush()
        if answer.finish == "length":
            tell(f"{CUT}; raise it with --max-new-tokens")
        return
    print_json({**msgspec.structs.asdict(AnswerMetrics.of(answer)), **about})


def _form(json_schema: Path | None, pattern: str | None, choices: str | None) -> Form | None:
    """Return the form of the answer, before a model is opened; None for free text and for choices, which are not generated."""
    given = {"--json-schema": json_schema, "--regex": pattern, "--choices": choices}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"{' and '.join(names)}: an answer has one form; give one of them")
    if json_schema is not None:
        try:
            text = json_schema.read_bytes()
        except OSError as error:
            raise InputError(f"{json_schema}: cannot be read ({error}); expected a JSON schema") from error
        return forms.json_schema(without_mark(text), f"{json_schema}")
    return None if pattern is None else forms.regex(pattern)


def _print_choices(found: Choices, unsure_below: float | None, about: dict[str, str | None] | None) -> None:
    """Print the chosen answer, or as JSON with the probability of each if there is something to tell about the session."""
    chosen = found.best if unsure_below is None else found.sure(unsure_below)
    if about is not None:
        print_json({"text": None if chosen is None else chosen.text, **msgspec.structs.asdict(found), **about})
        return
    ranked = sorted(found.choices, key=lambda choice: -choice.probability)
    tell(", ".join(f"{choice.text} {choice.probability:.2%}" for choice in ranked))
    sys.stdout.write(f"{UNSURE if chosen is None else plain(chosen.text)}\n")


main = main_of(command)

if __name__ == "__main__":
    main()
