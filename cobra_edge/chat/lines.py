"""The lines of a conversation: edited on a terminal, with a history and completion, or read from a pipe."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from ..errors import InputError

try:
    import readline
except ImportError:  # a Python that was built without it: lines without editing
    readline = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

COMMANDS = ("/image ", "/reset", "/save ", "/help", "/quit")  # those with a space want a file
_LINE_LIMIT = 1 << 20  # characters; no model takes as many
_HISTORY_LINES = 1000


def read_line(prompt: str) -> str:
    """Return the next line, without its end; the prompt is shown on a terminal, on stderr where stdout is none.

    Raises:
        EOFError: there are no more.
        InputError: it is longer than any question; it has been read to its end.
    """
    if sys.stdin.isatty():
        if sys.stdout.isatty():
            return input(prompt)  # readline writes the prompt, and writes it anew while the line is edited
        sys.stderr.write(prompt)
        sys.stderr.flush()
    line = sys.stdin.readline(_LINE_LIMIT)
    if not line:
        raise EOFError
    if len(line) == _LINE_LIMIT and not line.endswith("\n"):
        while (rest := sys.stdin.readline(_LINE_LIMIT)) and not rest.endswith("\n"):
            pass
        raise InputError(f"a line of more than {_LINE_LIMIT:,} characters; shorten it")
    return line.removesuffix("\n").removesuffix("\r")


@contextmanager
def editing() -> Iterator[None]:
    """Edit lines on a terminal: arrows, completion with the tabulator, and what was written in earlier conversations.

    The history is a file that only the user may read; where it cannot be read or written there is none.
    """
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr] # bytes that are no text shall not end a conversation
    if readline is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield
        return
    history = platformdirs.user_state_path("cobra_edge") / "chat-history"
    readline.set_completer_delims(" ")
    readline.set_completer(_complete)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    readline.set_history_length(_HISTORY_LINES)
    try:
        readline.read_history_file(history)
    except (OSError, UnicodeDecodeError) as error:
        log.info("no history: %s", error)
    try:
        yield
    finally:
        _keep_history(history)


def _keep_history(file: Path) -> None:
    if not file.is_absolute():  # a user without a home: "~" would become a directory here
        return
    mask = os.umask(0o077)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(file)
        file.chmod(0o600)  # it may have been there with other rights
    except OSError as error:
        log.info("the history is not kept: %s", error)
    finally:
        os.umask(mask)


def _complete(_word: str, index: int) -> str | None:
    """See readline.set_completer."""
    found = completions(readline.get_line_buffer()[: readline.get_endidx()], readline.get_begidx())
    return found[index] if index < len(found) else None


def completions(line: str, begin: int) -> list[str]:
    """Return what the last word of a line may become: a command, or a file's name after one that wants a file.

    Args:
        line: up to the cursor.
        begin: where its last word begins; a file's name may have spaces, so it may begin before.
    """
    if begin == 0:
        return [c for c in COMMANDS if c.startswith(line)] if line.startswith("/") else []
    for command in COMMANDS:
        if command.endswith(" ") and line.startswith(command):
            return [name[begin - len(command) :] for name in _files(line[len(command) :])]
    return []


def _files(typed: str) -> list[str]:
    """Return the paths that begin as typed, directories with a slash; hidden ones only where the dot was typed."""
    folder, start = os.path.split(typed)
    shown = typed[: len(typed) - len(start)]
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            found = [e.name + "/" if e.is_dir() else e.name for e in entries if e.name.startswith(start)]
    except OSError:
        return []
    return sorted(shown + name for name in found if start.startswith(".") or not name.startswith("."))
