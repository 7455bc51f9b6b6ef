"""`regress --explain [MEASURE]`: what a measure means, and what to do where it is off; needs no bundle."""

from __future__ import annotations

from collections.abc import Iterator

import click

from ...terminal.listing import Listing, Row
from ...terminal.option_groups import option
from ...terminal.output import results
from ..gates import GATES
from ..measures import MEASURES, PARTS, Measure, measure_named

_EVERY = "every measure"


def explanation(measure: Measure) -> list[tuple[str, str]]:
    """Return (term, words) pairs about a measure."""
    return [
        ("means", measure.description),
        ("unit", f"{measure.unit}; {measure.direction}"),
        ("gate", f"{measure.gate}: {GATES[measure.gate]}"),
        ("if it is off", measure.reaction),
        *((("in a budget", measure.limit_line()),) if measure.gate == "absolute" else ()),
        *(
            ((f"of one {PARTS[measure.name].lower()}", f"{measure.name}.{PARTS[measure.name]}"),)
            if measure.name in PARTS
            else ()
        ),
    ]


def explanations(name: str) -> Iterator[Listing]:
    """Yield what to print about a measure, or about every measure. Raises InputError if it is unknown."""
    for measure in MEASURES.values() if name == _EVERY else (measure_named(name),):
        rows = [Row((f"  {term}", words)) for term, words in explanation(measure)]
        yield Listing(f"{measure.name}: {measure.label}", ("", ""), rows)


def _explain(context: click.Context, _parameter: click.Parameter, name: str | None) -> None:
    if name is None or context.resilient_parsing:
        return
    for listing in explanations(name):
        results.print(listing)
    context.exit()


explain_option = option(
    "--explain",
    group="general",
    metavar="[MEASURE]",
    is_flag=False,
    flag_value=_EVERY,
    is_eager=True,
    expose_value=False,
    callback=_explain,
    help="Print what a measure means, or every measure, and what to do where it is off; needs no bundle.",
)
