"""Output of `export --list`: every name that the options of an export accept."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..formats.method import METHODS
from ..formats.quality import QUALITIES
from ..formats.recipe import ROTATIONS, activations_of
from ..formats.scheme import SCHEMES
from ..formats.targets import targets
from ..model.backbones import HUB_MODELS
from ..terminal.output import cell

_ROTATIONS = {
    "none": "no rotation",
    "out-proj": "the input of out_proj",
    "residual": "the residual stream; nearly free at run time",
    "both": "the residual stream and the input of out_proj",
}


def choices() -> dict[str, Any]:
    """Return every name that an export accepts, as plain data."""
    return {
        "targets": [
            {
                "name": t.name,
                "family": t.family,
                "default_of": t.default_of,
                "title": t.title,
                "scheme": t.scheme,
                "bits": t.bits,
                "vision_precision": t.vision_precision,
                "vision_runtime": t.vision_runtime,
                "decoder_runtime": t.decoder_runtime,
                "memory_gb": t.memory_gb,
            }
            for t in targets().values()
        ],
        "schemes": [
            {
                "name": s.name,
                "weight_bits": s.weight_bits,
                "group_size": s.group_size,
                "activations": activations_of(s),
                "code_format": s.code_format,
            }
            for s in SCHEMES.values()
        ],
        "qualities": {q.name: q.title for q in QUALITIES.values()},
        "methods": {m.name: m.title for m in METHODS.values()},
        "rotations": {name: _ROTATIONS[name] for name in ROTATIONS},
        "checkpoints": ["mini", *HUB_MODELS],
    }


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def choice_tables() -> list[Table]:
    """Return the same as tables for a terminal."""
    of_targets = _table("--target", "name", "also", "device", "bits", "scheme", "vision", "memory")
    for t in targets().values():
        memory = "this machine's" if t.memory_gb is None else f"{t.memory_gb:g} GB"
        also = t.default_of or ""
        of_targets.add_row(*map(cell, (t.name, also, t.title, f"{t.bits:g}", t.scheme, t.vision_precision, memory)))
    of_schemes = _table("--scheme", "name", "bits per code", "weights per scale", "activations", "codes")
    for s in SCHEMES.values():
        group = "–" if s.group_size is None else "row" if s.group_size == "row" else str(s.group_size)
        codes = "none" if s.weight_bits == 16 else "bitsandbytes" if s.code_format != "int" else "cobra_edge"
        of_schemes.add_row(*map(cell, (s.name, str(s.weight_bits), group, activations_of(s), codes)))
    others = []
    named = {
        "--quality": {q.name: q.title for q in QUALITIES.values()},
        "--method": {m.name: m.title for m in METHODS.values()},
    }
    for title, rows in (*named.items(), ("--rotation", _ROTATIONS)):
        others.append(_table(title, "name", "description"))
        for name, description in rows.items():
            others[-1].add_row(cell(name), cell(description))
    sources = _table("--checkpoint", "name", "description")
    sources.add_row(cell("mini"), cell("cobra-mini, the small model that is included"))
    for name, directory in HUB_MODELS.items():
        sources.add_row(cell(name), cell(f"{directory}, downloaded from the hub"))
    sources.add_row(cell("a directory"), cell("a run directory, or a text-only Mamba: docs/checkpoints.md"))
    return [of_targets, of_schemes, *others, sources]
