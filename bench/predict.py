"""`python -m bench.predict`: speed on paper, for devices that nothing was measured on."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.table import Table

from cobra_edge.bench.results import RESULTS
from cobra_edge.errors import InputError
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.terminal.output import cell, debug_option, main_of, print_json, results, say

from .predict_tables import off_cell, predictions, rate_cell, sources
from .speed_model import LAUNCH_US, SCHEMES_SHOWN, checked


@click.command(epilog="Example: python -m bench.predict --target rtx-4090 --scheme w4a16-g128")
@click.option("--shape", default="cobra-3b", show_default=True, help="A published shape.")
@click.option("--scheme", "schemes", multiple=True, help=f"May be given again.  [default: {', '.join(SCHEMES_SHOWN)}]")
@click.option("--target", "names", multiple=True, help="A device profile; may be given again.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def predict(shape: str, schemes: tuple[str, ...], names: tuple[str, ...], as_json: bool) -> None:
    """Predict tokens a second from the bytes a token moves; nothing is measured, and nothing is kept.

    The efficiency is carried over from bench/results/gpu-decode-*.json where there is one, otherwise assumed. The same sum is
    printed beside published measurements.
    """
    for scheme in schemes:
        scheme_named(scheme)
    found = predictions(shape, tuple(dict.fromkeys(schemes)) or SCHEMES_SHOWN, tuple(dict.fromkeys(names)), _measured())
    known = checked()
    if as_json:
        print_json(
            {
                "bench": "predict",
                "shape": shape,
                "launch_us": LAUNCH_US,
                "predicted": [
                    {
                        "target": p.target,
                        "scheme": p.scheme,
                        "token_bytes": p.token_bytes,
                        "launches": p.launches,
                        "predicted_ms": [p.low_ms, p.high_ms],
                        "predicted_tok_s": list(p.tokens_per_second),
                        "efficiency": [p.efficiency.low, p.efficiency.high],
                        "efficiency_from": p.efficiency.known_from,
                        "lacks": p.lacks,
                    }
                    for p in found
                ],
                "checked": [
                    {"what": c.known.what, "target": c.known.target, "measured_ms": c.known.ms}
                    | {"predicted_ms": [c.low_ms, c.high_ms], "off": c.off}
                    for c in known
                ],
            }
        )
        return
    table = Table(title=cell(f"{shape}, predicted and not measured"), title_justify="left")
    for column in ("target", "scheme", "GB a token", "launches", "predicted tok/s"):
        table.add_column(column)
    for p in found:
        table.add_row(p.target, p.scheme, f"{p.token_bytes / 1e9:.2f}", str(p.launches), rate_cell(p))
    results.print(table)
    for sentence in sources(found):
        say(sentence)
    table = Table(title="the same sum beside published measurements, ms a token", title_justify="left")
    for column in ("published", "target", "measured", "predicted", ""):
        table.add_column(column)
    for c in known:
        table.add_row(c.known.what, c.known.target, f"{c.known.ms:.1f}", f"{c.low_ms:.1f}–{c.high_ms:.1f}", off_cell(c))
    results.print(table)


def _measured() -> list[dict[str, Any]]:
    """Return the results of GPUs under the current directory. Raises InputError for one that is no JSON."""
    found = []
    for file in sorted(RESULTS.glob("gpu-decode-*.json")):
        try:
            found.append(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise InputError(f"{file}: {error}; measure it again, or take it away") from error
    return found


main = main_of(predict)

if __name__ == "__main__":
    main()
