"""`regress BUNDLE`, and what goes with it: compare, history, convert, lm-eval, lmms-eval."""

from __future__ import annotations

import click

from .adapters.lm_eval_verb import lm_eval
from .adapters.lmms_eval_verb import lmms_eval
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

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        inner = click.Context(measured, info_name=ctx.info_name, parent=ctx.parent)
        measured.format_options(inner, formatter)
        self.format_commands(ctx, formatter)


command = _Regress(
    "regress",
    help=measured.help,
    epilog=measured.epilog,
    subcommand_metavar="BUNDLE [OPTIONS] | COMMAND",
    context_settings={"ignore_unknown_options": True},  # options may stand before the bundle
    commands={c.name or "": c for c in (compare, history, convert, lm_eval, lmms_eval)},
)
