"""The run of `python -m bench.methods`: layer after layer, and what it says of a whole model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cobra_edge.bench.machine import high_water_mark
from cobra_edge.bench.spread import spread
from cobra_edge.formats.hadamard import rotate
from cobra_edge.formats.model_config import MambaConfig

from .activation_rounding import activation_rounding_rows
from .method_errors import (
    SCHEME,
    SITES,
    VARIANTS,
    HeldOutActivations,
    calibrate_layer,
    errors_of,
    held_out_activations,
    quantize_layer,
)
from .outlier_layers import OutlierLayer, kurtosis, outlier_ratio

REAL_POSITIONS = 33_000  # of the full-size calibration that minutes are given for


@dataclass(frozen=True, eq=False)
class _Findings:
    """What one layer showed: its inputs, seconds of calibration, errors and seconds by variant and site, activation_rounding rows."""

    inputs: dict[str, Any]
    calibration: dict[str, float]
    errors: dict[str, dict[str, float]]
    seconds: dict[str, dict[str, float]]
    activation_rounding: list[dict[str, Any]]


def measure_methods(
    config: MambaConfig, layers: int, positions: int, held_out: int, outliers: float, on_step: Callable[[], None]
) -> dict[str, Any]:
    """Measure every variant on layers of random weights.

    Args:
        config: sizes of the decoder, of which `n_layer` is what is extrapolated to.
        layers: how many are measured.
        positions, held_out: calibration positions and those that errors are taken on, multiples of 512.
        outliers: share of loud channels.
        on_step: called after the calibration of a layer and after each variant.
    """
    found = [_measured(OutlierLayer(config, seed, outliers), positions, held_out, on_step) for seed in range(layers)]
    calibration = {part: spread([f.calibration[part] for f in found]) for part in found[0].calibration}
    rows = []
    for variant in VARIANTS:
        errors, seconds = (
            [each[variant.name] for each in of] for of in ([f.errors for f in found], [f.seconds for f in found])
        )
        row = {
            "method": variant.name,
            "errors": {site: spread([e[site] for e in errors]) for site in errors[0]},
            "seconds_per_layer": spread([sum(s.values()) for s in seconds]),
            "seconds_per_matrix": {site: spread([s[site] for s in seconds]) for site in SITES},
        }
        rows.append(row | {"total_minutes": _minutes(config, row, calibration, positions, variant.method != "rtn")})
    return {
        "scheme": SCHEME,
        "layers": layers,
        "of_layers": config.n_layer,
        "extrapolated": f"minutes are extrapolated from {layers} of {config.n_layer} layers",
        "positions": positions,
        "extrapolated_positions": REAL_POSITIONS,
        "held_out_positions": held_out,
        "outliers": outliers,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[2], 1),  # of the last 15 minutes; more than the threads is other work
        "inputs": [f.inputs for f in found],
        "calibration": calibration,
        "rows": rows,
        "activations": [_over_layers(same) for same in zip(*(f.activation_rounding for f in found), strict=True)],
        "peak_gib": round(high_water_mark(os.getpid()) / 2**30, 2),
    }


def _measured(layer: OutlierLayer, positions: int, held_out: int, on_step: Callable[[], None]) -> _Findings:
    took, unseen = calibrate_layer(layer, positions), held_out_activations(layer, held_out)
    on_step()
    errors, seconds, kept = {}, {}, {}
    for variant in VARIANTS:
        result = quantize_layer(variant, layer, took.statistics)
        errors[variant.name], seconds[variant.name] = errors_of(result, layer, unseen), result.seconds
        if variant.method == "gptq":
            kept[variant.name] = result
        on_step()
    activation_rounding = list(activation_rounding_rows(layer, took.statistics, unseen, kept))
    parts = {"streaming_seconds_per_layer": took.streaming_seconds, "finishing_seconds_per_layer": took.finishing_seconds}
    return _Findings(_inputs(unseen), parts, errors, seconds, activation_rounding)


def _inputs(unseen: HeldOutActivations) -> dict[str, Any]:
    """Say how loud the outlier_ratio channels are, before and behind a rotation."""
    found = {}
    for site in ("in_proj", "out_proj"):
        x = unseen.inputs[site]
        turned = rotate(x)
        found[site] = {
            "outlier_ratio": outlier_ratio(x),
            "outlier_ratio_rotated": outlier_ratio(turned),
            "kurtosis": kurtosis(x),
            "kurtosis_rotated": kurtosis(turned),
        }
    return found


def _over_layers(same: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Return a row of all layers from that of each."""
    figures = ("activations", "inlier", "with_codes")
    return same[0] | {figure: spread([row[figure] for row in same]) for figure in figures}


def _minutes(
    config: MambaConfig, row: dict[str, Any], calibration: dict[str, Any], positions: int, calibrates: bool
) -> dict[str, float]:
    """Return minutes of calibrate and of quantization for all layers, embedding and head counted by rows of in_proj."""
    streaming, finishing = (calibration[f"{part}_seconds_per_layer"]["median"] for part in ("streaming", "finishing"))
    calibrate = config.n_layer * (streaming * REAL_POSITIONS / positions + finishing) if calibrates else 0.0
    tables = (1 if config.tied else 2) * config.vocab / (2 * config.d_inner)
    quantize = config.n_layer * row["seconds_per_layer"]["median"] + tables * row["seconds_per_matrix"]["in_proj"]["median"]
    return {"calibrate": calibrate / 60, "quantize": quantize / 60, "both": (calibrate + quantize) / 60}
