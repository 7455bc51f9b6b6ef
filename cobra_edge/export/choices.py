"""What `export --list` prints: every name that an export takes."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..formats.recipe import METHODS, ROTATIONS
from ..formats.scheme import SCHEMES, Scheme
from ..formats.targets import targets
from ..model.backbones import HUB_MODELS
from ..terminal.output import cell

_METHODS = {
    "rtn": "round to nearest; looks at no activations",
    "gptq": "rounds column after column, each making up for the errors before it",
    "awq": "scales what loud inputs meet, then rounds to nearest",
    "awq-gptq": "AWQ's scales, then GPTQ",
}
_ROTATIONS = {
    "none": "nothing is rotated",
    "out-proj": "the input of out_proj",
    "residual": "the residual stream; costs almost nothing at run time",
    "both": "both",
}


def choices() -> dict[str, Any]:
    """Return every name that an export takes, as plain data."""
    return {
        "targets": [
            {
                "name": t.name,
                "family": t.family,
                "default_of": t.default_of,
                "title": t.title,
                "scheme": t.scheme,
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
                "activations": _activations(s),
                "code_format": s.code_format,
            }
            for s in SCHEMES.values()
        ],
        "methods": {name: _METHODS[name] for name in METHODS},
        "rotations": {name: _ROTATIONS[name] for name in ROTATIONS},
        "checkpoints": ["mini", *HUB_MODELS],
    }


def _activations(scheme: Scheme) -> str:
    return "int8" if scheme.activation_bits == 8 else "float32"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def choice_tables() -> list[Table]:
    """Return the same for a terminal."""
    of_targets = _table("--target", "name", "also", "device", "scheme", "vision", "memory")
    for t in targets().values():
        memory = "this machine's" if t.memory_gb is None else f"{t.memory_gb:g} GB"
        also = t.default_of or ""
        of_targets.add_row(*map(cell, (t.name, also, t.title, t.scheme, t.vision_precision, memory)))
    of_schemes = _table("--scheme", "name", "bits a code", "weights a scale", "activations", "codes")
    for s in SCHEMES.values():
        group = "–" if s.group_size is None else "a row" if s.group_size == "row" else str(s.group_size)
        codes = "none" if s.weight_bits == 16 else "bitsandbytes'" if s.code_format != "int" else "ours"
        of_schemes.add_row(*map(cell, (s.name, str(s.weight_bits), group, _activations(s), codes)))
    others = []
    for title, rows in (("--method", _METHODS), ("--rotation", _ROTATIONS)):
        others.append(_table(title, "name", "what it does"))
        for name, says in rows.items():
            others[-1].add_row(cell(name), cell(says))
    sources = _table("--checkpoint", "name", "what it is")
    sources.add_row(cell("mini"), cell("the small model that ships"))
    for name, directory in HUB_MODELS.items():
        sources.add_row(cell(name), cell(f"{directory} of the hub, downloaded"))
    sources.add_row(cell("a directory"), cell("a run directory, or a bare Mamba: docs/checkpoints.md"))
    return [of_targets, of_schemes, *others, sources]
