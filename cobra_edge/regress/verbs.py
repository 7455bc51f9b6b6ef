"""`regress BUNDLE`, and what goes with it: compare, history, convert, lm-eval, lmms-eval."""

from __future__ import annotations

import click

from .convert import command as convert
from .outputs.compare_verb import compare
from .outputs.history_verb import history
from .verb import measured


class _Regress(click.Group):
    """What is no verb's name is a bundle."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in self.commands:
            return super().resolve_command(ctx, args)
        return None, measured, args

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "--debug"):
            # Options may stand before the bundle.
            ctx._protected_args, ctx.args = [*args[:1]], args[1:]
            return ctx.args
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        inner = click.Context(measured, info_name=ctx.info_name, parent=ctx.parent)
        measured.format_options(inner, formatter)
        self.format_commands(ctx, formatter)


command = _Regress(
    "regress",
    help=measured.help,
    epilog=measured.epilog,
    subcommand_metavar="BUNDLE [OPTIONS] | COMMAND",
    commands={"compare": compare, "history": history, "convert": convert},
)
