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
from .inference.answer_metrics import CUT, AnswerMetrics
from .inference.session_options import Opening, sampling_options, session_options
from .inputs.image import load_image
from .terminal.option_groups import Command, option
from .terminal.output import debug_option, main_of, plain, print_json, tell


@click.command(cls=Command, epilog='Example: cobra-edge run BUNDLE --image scene.png --prompt "What is in the image?"')
@option("--image", group="input", type=click.Path(path_type=Path), help="Image file. A text-only model takes none.")
@option("--prompt", group="input", required=True, help="Question.")
@option("--max-new-tokens", group="generation", type=click.IntRange(1), default=256, help="Maximum length of the answer.")
@sampling_options
@session_options
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of streaming the answer.")
@debug_option
def command(opening: Opening, image: Path | None, prompt: str, max_new_tokens: int, sampling: Sampling, as_json: bool) -> None:
    """Ask BUNDLE a question about an image, and stream the answer.

    The answer goes to stdout; a missing image and a cut answer are reported on stderr.
    """
    with ThreadPoolExecutor(1) as reader:  # the image is decoded while the model opens
        decoded = None if image is None else reader.submit(load_image, image)
        session = opening.load()
    if decoded is None and session.config.vision is not None:
        tell("no image given (--image): the answer is not about an image", style="yellow")
    seen = image if decoded is None or session.config.vision is None else decoded.result()
    answer = session.ask(seen, prompt, max_new_tokens=max_new_tokens, sampling=sampling)
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
    print_json({
        **msgspec.structs.asdict(AnswerMetrics.of(answer)),
        "image": None if image is None else str(image),
        "decoder": session.decoder.name,
        "device": session.decoder.runs_on,
        "vision": None if session.vision is None else session.vision.name,
    })  # fmt: skip


main = main_of(command)

if __name__ == "__main__":
    main()
