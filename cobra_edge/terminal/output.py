"""Output of commands: results on stdout, progress and logs on stderr, errors as one line and an exit code."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..errors import CobraEdgeError, InputError, MachineError
from . import usage
from .option_groups import option

EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE, as shells report it
_HANGUP = getattr(signal, "SIGHUP", None)  # None on Windows
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([_HANGUP] if _HANGUP else []))
_CLEANUP_SECONDS = 10.0  # after a signal, in which further ones are ignored so that cleanup can finish

errors = Console(stderr=True)
results = Console(width=None if sys.stdout.isatty() else 120)  # a pipe has no width


class Stages(Progress):
    """Progress on stderr: bars on a terminal, elsewhere one line as each stage begins."""

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        """See rich's Progress."""
        if not errors.is_terminal:
            tell(description)
        return super().add_task(description, *args, **fields)


def progress() -> Stages:
    """Return a progress display."""
    return Stages(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,
    )


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s")


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function (name, done, total) that shows consecutive stages on one progress bar."""
    columns = TextColumn("{task.description:<28}"), BarColumn(), _Rate(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as bar:
        task, current = bar.add_task("", total=None), ""

        def show(name: str, done: int, total: int) -> None:
            nonlocal current
            if name != current:
                if not errors.is_terminal:
                    tell(name)
                current = name
                bar.reset(task, description=name, total=total)
            bar.update(task, completed=done)

        yield show


def print_json(data: Any) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(msgspec.to_builtins(data), indent=2) + "\n")
    sys.stdout.flush()


def print_json_line(data: Any) -> None:
    """Print one JSON object on one line on stdout (JSON Lines)."""
    sys.stdout.write(json.dumps(msgspec.to_builtins(data)) + "\n")
    sys.stdout.flush()


def _enable_logs(_context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        logging.getLogger().setLevel(logging.INFO)


# For every command. The level of the root logger records whether it was given.
debug_option = option(
    "--debug",
    group="general",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_enable_logs,
    help="Print logs, and a traceback on errors.",
)


def run_command(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run a click command and return its exit code; no traceback reaches a user unless --debug is given."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=errors, show_time=False, show_path=False)],
        force=True,
    )
    _handle_signals()
    try:
        code = usage.run(command, None if arguments is None else list(arguments))
        return code if isinstance(code, int) else 0
    except usage.BareGroupError as error:
        tell(error.help)
        return error.exit_code
    except click.ClickException as error:
        _say_error(usage.explain(error))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        tell("interrupted")
        return EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit):  # click and rich raise SystemExit(1) here, the exit code of a drift
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discard what is still buffered
        return EXIT_CLOSED_PIPE
    except Exception as error:
        if logging.getLogger().isEnabledFor(logging.INFO):
            errors.print_exception()
        message, code = _explain(error)
        _say_error(message)
        return code


def _handle_signals() -> None:
    """Make each of _SIGNALS a KeyboardInterrupt; later ones are ignored for a while, so that cleanup can finish."""
    last = -math.inf

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last > _CLEANUP_SECONDS:
            last = time.monotonic()
            raise KeyboardInterrupt

    for number in _SIGNALS:
        if number != _HANGUP or signal.getsignal(number) != signal.SIG_IGN:  # keep what nohup has set
            signal.signal(number, interrupt)


def _explain(error: Exception) -> tuple[str, int]:
    """Return message and exit code of an error; an unexpected one must not look like a drift (1)."""
    if isinstance(error, CobraEdgeError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory; close other programs or take a smaller model", MachineError.exit_code
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_THREAD):
        return "cannot start another thread; close other programs, or raise the limit (ulimit -u)", MachineError.exit_code
    if isinstance(error, PermissionError):
        return f"{error.filename}: permission denied; fix its permissions or give another path", InputError.exit_code
    if isinstance(error, OSError):
        return f"{error}; check the path and the disk", MachineError.exit_code
    kind = type(error).__name__
    return f"unexpected {kind} ({error}); run again with --debug and report the traceback", MachineError.exit_code


# Python and C++ have no exception type for it.
_NO_THREAD = ("can't start new thread", "Resource temporarily unavailable")


def plain(text: str) -> str:
    """Return untrusted text with control characters replaced, so that it cannot control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _say_error(message: str) -> None:
    errors.print(f"error: {plain(message)}", style="red", markup=False, highlight=False, soft_wrap=True)


def tell(text: str, style: str | None = None) -> None:
    """Print one line on stderr without markup, optionally in a style of rich."""
    errors.print(plain(text), style=style, markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line of a result on stdout without markup."""
    results.print(plain(text), markup=False, highlight=False, soft_wrap=True)


def main_of(command: click.Command) -> Callable[[], None]:
    """Return the entry point of a command's module."""

    def main() -> None:
        code = run_command(command)
        # During interpreter shutdown the handlers are gone, and a late signal would change the exit code.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        sys.exit(code)

    return main


def cell(text: str) -> Text:
    """Return untrusted text as a cell or title of a table: no markup, no control characters."""
    return Text(plain(text))


def figure(value: float | None) -> str:
    """Format a number with four significant digits and thousands separators; None is "not measured"."""
    if value is None:
        return "not measured"
    rounded = float(f"{value:.4g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.4g}"


def duration(seconds: float) -> str:
    """Return a time for people: 45 s, 3.2 min, 2 h 5 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.2g} min" if minutes < 99.5 else f"{int(minutes // 60)} h {int(minutes % 60)} min"


def megabytes(size_bytes: int) -> str:
    """Format a size in units of 10⁶ bytes."""
    return f"{size_bytes / 1e6:,.2f} MB"
