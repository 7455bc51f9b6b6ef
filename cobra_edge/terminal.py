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
    signal.signal(signal.SIGTERM, _interrupt)
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
    except CobraEdgeError as error:
        if debug:
            raise
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    except MemoryError:
        errors.print("error: out of memory; close other programs or take a smaller model", style="red")
        return MachineError.exit_code
    except BrokenPipeError:
        return 0
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main_of(command: click.Command) -> Callable[[], None]:
    """Return the entry point of a verb's module."""

    def main() -> None:
        sys.exit(run_command(command))

    return main
