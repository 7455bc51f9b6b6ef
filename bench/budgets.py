"""`python -m bench.budgets`: measure and update the drift budget of cobra-mini, for review."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from cobra_edge.terminal.option_groups import Command
from cobra_edge.terminal.output import debug_option, main_of, progress, say

from .fault_injection import require_export


@click.command(cls=Command, epilog="Example: python -m bench.budgets && git diff export/budgets")
@debug_option
def budgets() -> None:
    """Export and measure every gated build of cobra-mini, and update its drift limits; review the difference."""
    require_export("budgets")
    from .mini_budget import BUDGET, write_budget

    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        task = bar.add_task("builds", total=None)
        write_budget(
            BUDGET, Path(folder), lambda scheme, done, total: bar.update(task, description=scheme, completed=done, total=total)
        )
    say(f"wrote {BUDGET}; review the difference before you commit it")


main = main_of(budgets)

if __name__ == "__main__":
    main()
