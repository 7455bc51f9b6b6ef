"""What every command shares: progress and logs on stderr, results on stdout, errors as one line and an exit code."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .errors import CobraEdgeError, MachineError

EXIT_INTERRUPTED = 130

errors = Console(stderr=True)
results = Console(width=None if sys.stdout.isatty() else 120)  # a pipe has no width of its own


def progress() -> Progress:
    """Return a progress display on stderr; it draws nothing where stderr is not a terminal."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,
    )


def print_json(data: Any) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(msgspec.to_builtins(data), indent=2) + "\n")
    sys.stdout.flush()


def run_command(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run a click command and return its exit code; no traceback reaches a user unless --debug is given."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    logging.basicConfig(
        level=logging.INFO if debug else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=errors, show_time=False, show_path=False)],
        force=True,
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        command.main(given, standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        errors.print("interrupted", highlight=False)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as error:
        if debug:
            errors.print_exception()
        message, code = _explain(error)
        errors.print(f"error: {plain(message)}", style="red", markup=False, highlight=False, soft_wrap=True)
        return code
    return 0


def _explain(error: Exception) -> tuple[str, int]:
    """Return the line and the exit code for an error; one that nobody foresaw must not look like a drift (1)."""
    if isinstance(error, CobraEdgeError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory; close other programs or take a smaller model", MachineError.exit_code
    if isinstance(error, OSError):
        return f"{error}; check the path and the disk", MachineError.exit_code
    kind = type(error).__name__
    return f"unforeseen {kind} ({error}); run again with --debug and report what it prints", MachineError.exit_code


def plain(text: str) -> str:
    """Return text from a file or a user without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def say(text: str) -> None:
    """Print one line of a result as it is: nothing in it is markup, whatever a file put there."""
    results.print(plain(text), markup=False, highlight=False, soft_wrap=True)


def main_of(command: click.Command) -> Callable[[], None]:
    """Return the entry point of a verb's module."""

    def main() -> None:
        sys.exit(run_command(command))

    return main
