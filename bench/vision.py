"""`python -m bench.vision`: the vision graph of cobra-mini in each precision, and its effect on the answers."""

from __future__ import annotations

from pathlib import Path

import click
from msgspec import structs

from cobra_edge.bench.results import check_name, save_result
from cobra_edge.bench.tables import print_result
from cobra_edge.bench.vision_command import VisionPlan, measure
from cobra_edge.bench.vision_result import vision_tables
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, print_json, tell


@click.command(cls=Command, epilog="Example: python -m bench.vision --rounds 25")
@option("--rounds", group="measurement", type=click.IntRange(1), default=7, help="Rounds of latency.")
@option("--name", group="output", default="vision-cobra-mini", help="Name of the file in bench/results.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of tables.")
@option("--scratch", group="advanced", type=click.Path(path_type=Path, exists=True), help="Directory for temporary files.")
@debug_option
def vision(rounds: int, scratch: Path | None, name: str, as_json: bool) -> None:
    """Measure `cobra-edge bench vision`, and the drift on the held-out suite that each precision causes."""
    check_name(name)
    plan = VisionPlan("cobra-mini", rounds=rounds, scratch=scratch)
    plan.check()
    from .vision_answers import measure_answers
    from .vision_goals import MiniVisionResult, answers_table

    found, answers = measure(plan, lambda graphs: measure_answers(graphs, tell))
    result = MiniVisionResult(**structs.asdict(found), answers=tuple(answers))
    file = save_result(name, result)
    if as_json:
        print_json(result)
    else:
        print_result([*vision_tables(result), answers_table(result)], file)


main = main_of(vision)

if __name__ == "__main__":
    main()
