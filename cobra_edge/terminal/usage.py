"""Command lines, beyond click: `-h`, bare groups, and our own words for what cannot be read."""

from __future__ import annotations

from typing import Any

import click

from .option_groups import write_example, write_option_groups
from .suggestions import COMMAND_SYNONYMS, OPTION_SYNONYMS, close_matches, meant

HELP_NAMES = ["-h", "--help"]


class BareGroupError(click.UsageError):
    """A group was called without a command: its help is the answer. It did nothing, so its exit code is that of wrong usage."""

    def __init__(self, context: click.Context) -> None:
        super().__init__("give a command", context)
        self.help = context.get_help()


class Group(click.Group):
    """Commands under a name, such as `cobra-edge bench`."""

    noun = "command"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click."""
        if not args and not ctx.resilient_parsing:
            raise BareGroupError(ctx)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click."""
        write_option_groups(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click."""
        write_example(self, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click, which cuts a command's one sentence off after 45 characters."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(limit=200)) for name, command in found if command is not None]
            )

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """See click."""
        names = self.list_commands(ctx)
        if args[0] not in names and not args[0].startswith("-"):
            close = close_matches(args[0], names, COMMAND_SYNONYMS)
            known = f"{meant(close) or ';'} known: {', '.join(names)}"
            raise click.UsageError(f"unknown {self.noun} {args[0]!r}{known}", ctx)
        return super().resolve_command(ctx, args)


def run(command: click.Command, arguments: list[str] | None) -> Any:
    """Run a command of click's as a function; its errors are raised. `-h` means `--help` in it and below it."""
    return command.main(arguments, standalone_mode=False, help_option_names=HELP_NAMES)


def explain(error: click.ClickException) -> str:
    """Return one line for what click refused."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    message = error.format_message().rstrip(".")
    if isinstance(error, click.BadOptionUsage):
        message = f"{error.option_name} is not used so: {message}"
    if context is None:
        return message
    if isinstance(error, click.NoSuchOption):
        message = f"unknown option {error.option_name}" + _meant_option(error.option_name, context.command, context)
    elif isinstance(error, click.MissingParameter) and error.param is not None:
        message = f"{_hint(error, context)} is missing"
    elif isinstance(error, click.BadParameter) and _hint(error, context):
        message = f"{_hint(error, context)}: {error.message.rstrip('.')}"
    return f"{message}{'' if message.endswith('?') else ';'} see: {' '.join(context.command_path.split())} --help"


def _hint(error: click.BadParameter, context: click.Context) -> str:
    hint = error.param_hint or (error.param.get_error_hint(context) if error.param is not None else "")
    return (hint if isinstance(hint, str) else " / ".join(hint)).replace("'", "")


def _meant_option(got: str, command: click.Command, context: click.Context) -> str:
    options = [param for param in command.get_params(context) if isinstance(param, click.Option) and not param.hidden]
    names = [name for option in options for name in (*option.opts, *option.secondary_opts) if name.startswith("--")]
    return meant(close_matches(got, names, OPTION_SYNONYMS), quote="")
