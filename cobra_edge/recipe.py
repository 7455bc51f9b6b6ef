"""Which tensor of the decoder is stored how: the plan that a bundle's writer follows and its reader checks."""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

from .errors import InputError
from .model.config import MambaConfig, decoder_shapes
from .scheme import SCHEMES, Scheme, scheme_named

FLOAT32 = "float32"
FLOAT16 = "float16"
_LAYER = re.compile(r"(?<=backbone\.layers\.)\d+(?=\.)")
# Matrices; everything else (norms, convolution, A_log, D, the bias of dt) is small, sensitive, and stays float32.
_MATRICES = (
    "backbone.embedding.weight",
    "backbone.layers.*.mixer.in_proj.weight",
    "backbone.layers.*.mixer.x_proj.weight",
    "backbone.layers.*.mixer.dt_proj.weight",
    "backbone.layers.*.mixer.out_proj.weight",
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
    """

    scheme: str
    method: str
    tensors: dict[str, str]
    statistics: str | None = None

    def storage(self, name: str) -> str:
        """Return how the tensor is stored."""
        return self.tensors.get(name) or self.tensors.get(_LAYER.sub("*", name)) or FLOAT32


@dataclass(frozen=True)
class StoredTensor:
    """One entry of decoder.safetensors: its name, dtype as numpy calls it, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def round_to_nearest_recipe(config: MambaConfig, scheme: Scheme) -> tuple[Recipe, dict[str, str]]:
    """Return the recipe that stores every matrix by the scheme, and why some stay float16.

    Raises:
        InputError: the scheme fits no matrix at all.
    """
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
    return Recipe(scheme.name, "rtn" if scheme.weight_bits != 16 else "none", tensors), kept


def stored_tensors(config: MambaConfig, recipe: Recipe) -> dict[str, list[StoredTensor]]:
    """Return what decoder.safetensors holds for each tensor of the decoder, in file order.

    Raises:
        InputError: the recipe names an unknown storage or a scheme that does not fit the tensor.
    """
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
