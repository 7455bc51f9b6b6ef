"""Which tensor of the decoder is stored how: the plan that a bundle's writer follows and its reader checks."""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

from .errors import InputError
from .hadamard import hadamard_factors
from .model.config import MambaConfig, decoder_shapes
from .scheme import SCHEMES, Scheme, scheme_named

FLOAT32 = "float32"
FLOAT16 = "float16"
ROTATIONS = ("none", "out-proj")
_LAYER = re.compile(r"(?<=backbone\.layers\.)\d+(?=\.)")
_OUT_PROJ = "backbone.layers.*.mixer.out_proj.weight"
# Matrices; everything else (norms, convolution, A_log, D, the bias of dt) is small, sensitive, and stays float32.
_MATRICES = (
    "backbone.embedding.weight",
    "backbone.layers.*.mixer.in_proj.weight",
    "backbone.layers.*.mixer.x_proj.weight",
    "backbone.layers.*.mixer.dt_proj.weight",
    _OUT_PROJ,
    "lm_head.weight",
)


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a decoder was quantized.

    Attributes:
        scheme: the scheme that was asked for.
        method: how codes were chosen.
        tensors: storage by tensor name, `*` standing for any layer: a scheme's name, "float16" or "float32". An exact
            name goes before a pattern; a tensor without an entry is float32.
        statistics: hash of the calibration statistics that were used, or None.
        online_hadamard: out_proj's stored weight is W Rᵀ, R as `hadamard.rotate` says, and a runtime rotates out_proj's input.
    """

    scheme: str
    method: str
    tensors: dict[str, str]
    statistics: str | None = None
    online_hadamard: bool = False

    def storage(self, name: str) -> str:
        """Return how the tensor is stored."""
        return self.tensors.get(name) or self.tensors.get(_LAYER.sub("*", name)) or FLOAT32

    def rotates(self, name: str) -> bool:
        """Say whether the rows of the tensor are rotated before they are stored."""
        return self.online_hadamard and _LAYER.sub("*", name) == _OUT_PROJ


@dataclass(frozen=True)
class StoredTensor:
    """One entry of decoder.safetensors: its name, dtype as numpy calls it, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def round_to_nearest_recipe(
    config: MambaConfig, scheme: Scheme, *, online_hadamard: bool = False
) -> tuple[Recipe, dict[str, str]]:
    """Return the recipe that stores every matrix by the scheme, and why some stay float16.

    Args:
        config: sizes of the decoder.
        scheme: what was asked for.
        online_hadamard: store out_proj rotated, and have its input rotated at run time.

    Raises:
        InputError: the scheme fits no matrix at all, or d_inner has no Hadamard matrix.
    """
    if online_hadamard:
        _require_hadamard(config)
    shapes = decoder_shapes(config)
    tensors, kept = {}, {}
    for pattern in _MATRICES:
        shape = shapes.get(pattern.replace("*", "0"))
        if shape is None:
            continue
        reason = scheme.refuses(shape[1])
        if scheme.weight_bits == 16 or reason:
            tensors[pattern] = FLOAT16
        else:
            tensors[pattern] = scheme.name
        if reason:
            kept[pattern] = reason
    if scheme.weight_bits != 16 and len(kept) == len(tensors):
        raise InputError(f"scheme {scheme.name} fits no matrix of this model: {next(iter(kept.values()))}")
    method = "rtn" if scheme.weight_bits != 16 else "none"
    return Recipe(scheme.name, method, tensors, online_hadamard=online_hadamard), kept


def _require_hadamard(config: MambaConfig) -> None:
    try:
        hadamard_factors(config.d_inner)
    except InputError as error:
        raise InputError(f"out_proj's input cannot be rotated: {error}; store this model without the rotation") from error


def stored_tensors(config: MambaConfig, recipe: Recipe) -> dict[str, list[StoredTensor]]:
    """Return what decoder.safetensors holds for each tensor of the decoder, in file order.

    Raises:
        InputError: the recipe names an unknown storage, a scheme that does not fit the tensor, or a rotation that cannot be.
    """
    if recipe.online_hadamard:
        _require_hadamard(config)
    plan = {}
    for name, shape in decoder_shapes(config).items():
        storage = recipe.storage(name)
        if storage in (FLOAT16, FLOAT32):
            plan[name] = [StoredTensor(name, storage, shape)]
            continue
        scheme = scheme_named(storage)
        if scheme.group_size is None or len(shape) != 2 or scheme.refuses(shape[1]):
            raise InputError(f"recipe: {name} of shape {shape} cannot be stored as {storage}")
        out, n_in = shape
        plan[name] = [
            StoredTensor(f"{name}.codes", "uint8", (out, n_in * scheme.weight_bits // 8)),
            StoredTensor(f"{name}.scales", "float16", (out, n_in // scheme.group_size)),
        ]
    return plan


def quantized_scheme(recipe: Recipe, name: str) -> Scheme | None:
    """Return the scheme a tensor is quantized by, or None where it stays float."""
    return SCHEMES.get(recipe.storage(name))
