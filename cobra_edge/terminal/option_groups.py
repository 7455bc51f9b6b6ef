"""Options in groups: `--help` lists a command's options by what they are about, its example last.

@click.command(cls=Command, epilog="Example: cobra-edge inspect BUNDLE --json")
@option("--json", "as_json", is_flag=True, group="output", help="Print one JSON object.")
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import click

GroupName = Literal[
    "input", "model", "quantization", "generation", "measurement", "server", "limits", "output", "advanced", "general"
]
GROUPS: tuple[GroupName, ...] = get_args(GroupName)  # in the order of --help

_COLUMN = 28  # the widest option that has its help beside it and not below
_WIDTH = 78
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class GroupedOption(click.Option):
    """An option of a group. Its default is shown in the help, and a number is not called a "range"."""

    def __init__(self, *arguments: Any, group: GroupName, **attributes: Any) -> None:
        attributes.setdefault("show_default", True)
        super().__init__(*arguments, **attributes)
        self.group: GroupName = group
        if self.metavar is None and isinstance(self.type, (click.IntRange, click.FloatRange)):
            self.metavar = self.type.name.removesuffix(" range").upper()


def option(*declarations: str, group: GroupName, **attributes: Any) -> Callable[[Decorated], Decorated]:
    """Return click's decorator for an option of a group; the attributes are those of `click.option`."""
    return click.option(*declarations, cls=GroupedOption, group=group, **attributes)


class Command(click.Command):
    """A command whose help groups its options and shows its example as it is typed."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click."""
        write_option_groups(self, ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click."""
        write_example(self, formatter)


def write_option_groups(command: click.Command, context: click.Context, formatter: click.HelpFormatter) -> None:
    """Write a section for each group that has options; click's own, such as --help, belong to the general ones."""
    rows: dict[GroupName, list[tuple[str, str]]] = {name: [] for name in GROUPS}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            rows[parameter.group if isinstance(parameter, GroupedOption) else "general"].append(record)
    widths = [len(term) for records in rows.values() for term, _ in records]
    column = max((width for width in widths if width <= _COLUMN), default=0)  # one for all sections
    for name, records in rows.items():
        if records:
            with formatter.section(f"{name.capitalize()} options"):
                formatter.write_dl([(term.ljust(column), text) for term, text in records], col_max=column)


def write_example(command: click.Command, formatter: click.HelpFormatter) -> None:
    """Write a command's epilog, "Example: …", as lines that a shell takes as one; other epilogs as they are."""
    epilog = inspect.cleandoc(command.epilog or "")
    example = epilog.removeprefix("Example: ")
    if not epilog:
        return
    if example == epilog:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(epilog)
        return
    with formatter.section("Example"):
        formatter.write("".join(f"  {line}\n" for line in _shell_lines(example, min(formatter.width, _WIDTH) - 2)))


def _shell_lines(command: str, width: int) -> list[str]:
    """Return a shell's command on lines of at most `width` characters, broken before options only."""
    first, *others = re.split(r" (?=--)", command)
    lines = [first]
    for word in others:
        if len(lines[-1]) + 1 + len(word) > width - len(" \\"):
            lines[-1] += " \\"
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}"
    return lines
