"""`python -m bench.vision`: the vision graph of cobra-mini in every precision, and what each does to its answers."""

from __future__ import annotations

from pathlib import Path

import click

from cobra_edge.bench.vision_command import measure_and_keep
from cobra_edge.terminal.output import debug_option, main_of

from .vision_answers import measure_answers


@click.command(epilog="Example: python -m bench.vision --rounds 25")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Rounds of latency, precisions in turns.")
@click.option("--scratch", type=click.Path(path_type=Path, exists=True), help="Directory for the graphs.")
@click.option("--name", help="Name of the file in bench/results. Default: vision-cobra-mini.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def vision(rounds: int, scratch: Path | None, name: str | None, as_json: bool) -> None:
    """Measure as `cobra-edge bench vision` does, and the drift of the held-out suite that each precision costs."""
    measure_and_keep("cobra-mini", (), (), "rtx-4090", rounds, scratch, name, as_json, measure_answers)


main = main_of(vision)

if __name__ == "__main__":
    main()
