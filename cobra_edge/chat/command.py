"""Chat: talk with a bundle about images.

python -m cobra_edge.chat bundles/cobra-mini-jetson-orin-nano-w4a16-g128 --image scene.png
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import msgspec

from ..decode.sampling import Sampling
from ..errors import InputError
from ..inference.answer_metrics import CUT
from ..inference.session import Answer
from ..inference.session_options import Opening, sampling_options, session_options
from ..terminal.output import debug_option, errors, main_of, plain, print_json_line, tell
from ..terminal.suggestions import near_matches
from .conversation import Conversation, Turn
from .interrupts import Interrupts, Pressed
from .lines import COMMANDS, editing, read_line
from .transcript import write_transcript

_HELP = """\
/image FILE  show another image: a new conversation
/reset       begin anew about the same image
/save FILE   write what was said as JSON
/help        this
/quit        leave, as Ctrl-D does
Anything else is a question; begin it with a space where it begins with a slash."""


@click.command(epilog="Example: python -m cobra_edge.chat BUNDLE --image scene.png")
@click.option("--image", type=click.Path(path_type=Path), help="An image to begin with; /image shows another one.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="The limit of an answer.")
@sampling_options
@session_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a question, on one line, instead of streaming.")
@debug_option
def command(opening: Opening, image: Path | None, max_new_tokens: int, sampling: Sampling, as_json: bool) -> int:
    """Talk with BUNDLE: every line is a question, and questions go on from what was said. /help lists the commands.

    Answers go to stdout, all else to stderr. Lines may come from a pipe; with --json each question is then answered by one
    object, and a line that is refused by {"line", "error"}.

    On a terminal Ctrl-C stops an answer, and the conversation goes on; while a line is written it clears the line, and twice
    in a row it leaves. Ctrl-D leaves too. From a pipe Ctrl-C ends everything.

    Exit codes: 0 left, or the lines were at their end; 2 bad input, or a line from a pipe was refused; 3 this machine lacks
    something; 130 interrupted.
    """
    if sys.stdin is None:
        raise InputError("stdin is closed; give lines from a terminal, a file or a pipe")
    session = opening.load()
    chat = _Chat(Conversation(session, sampling, max_new_tokens), as_json)
    manifest, decoder = session.bundle.manifest, session.decoder
    chat.note(
        f"{manifest.model.model_id} {manifest.recipe.scheme}, decoder {decoder.name} on {decoder.runs_on}; /help for help"
    )
    if image is not None:
        chat.show(image)
    elif session.config.vision is not None:
        chat.note("no image yet; /image FILE shows one")
    with ExitStack() as held:
        held.enter_context(editing())
        if chat.on_terminal:
            held.enter_context(chat.interrupts.heard())
        chat.talk()
    return InputError.exit_code if chat.refused and not chat.on_terminal else 0


class _Chat:
    """Reads lines and does what they say."""

    def __init__(self, conversation: Conversation, as_json: bool) -> None:
        self.conversation, self.as_json = conversation, as_json
        self.interrupts = Interrupts()
        self.on_terminal = sys.stdin.isatty()
        self.refused = False

    def talk(self) -> None:
        """Go on until somebody leaves."""
        presses = 0
        while True:
            line = ""
            try:
                line = read_line("> ")
                presses = 0
                if line.partition(" ")[0].rstrip() == "/quit":
                    return
                self._do(line)
            except EOFError:
                self.note("")  # what a shell writes next begins on a line of its own
                return
            except InputError as error:
                self._refuse(line, str(error))
            except Pressed:
                presses += 1
                if presses > 1:
                    raise
                self.note("\nCtrl-C again leaves")

    def _do(self, line: str) -> None:
        if not line.strip():
            raise InputError("the line is empty; ask something, or write /help")
        if not line.startswith("/"):
            self._answer(line)
            return
        name, _, rest = line.partition(" ")
        file = rest.strip()
        if f"{name} " in COMMANDS and not file:
            raise InputError(
                f"{name} needs the name of a file, for example {name} scene.{'png' if name == '/image' else 'json'}"
            )
        if name == "/image":
            self.show(_path(file))
        elif name == "/save":
            write_transcript(self.conversation, _path(file))
            tell(f"saved: {_path(file)}")
        elif name == "/reset":
            self.conversation.reset()
            image = self.conversation.image
            tell("a new conversation" + ("" if image is None else f" about {image.path}"))
        elif name == "/help":
            tell(_HELP)
        else:
            known = [command.strip() for command in COMMANDS]
            raise InputError(f"unknown command {name!r}{near_matches(name, known)}; begin a question with a space")

    def show(self, file: Path) -> None:
        """Look at an image; raises as `Conversation.show`."""
        began, talked = time.perf_counter(), bool(self.conversation.turns)
        known = self.conversation.show(file)
        how = "remembered" if known else f"looked at in {(time.perf_counter() - began) * 1e3:,.0f} ms"
        tell(f"{'a new conversation about ' if talked else ''}{file}, {how}")

    def _answer(self, question: str) -> None:
        with self.interrupts.answering():
            answer = self.conversation.ask(question)
            self._stream(answer)
            turn = self.conversation.keep(question, answer)
        if self.as_json:
            print_json_line(self._record(turn))
        elif answer.finish == "length" and not (self.on_terminal and errors.is_terminal):
            tell(CUT)  # where nobody sees the figures
        self.note(_figures(turn))

    def _stream(self, answer: Answer) -> None:
        if self.interrupts.stop:
            answer.stop()
        for piece in answer:
            if not self.as_json:
                sys.stdout.write(plain(piece))
                sys.stdout.flush()
            if self.interrupts.stop:
                answer.stop()
        if not self.as_json:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def _record(self, turn: Turn) -> dict[str, Any]:
        image = self.conversation.image
        about = {"image": None if image is None else str(image.path), "remembered": turn.remembered}
        return {"question": turn.question, **msgspec.structs.asdict(turn.answer), **about}

    def _refuse(self, line: str, reason: str) -> None:
        self.refused = True
        if self.conversation.turns and "already read" in reason:
            reason += ", or /reset"
        if self.as_json:
            print_json_line({"line": line, "error": reason})
        else:
            tell(f"error: {reason}", style="red")

    def note(self, text: str) -> None:
        """Print what only a person wants to know."""
        if self.on_terminal and errors.is_terminal:
            tell(text, style="dim")


def _path(written: str) -> Path:
    """Return the path that was written, perhaps in quotes, as terminals write files that are dropped on them."""
    if len(written) > 1 and written[0] == written[-1] and written[0] in "'\"":
        written = written[1:-1]
    return Path(os.path.expanduser(written))


def _figures(turn: Turn) -> str:
    answer, parts = turn.answer, []
    if answer.finish != "end":
        parts.append("stopped" if answer.finish == "stopped" else CUT)
    if answer.tpot_ms:
        parts.append(f"{1e3 / answer.tpot_ms:,.1f} tokens/s")
    if answer.ttft_ms is not None:
        parts.append(f"first after {answer.ttft_ms:,.0f} ms")
    return ", ".join([*parts, f"{turn.remembered} remembered"])


main = main_of(command)

if __name__ == "__main__":
    main()
