"""Input lines of a chat: edited on a terminal with history and completion, or read from a pipe."""

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
except ImportError:  # Python built without readline: no editing
    readline = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

COMMANDS = ("/image ", "/reset", "/save ", "/help", "/quit")  # those with a space take a file
_LINE_LIMIT = 1 << 20  # characters; more than any model takes
_HISTORY_LINES = 1000


def read_line(prompt: str) -> str:
    """Return the next line without its newline. On a terminal the prompt is printed, on stderr where stdout is not one.

    Raises:
        EOFError: end of input.
        InputError: the line is too long; it has been skipped.
    """
    if sys.stdin.isatty():
        if sys.stdout.isatty():
            return input(prompt)  # readline redraws the prompt while the line is edited
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
    """Enable line editing on a terminal: arrow keys, tab completion, and a history across conversations.

    Only the user may read the history file; without access to it there is no history.
    """
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # invalid UTF-8 must not end the chat
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
        _save_history(history)


def _save_history(file: Path) -> None:
    if not file.is_absolute():  # no home directory: "~" would be created here
        return
    mask = os.umask(0o077)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(file)
        file.chmod(0o600)  # an existing file may have other permissions
    except OSError as error:
        log.info("the history is not saved: %s", error)
    finally:
        os.umask(mask)


def _complete(_word: str, index: int) -> str | None:
    """See readline.set_completer."""
    found = completions(readline.get_line_buffer()[: readline.get_endidx()], readline.get_begidx())
    return found[index] if index < len(found) else None


def completions(line: str, begin: int) -> list[str]:
    """Return the completions of the last word: commands, or file names after a command that takes a file.

    Args:
        line: up to the cursor.
        begin: index of the last word; a file name may have spaces and begin before.
    """
    if begin == 0:
        return [c for c in COMMANDS if c.startswith(line)] if line.startswith("/") else []
    for command in COMMANDS:
        if command.endswith(" ") and line.startswith(command):
            return [name[begin - len(command) :] for name in _files(line[len(command) :])]
    return []


def _files(typed: str) -> list[str]:
    """Return the paths with this prefix, directories with a slash; hidden ones only where the dot was typed."""
    folder, start = os.path.split(typed)
    head = typed[: len(typed) - len(start)]
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            found = [e.name + "/" if e.is_dir() else e.name for e in entries if e.name.startswith(start)]
    except OSError:
        return []
    return sorted(head + name for name in found if start.startswith(".") or not name.startswith("."))
