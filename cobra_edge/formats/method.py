"""Quantization methods: how the codes of a weight matrix are chosen, one row of `METHODS` for each."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from ..terminal.suggestions import near_matches


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        name: as on the command line and in a recipe.
        title: what it does, for `export --list`.
        needs_statistics: whether it uses calibration statistics.
        scales_inputs: whether inputs of some projections are scaled first, as AWQ does.
        needs_gradients: whether it is guided by gradients of the model's predictions; it collects them itself.
        compensates: whether the columns that are not yet rounded compensate for the errors of those that are, as in GPTQ.
    """

    name: str
    title: str
    needs_statistics: bool = False
    scales_inputs: bool = False
    compensates: bool = False
    needs_gradients: bool = False


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("rtn", "rounds each weight to nearest; uses no activations"),
        Method("gptq", "rounds column by column; later columns compensate for errors", needs_statistics=True, compensates=True),
        Method("awq", "scales outlier inputs, then rounds to nearest", needs_statistics=True, scales_inputs=True),
        Method(
            "guided",
            "GPTQ weighted by gradients of the predictions, layer after layer; the least drift",
            needs_gradients=True,
            compensates=True,
        ),
        Method("awq-gptq", "AWQ's scales, then GPTQ", needs_statistics=True, scales_inputs=True, compensates=True),
    )
}
# In the recipe of a decoder without codes of ours: float16, or quantized by bitsandbytes.
NO_METHOD = Method("none", "weights are not quantized by cobra_edge")


def recipe_method(name: str) -> Method:
    """Return the method that a recipe names: a row of the table, or `NO_METHOD`. Raises as `method_named`."""
    return NO_METHOD if name == NO_METHOD.name else method_named(name)


def method_named(name: str) -> Method:
    """Return a row of the table. Raises InputError with near matches."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}{near_matches(name, METHODS)}")
    return METHODS[name]
