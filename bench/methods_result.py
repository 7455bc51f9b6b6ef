"""The result of `python -m bench.methods`, and its tables."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cobra_edge.bench.machine import Machine
from cobra_edge.bench.spread import Spread
from cobra_edge.bench.tables import NO_VALUE, NOT_MEASURED, Table, verdict

MINUTES, GIB = 90, 16  # goals for calibrate and quantize at full size on a CPU


class InputStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Outliers in the input of a matmul, before and after a rotation.

    Attributes:
        outlier_ratio, outlier_ratio_rotated: RMS of the largest channel over that of the median channel.
        kurtosis, kurtosis_rotated: mean over positions; 3 for a normal distribution.
    """

    outlier_ratio: float
    outlier_ratio_rotated: float
    kurtosis: float
    kurtosis_rotated: float


class CalibrationSeconds(msgspec.Struct, frozen=True):
    """Time of calibration per layer: the part proportional to the number of positions, and the rest."""

    streaming_seconds_per_layer: Spread
    finishing_seconds_per_layer: Spread


class Minutes(msgspec.Struct, frozen=True):
    """Extrapolated time for all layers."""

    calibrate: float
    quantize: float
    both: float


class MethodRow(msgspec.Struct, frozen=True, kw_only=True):
    """One method: relative output errors by matmul and of the whole layer ("layer"), and its time."""

    method: str
    errors: dict[str, Spread]
    seconds_per_layer: Spread
    seconds_per_matrix: dict[str, Spread]
    total_minutes: Minutes


class RoundingRow(msgspec.Struct, frozen=True, kw_only=True):
    """Relative output errors of one matmul with int8 activations.

    Attributes:
        form: how activations are rounded.
        clipped_at: percentile at which they are clipped, or None.
        site: the matmul.
        activations: error with float weights.
        inlier: the same, relative to the output of the inlier channels alone.
        with_codes: error with 4-bit weights.
    """

    form: str
    clipped_at: float | None
    site: str
    activations: Spread
    inlier: Spread
    with_codes: Spread


class MethodMeasures(msgspec.Struct, frozen=True, kw_only=True):
    """All methods on layers with random weights.

    Attributes:
        scheme: of the quantized weights.
        layers, of_layers: measured, and of the whole model.
        extrapolated: says how minutes were extrapolated.
        positions, held_out_positions: for calibration and for the errors.
        extrapolated_positions: that minutes are given for.
        outliers: share of outlier channels.
        threads, load_average: of the machine; a load above the threads is other work.
        inputs: of each layer, by matmul.
        peak_gib: peak resident memory of the process.
    """

    scheme: str
    layers: int
    of_layers: int
    extrapolated: str
    positions: int
    extrapolated_positions: int
    held_out_positions: int
    outliers: float
    threads: int
    load_average: float | None = None
    inputs: tuple[dict[str, InputStatistics], ...]
    calibration: CalibrationSeconds
    rows: tuple[MethodRow, ...]
    activations: tuple[RoundingRow, ...]
    peak_gib: float


class MethodsResult(MethodMeasures, frozen=True, kw_only=True):
    """`python -m bench.methods`."""

    bench: str = "methods"
    model: str
    weights: str = "random"
    machine: Machine


def methods_tables(result: MethodsResult) -> Iterator[Table]:
    """Yield the errors of weights, the errors of int8 activations, then time and memory."""
    yield _weights(result)
    yield _activations(result)
    yield _cost(result)


def _weights(result: MethodsResult) -> Table:
    def mean(site: str, figure: str) -> str:
        return f"{sum(getattr(each[site], figure) for each in result.inputs) / len(result.inputs):.0f}"

    title = (
        f"Relative output error of {result.scheme}, {result.layers} layers of {result.model}, random weights, "
        f"{result.held_out_positions} held-out positions. {result.outliers:.0%} of the channels are outliers with a gain of 20 "
        f"to 60; the RMS of the largest channel is {mean('in_proj', 'outlier_ratio')} times that of the median channel at "
        f"in_proj and {mean('out_proj', 'outlier_ratio')} times at out_proj, {mean('in_proj', 'outlier_ratio_rotated')} and "
        f"{mean('out_proj', 'outlier_ratio_rotated')} times after the rotation."
    )
    rows = [[r.method, *(f"{error.median:.2%}" for error in r.errors.values())] for r in result.rows]
    return Table(["method", "in_proj", "x_proj", "out_proj", "whole layer"], rows, title)


def _activations(result: MethodsResult) -> Table:
    title = "int8 activations in the same layers: error with float weights, the same relative to the output of the inlier "
    title += f"channels alone, and error with {result.scheme} by gptq."
    columns = ["int8 activations", "clipped"]
    columns += [
        f"{site}: {what}" for site in ("in_proj", "out_proj") for what in ("float weights", "inlier channels", "4-bit weights")
    ]
    found: dict[tuple[str, str], list[str]] = {}
    for row in result.activations:
        clipped = "no" if row.clipped_at is None else f"{row.clipped_at:g} %"
        cells = found.setdefault((row.form, clipped), [])
        cells += [f"{value.median:.2%}" for value in (row.activations, row.inlier, row.with_codes)]
    return Table(columns, [[*key, *cells] for key, cells in found.items()], title)


def _cost(result: MethodsResult) -> Table:
    parts = result.calibration
    seconds = parts.streaming_seconds_per_layer.median + parts.finishing_seconds_per_layer.median
    load = NOT_MEASURED if result.load_average is None else f"{result.load_average}"
    title = (
        f"Time, on {result.machine.processor}, {result.threads} threads, load average {load}. Statistics of a layer took "
        f"{seconds:.0f} s for {result.positions} positions. Minutes are **extrapolated from {result.layers} of "
        f"{result.of_layers} layers**, for {result.extrapolated_positions} positions, with embedding and head by their rows "
        f"and without images; the goal is {MINUTES}. Peak resident memory of the benchmark was {result.peak_gib:.1f} GiB, "
        f"{verdict(result.peak_gib <= GIB)} (goal {GIB}); commit {result.machine.commit}."
    )
    rows = []
    for r in result.rows:
        minutes = r.total_minutes
        calibrate = f"{minutes.calibrate:.0f}" if minutes.calibrate else NO_VALUE
        cells = [f"{r.seconds_per_layer.median:.1f}", calibrate, f"{minutes.quantize:.1f}", f"{minutes.both:.1f}"]
        rows.append([r.method, *cells, verdict(minutes.both <= MINUTES)])
    return Table(["method", "quantize a layer, s", "calibrate, min", "quantize, min", "both, min", ""], rows, title)
