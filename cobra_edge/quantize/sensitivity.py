"""Sensitivity: KLD of the model with a single matrix quantized, by matrix and scheme.

`python -m cobra_edge.sensitivity` writes the JSON file, `export --bits` reads it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from ..errors import InputError
from ..files.parsing import ParseError, parse_json
from ..formats.model_config import MambaConfig
from ..formats.recipe import MIXED, Recipe, matrix_names, storages

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
# Schemes of a mixed-precision recipe, besides float16. Activations are a property of the whole recipe.
CANDIDATE_SCHEMES = ("w3a16-g64", "w4a16-g128", "w4a16-g64", "w4a16-g32", "w8a16-g128", "w8a16-channel")

# Mean KLD (nats) by matrix and storage.
Table = dict[str, dict[str, float]]


class Sensitivity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Result of a scan, and what it applies to.

    Attributes:
        schema_version: of the file.
        cobra_edge: version that wrote it.
        model_id: of the model, for messages.
        model_sha256: of the checkpoint, as `Checkpoint.sha256` says.
        method, rotations, activations, activation_percentile: as in `Recipe`.
        lines: number of lines.
        positions: answer tokens that KLD is averaged over.
        kld: mean KLD from the float model in nats, by matrix and storage, with every other matrix float32.
    """

    schema_version: int
    cobra_edge: str
    model_id: str
    model_sha256: str
    method: str
    rotations: tuple[str, ...]
    activations: Literal["float32", "int8"]
    activation_percentile: float | None
    lines: int
    positions: int
    kld: Table


def candidates(config: MambaConfig) -> dict[str, list[str]]:
    """Return the storages that a scan measures, by matrix; one scale per row only if no other 8-bit scheme fits."""
    found = {}
    for name in matrix_names(config):
        fits = storages(config, name, CANDIDATE_SCHEMES)
        found[name] = [s for s in fits if s != "w8a16-channel" or "w8a16-g128" not in fits]
    return found


def passes(config: MambaConfig) -> int:
    """Return how many times a scan runs the model over all lines, without the float reference."""
    return sum(len(fits) for fits in candidates(config).values())


def scan(
    config: MambaConfig, recipe: Recipe, measure: Callable[[Recipe], float], on_pass: Callable[[], None] = lambda: None
) -> Table:
    """Quantize each matrix alone by each scheme that fits it, and measure the KLD.

    Args:
        config: sizes of the decoder.
        recipe: method, rotations and activations; its tensors are ignored.
        measure: returns the mean KLD (nats) of a recipe from the float model; matrices that it does not name are float32.
        on_pass: called after each measurement.

    Returns:
        Mean KLD by matrix and storage, without storages that make answers non-finite.

    Raises:
        InputError: a matrix makes answers non-finite in every storage; and what `measure` raises.
    """
    table: Table = {}
    for name, fits in candidates(config).items():
        table[name] = {}
        for storage in fits:
            kld = measure(of_tensors(recipe, {name: storage}))
            if math.isfinite(kld):
                table[name][storage] = kld
            else:
                log.warning("%s as %s: answers are not finite; left out", name, storage)
            on_pass()
        if not table[name]:
            raise InputError(f"{name}: answers are not finite in any storage of this matrix; the checkpoint overflows")
    return table


def of_tensors(recipe: Recipe, tensors: dict[str, str]) -> Recipe:
    """Return the recipe with these storages by matrix, as a mixed-precision recipe."""
    return msgspec.structs.replace(recipe, scheme=MIXED, tensors=tensors)


def write_sensitivity(found: Sensitivity, file: Path) -> None:
    """Write the file. Raises OSError."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


def read_sensitivity(file: Path, config: MambaConfig, model_sha256: str, recipe: Recipe) -> Sensitivity:
    """Read a file written by `write_sensitivity`.

    Args:
        file: JSON.
        config: of the model to quantize.
        model_sha256: that model's hash.
        recipe: with the method, rotations and activations to quantize with.

    Raises:
        InputError: unreadable, of another model or other options, or without a KLD for each matrix.
    """
    try:
        found = parse_json(file.read_bytes(), Sensitivity)
    except (OSError, ParseError) as error:
        raise InputError(f"{file}: {error}; expected what `python -m cobra_edge.sensitivity --out {file}` writes") from error
    if found.schema_version != SCHEMA_VERSION:
        raise InputError(f"{file}: schema version {found.schema_version}, expected {SCHEMA_VERSION}; scan again")
    if found.model_sha256 != model_sha256:
        raise InputError(
            f"{file}: sensitivities of another model: {found.model_id} ({found.model_sha256[:12]}…), expected "
            f"{model_sha256[:12]}…; scan this checkpoint"
        )
    for choice in ("method", "rotations", "activations", "activation_percentile"):
        got, expected = getattr(found, choice), getattr(recipe, choice)
        if got != expected:
            raise InputError(
                f"{file}: scanned with {choice} {got!r}, this export has {expected!r}; scan again or use the same option"
            )
    expected_names, fits = matrix_names(config), candidates(config)
    if sorted(found.kld) != sorted(expected_names):
        raise InputError(f"{file}: has {len(found.kld)} matrices, not the {len(expected_names)} of this model; scan again")
    for name, row in found.kld.items():
        if not row or not set(row) <= set(fits[name]) or not all(math.isfinite(v) and v >= 0 for v in row.values()):
            raise InputError(f"{file}: {name} has no KLDs, negative ones, or schemes that do not fit; scan again")
    return found
