"""`regress BUNDLE` and its subcommands: compare, history, convert, lm-eval, lmms-eval."""

from __future__ import annotations

import os

import click

from ..suite.convert import command as convert
from ..terminal.option_groups import write_option_groups
from ..terminal.suggestions import close_matches, meant
from ..terminal.usage import Group
from .adapters.lm_eval_command import lm_eval
from .adapters.lmms_eval_command import lmms_eval
from .outputs.compare_command import compare
from .outputs.history_command import history
from .run_command import regress


class _Regress(Group):
    """A group whose first argument is a bundle unless it is the name of a subcommand."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in self.commands:
            return super().resolve_command(ctx, args)
        close = close_matches(args[0], self.commands)
        if close and not os.path.lexists(args[0]):
            raise click.UsageError(f"{args[0]!r} is neither a bundle nor a command{meant(close)}", ctx)
        return None, regress, args

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        inner = click.Context(regress, info_name=ctx.info_name, parent=ctx.parent, help_option_names=ctx.help_option_names)
        write_option_groups(regress, inner, formatter)
        self.format_commands(ctx, formatter)


command = _Regress(
    "regress",
    help=regress.help,
    epilog=regress.epilog,
    subcommand_metavar="BUNDLE [OPTIONS] | COMMAND",
    context_settings={"ignore_unknown_options": True},  # options may stand before the bundle
    commands={c.name or "": c for c in (compare, history, convert, lm_eval, lmms_eval)},
)
