"""The run of `python -m bench.methods`: layer by layer, then extrapolated to a whole model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cobra_edge.bench.machine import high_water_mark
from cobra_edge.bench.spread import spread
from cobra_edge.formats.hadamard import rotate
from cobra_edge.formats.model_config import MambaConfig

from .activation_rounding import RoundingError, activation_rounding_errors
from .method_errors import (
    SCHEME,
    SITES,
    VARIANTS,
    CalibratedLayer,
    HeldOutActivations,
    MethodVariant,
    calibrate_layer,
    errors_of,
    held_out_activations,
    quantize_layer,
)
from .methods_result import CalibrationSeconds, InputStatistics, MethodMeasures, MethodRow, Minutes, RoundingRow
from .outlier_layers import OutlierLayer, kurtosis, outlier_ratio

REAL_POSITIONS = 33_000  # of a full-size calibration, which minutes are extrapolated to


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer: statistics of its inputs, seconds of calibration, errors and seconds by method and site, rounding errors."""

    inputs: dict[str, InputStatistics]
    calibrated: CalibratedLayer
    errors: dict[str, dict[str, float]]
    seconds: dict[str, dict[str, float]]
    rounding: list[RoundingError]


def measure_methods(
    config: MambaConfig, layers: int, positions: int, held_out: int, outliers: float, on_step: Callable[[], None]
) -> MethodMeasures:
    """Measure every method on layers with random weights.

    Args:
        config: of the decoder; minutes are extrapolated to its `n_layer`.
        layers: to measure.
        positions, held_out: for calibration and for the errors, multiples of 512.
        outliers: share of outlier channels.
        on_step: called after the calibration of a layer, and after each method.
    """
    found = [_measured(OutlierLayer(config, seed, outliers), positions, held_out, on_step) for seed in range(layers)]
    calibration = CalibrationSeconds(
        spread([f.calibrated.streaming_seconds for f in found]), spread([f.calibrated.finishing_seconds for f in found])
    )
    return MethodMeasures(
        scheme=SCHEME,
        layers=layers,
        of_layers=config.n_layer,
        extrapolated=f"minutes are extrapolated from {layers} of {config.n_layer} layers",
        positions=positions,
        extrapolated_positions=REAL_POSITIONS,
        held_out_positions=held_out,
        outliers=outliers,
        threads=torch.get_num_threads(),
        load_average=round(os.getloadavg()[2], 1),  # of the last 15 minutes
        inputs=tuple(f.inputs for f in found),
        calibration=calibration,
        rows=tuple(_row(variant, found, config, calibration, positions) for variant in VARIANTS),
        activations=tuple(_over_layers(same) for same in zip(*(f.rounding for f in found), strict=True)),
        peak_gib=round(high_water_mark(os.getpid()) / 2**30, 2),
    )


def _row(
    variant: MethodVariant, found: Sequence[_Layer], config: MambaConfig, calibration: CalibrationSeconds, positions: int
) -> MethodRow:
    errors, seconds = [f.errors[variant.name] for f in found], [f.seconds[variant.name] for f in found]
    per_layer = spread([sum(s.values()) for s in seconds])
    per_matrix = {site: spread([s[site] for s in seconds]) for site in SITES}
    calibrate = 0.0
    if variant.method != "rtn":
        streaming, finishing = (getattr(calibration, f"{part}_seconds_per_layer").median for part in ("streaming", "finishing"))
        calibrate = config.n_layer * (streaming * REAL_POSITIONS / positions + finishing)
    # Embedding and head are counted by their rows, relative to in_proj.
    tables = (1 if config.tied else 2) * config.vocab / (2 * config.d_inner)
    quantize = config.n_layer * per_layer.median + tables * per_matrix["in_proj"].median
    return MethodRow(
        method=variant.name,
        errors={site: spread([e[site] for e in errors]) for site in errors[0]},
        seconds_per_layer=per_layer,
        seconds_per_matrix=per_matrix,
        total_minutes=Minutes(calibrate / 60, quantize / 60, (calibrate + quantize) / 60),
    )


def _measured(layer: OutlierLayer, positions: int, held_out: int, on_step: Callable[[], None]) -> _Layer:
    took, unseen = calibrate_layer(layer, positions), held_out_activations(layer, held_out)
    on_step()
    errors, seconds, kept = {}, {}, {}
    for variant in VARIANTS:
        result = quantize_layer(variant, layer, took.statistics)
        errors[variant.name], seconds[variant.name] = errors_of(result, layer, unseen), result.seconds
        if variant.method == "gptq":
            kept[variant.name] = result
        on_step()
    rounding = list(activation_rounding_errors(layer, took.statistics, unseen, kept))
    return _Layer(_inputs(unseen), took, errors, seconds, rounding)


def _inputs(unseen: HeldOutActivations) -> dict[str, InputStatistics]:
    """Return the strength of outliers before and after a rotation, by matmul."""
    found = {}
    for site in ("in_proj", "out_proj"):
        x = unseen.inputs[site]
        rotated = rotate(x)
        found[site] = InputStatistics(
            outlier_ratio=outlier_ratio(x),
            outlier_ratio_rotated=outlier_ratio(rotated),
            kurtosis=kurtosis(x),
            kurtosis_rotated=kurtosis(rotated),
        )
    return found


def _over_layers(same: Sequence[RoundingError]) -> RoundingRow:
    """Return the row of all layers from the errors of each."""
    return RoundingRow(
        form=same[0].form,
        clipped_at=same[0].clipped_at,
        site=same[0].site,
        activations=spread([error.activations for error in same]),
        inlier=spread([error.inlier for error in same]),
        with_codes=spread([error.with_codes for error in same]),
    )
