"""Chat with a bundle about images.

python -m cobra_edge.chat bundles/cobra-mini-jetson-orin-nano-best --image scene.png
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
from ..terminal.option_groups import Command, option
from ..terminal.output import debug_option, errors, main_of, plain, print_json_line, tell
from ..terminal.suggestions import near_matches
from .conversation import Conversation, Turn
from .interrupts import Interrupts, Pressed
from .lines import COMMANDS, editing, read_line
from .transcript import write_transcript

_HELP = """\
/image FILE  begin a new conversation about another image
/reset       begin a new conversation about the same image
/save FILE   write the conversation as JSON
/help        print this help
/quit        exit, like Ctrl-D
Any other line is a question. Put a space before a question that begins with a slash."""


@click.command(cls=Command, epilog="Example: cobra-edge chat BUNDLE --image scene.png")
@option("--image", group="input", type=click.Path(path_type=Path), help="First image; change it with /image.")
@option("--max-new-tokens", group="generation", type=click.IntRange(1), default=256, help="Maximum length of an answer.")
@sampling_options
@session_options
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object per question, on one line.")
@debug_option
def command(opening: Opening, image: Path | None, max_new_tokens: int, sampling: Sampling, as_json: bool) -> int:
    """Chat with BUNDLE: each line is a question in the same conversation. /help lists the commands.

    Answers go to stdout, everything else to stderr. Lines may come from a pipe. With --json each question yields one object,
    and an invalid line {"line", "error"}.

    On a terminal Ctrl-C stops the answer or clears the line; twice in a row, like Ctrl-D, it exits. With a pipe it ends the
    command.

    Exit codes: 0 end of input or exit; 2 bad input, or an invalid line from a pipe; 3 this machine lacks something; 130
    interrupted.
    """
    if sys.stdin is None:
        raise InputError("stdin is closed; use a terminal, a file or a pipe")
    session = opening.load()
    chat = _Chat(Conversation(session, sampling, max_new_tokens), as_json)
    manifest, decoder = session.bundle.manifest, session.decoder
    chat.note(
        f"{manifest.model.model_id} {manifest.recipe.scheme}, decoder {decoder.name} on {decoder.runs_on}; /help for help"
    )
    if image is not None:
        chat.show(image)
    elif session.config.vision is not None:
        chat.note("no image; choose one with /image FILE")
    with ExitStack() as stack:
        stack.enter_context(editing())
        if chat.on_terminal:
            stack.enter_context(chat.interrupts.handle_sigint())
        chat.run()
    return InputError.exit_code if chat.had_error and not chat.on_terminal else 0


class _Chat:
    """The loop: reads lines, runs commands, asks questions."""

    def __init__(self, conversation: Conversation, as_json: bool) -> None:
        self.conversation, self.as_json = conversation, as_json
        self.interrupts = Interrupts()
        self.on_terminal = sys.stdin.isatty()
        self.had_error = False

    def run(self) -> None:
        """Run until the user exits or the input ends."""
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
                self.note("")  # the shell's prompt begins on a new line
                return
            except InputError as error:
                self._report_error(line, str(error))
            except Pressed:
                presses += 1
                if presses > 1:
                    raise
                self.note("\npress Ctrl-C again to exit")

    def _do(self, line: str) -> None:
        if not line.strip():
            raise InputError("the line is empty; type a question or /help")
        if not line.startswith("/"):
            self._answer(line)
            return
        name, _, rest = line.partition(" ")
        file = rest.strip()
        if f"{name} " in COMMANDS and not file:
            raise InputError(f"{name} needs a file, for example {name} scene.{'png' if name == '/image' else 'json'}")
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
            raise InputError(f"unknown command {name!r}{near_matches(name, known)}; put a space before a question")

    def show(self, file: Path) -> None:
        """Change the image; raises as `Conversation.show`."""
        began, had_turns = time.perf_counter(), bool(self.conversation.turns)
        known = self.conversation.show(file)
        how = "cached" if known else f"encoded in {(time.perf_counter() - began) * 1e3:,.0f} ms"
        tell(f"{'a new conversation about ' if had_turns else ''}{file}, {how}")

    def _answer(self, question: str) -> None:
        with self.interrupts.answering():
            answer = self.conversation.ask(question)
            self._stream(answer)
            turn = self.conversation.keep(question, answer)
        if self.as_json:
            print_json_line(self._record(turn))
        elif answer.finish == "length" and not (self.on_terminal and errors.is_terminal):
            tell(CUT)  # where the metrics are not shown
        self.note(_metrics_line(turn))

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

    def _report_error(self, line: str, reason: str) -> None:
        self.had_error = True
        if self.conversation.turns and "already read" in reason:
            reason += ", or /reset"
        if self.as_json:
            print_json_line({"line": line, "error": reason})
        else:
            tell(f"error: {reason}", style="red")

    def note(self, text: str) -> None:
        """Print a note on a terminal only."""
        if self.on_terminal and errors.is_terminal:
            tell(text, style="dim")


def _path(typed: str) -> Path:
    """Return the typed path without quotes, which terminals add to files dropped on them."""
    if len(typed) > 1 and typed[0] == typed[-1] and typed[0] in "'\"":
        typed = typed[1:-1]
    return Path(os.path.expanduser(typed))


def _metrics_line(turn: Turn) -> str:
    answer, parts = turn.answer, []
    if answer.finish != "end":
        parts.append("stopped" if answer.finish == "stopped" else CUT)
    if answer.tpot_ms:
        parts.append(f"{1e3 / answer.tpot_ms:,.1f} tokens/s")
    if answer.ttft_ms is not None:
        parts.append(f"first token after {answer.ttft_ms:,.0f} ms")
    return ", ".join([*parts, f"cached: {turn.remembered}"])


main = main_of(command)

if __name__ == "__main__":
    main()
