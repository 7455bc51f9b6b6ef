"""`python -m bench.predict`: predicted speed on devices that were not measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click
import msgspec

from cobra_edge.bench.results import RESULTS
from cobra_edge.bench.tables import terminal_table
from cobra_edge.errors import InputError
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, print_json, results

from .predictions import predictions, published_table, target_table
from .speed_model import LAUNCH_US, SCHEMES_SHOWN, Checked, Prediction, checked


class PredictedRow(msgspec.Struct, frozen=True, kw_only=True):
    """One prediction; ranges are (low, high)."""

    target: str
    scheme: str
    token_bytes: int
    launches: int
    predicted_ms: tuple[float, float]
    predicted_tok_s: tuple[float, float]
    efficiency: tuple[float, float]
    efficiency_from: str
    lacks: str | None


class CheckedRow(msgspec.Struct, frozen=True, kw_only=True):
    """A published measurement, the prediction, and the relative distance from its range."""

    what: str
    target: str
    measured_ms: float
    predicted_ms: tuple[float, float]
    off: float


class PredictResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.predict`."""

    bench: str = "predict"
    shape: str
    launch_us: dict[str, float]
    predicted: tuple[PredictedRow, ...]
    checked: tuple[CheckedRow, ...]


@click.command(cls=Command, epilog="Example: python -m bench.predict --target rtx-4090 --scheme w4a16-g128")
@option("--shape", group="input", default="cobra-3b", help="Published shape.")
@option("--scheme", "schemes", group="input", multiple=True, help=f"Scheme; repeatable.  [default: {', '.join(SCHEMES_SHOWN)}]")
@option("--target", "names", group="input", multiple=True, help="Device profile; repeatable.  [default: all]")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def predict(shape: str, schemes: tuple[str, ...], names: tuple[str, ...], as_json: bool) -> None:
    """Predict tokens per second from the bytes moved per token; nothing is measured or saved.

    The efficiency is taken from bench/results/gpu-decode-*.json if there is one, else assumed. The same calculation is compared
    with published measurements.
    """
    for scheme in schemes:
        scheme_named(scheme)
    found = predictions(shape, tuple(dict.fromkeys(schemes)) or SCHEMES_SHOWN, tuple(dict.fromkeys(names)), _measured())
    if as_json:
        print_json(_result(shape, found, checked()))
        return
    results.print(terminal_table(target_table(found, f"{shape}, predicted and not measured")))
    results.print(terminal_table(published_table()))


def _result(shape: str, found: Sequence[Prediction], known: Sequence[Checked]) -> PredictResult:
    predicted = [
        PredictedRow(
            target=p.target,
            scheme=p.scheme,
            token_bytes=p.token_bytes,
            launches=p.launches,
            predicted_ms=(p.low_ms, p.high_ms),
            predicted_tok_s=p.tokens_per_second,
            efficiency=(p.efficiency.low, p.efficiency.high),
            efficiency_from=p.efficiency.known_from,
            lacks=p.lacks,
        )
        for p in found
    ]
    compared = [
        CheckedRow(
            what=c.known.what, target=c.known.target, measured_ms=c.known.ms, predicted_ms=(c.low_ms, c.high_ms), off=c.off
        )
        for c in known
    ]
    return PredictResult(shape=shape, launch_us=LAUNCH_US, predicted=tuple(predicted), checked=tuple(compared))


def _measured() -> list[dict[str, Any]]:
    """Return the results of GPUs under the current directory. Raises InputError for one that is not JSON."""
    found = []
    for file in sorted(RESULTS.glob("gpu-decode-*.json")):
        try:
            found.append(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise InputError(f"{file}: {error}; delete the file or measure it again") from error
    return found


main = main_of(predict)

if __name__ == "__main__":
    main()
