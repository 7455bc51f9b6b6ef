"""Quality of an export: its method, rotation and bit allocation unless flags say otherwise; one row of `QUALITIES` for each."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from ..terminal.suggestions import near_matches


@dataclass(frozen=True)
class Quality:
    """One row.

    Attributes:
        name: as on the command line.
        title: what it does, for `export --list`.
        method: a name of `method.METHODS`.
        rotation: a name of `recipe.ROTATIONS`.
        allocates: whether each matrix gets the scheme that serves best within the target's bits per weight; otherwise every
            matrix is stored in the target's scheme.
    """

    name: str
    title: str
    method: str
    rotation: str
    allocates: bool = False


QUALITIES: dict[str, Quality] = {
    q.name: q
    for q in (
        Quality("best", "guided by gradients, out_proj rotated, bits allocated: the least drift", "guided", "out-proj", True),
        Quality("balanced", "GPTQ, out_proj rotated, the target's scheme: no gradients", "gptq", "out-proj"),
        Quality("fast", "each weight rounded to nearest, the target's scheme: no calibration of the decoder", "rtn", "none"),
    )
}
DEFAULT_QUALITY = "best"


def quality_named(name: str) -> Quality:
    """Return a row of the table. Raises InputError with near matches."""
    if name not in QUALITIES:
        raise InputError(f"unknown quality {name!r}{near_matches(name, QUALITIES)}")
    return QUALITIES[name]
