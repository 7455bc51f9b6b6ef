"""The run of `bench methods`: layer after layer, and what it says of a whole model."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from ..hadamard import rotate
from ..model.config import MambaConfig
from .machine import high_water_mark
from .methods import CONTENDERS, SCHEME, SITES, Heard, calibrated, errors_of, heard, made
from .planted import PlantedLayer, kurtosis, loudest
from .rounded import rounded_rows
from .spread import spread

REAL_POSITIONS = 33_000  # of the data that calibrate is meant for: 128 questions about pictures of 729 patches, shared by some
_ERRORS = (*SITES, "layer")


def measure_methods(
    config: MambaConfig, layers: int, positions: int, held_out: int, outliers: float, on_step: Callable[[], None]
) -> dict[str, Any]:
    """Measure every contender on layers of random weights.

    Args:
        config: sizes of the decoder, of which `n_layer` is what is extrapolated to.
        layers: how many are measured.
        positions, held_out: calibration positions and those that errors are taken on, multiples of 512.
        outliers: share of loud channels.
        on_step: called after the calibration of a layer and after each contender.
    """
    errors = {c.name: defaultdict[str, list[float]](list) for c in CONTENDERS}
    seconds = {c.name: defaultdict[str, list[float]](list) for c in CONTENDERS}
    calibrations, inputs, rounded = list[tuple[float, float]](), list[dict[str, Any]](), list[list[dict[str, Any]]]()
    for index in range(layers):
        layer = PlantedLayer(config, index, outliers)
        took = calibrated(layer, positions)
        unheard = heard(layer, held_out)
        inputs.append(_inputs(unheard))
        on_step()
        kept = {}
        for contender in CONTENDERS:
            result = made(contender, layer, took.statistics)
            for site, error in errors_of(result, layer, unheard).items():
                errors[contender.name][site].append(error)
            for site, value in result.seconds.items():
                seconds[contender.name][site].append(value)
            if contender.method == "gptq":
                kept[contender.name] = result
            on_step()
        rounded.append(list(rounded_rows(layer, took.statistics, unheard, kept)))
        calibrations.append((took.streaming_seconds, took.finishing_seconds))
    streaming, finishing = (spread(each) for each in zip(*calibrations, strict=True))
    calibration = {"streaming_seconds_a_layer": streaming, "finishing_seconds_a_layer": finishing}
    rows = [
        {
            "method": c.name,
            "errors": {site: spread(errors[c.name][site]) for site in _ERRORS},
            "seconds_a_layer": spread([sum(each) for each in zip(*seconds[c.name].values(), strict=True)]),
            "seconds_a_matrix": {site: spread(seconds[c.name][site]) for site in SITES},
        }
        for c in CONTENDERS
    ]
    for contender, row in zip(CONTENDERS, rows, strict=True):
        row["minutes_of_all_layers"] = _minutes(config, row, calibration, positions, contender.method != "rtn")
    return {
        "scheme": SCHEME,
        "layers": layers,
        "of_layers": config.n_layer,
        "extrapolated": f"minutes are extrapolated from {layers} of {config.n_layer} layers",
        "positions": positions,
        "positions_of_minutes": REAL_POSITIONS,
        "held_out_positions": held_out,
        "outliers": outliers,
        "threads": torch.get_num_threads(),
        "inputs": inputs,
        "calibration": calibration,
        "rows": rows,
        "activations": [_together(same) for same in zip(*rounded, strict=True)],
        "peak_gib": round(high_water_mark(os.getpid()) / 2**30, 2),
    }


def _inputs(unheard: Heard) -> dict[str, Any]:
    """Say how loud the loudest channels are, before and behind a rotation."""
    found = {}
    for site in ("in_proj", "out_proj"):
        x = unheard.inputs[site]
        turned = rotate(x)
        found[site] = {
            "loudest": loudest(x),
            "loudest_rotated": loudest(turned),
            "kurtosis": kurtosis(x),
            "kurtosis_rotated": kurtosis(turned),
        }
    return found


def _together(same: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Return a row of all layers from that of each."""
    figures = ("activations", "quiet", "with_codes")
    return same[0] | {figure: spread([row[figure] for row in same]) for figure in figures}


def _minutes(
    config: MambaConfig, row: dict[str, Any], calibration: dict[str, Any], positions: int, calibrates: bool
) -> dict[str, float]:
    """Return minutes of calibrate and of quantization for all layers, embedding and head counted by rows of in_proj."""
    streaming, finishing = (calibration[f"{part}_seconds_a_layer"]["median"] for part in ("streaming", "finishing"))
    calibrate = config.n_layer * (streaming * REAL_POSITIONS / positions + finishing) if calibrates else 0.0
    tables = (1 if config.tied else 2) * config.vocab / (2 * config.d_inner)
    quantize = config.n_layer * row["seconds_a_layer"]["median"] + tables * row["seconds_a_matrix"]["in_proj"]["median"]
    return {"calibrate": calibrate / 60, "quantize": quantize / 60, "both": (calibrate + quantize) / 60}
