"""The recipe: how each tensor of the decoder is stored. A bundle's writer follows it and the reader checks it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from ..errors import InputError
from ..terminal.suggestions import near_matches
from .hadamard import hadamard_factors
from .method import NO_METHOD, method_named
from .model_config import MambaConfig, decoder_shapes
from .scheme import SCHEMES, Scheme, scheme_named

FLOAT32 = "float32"
FLOAT16 = "float16"
RESIDUAL, OUT_PROJ = "residual", "out-proj"
# Values of --rotation, and the rotations that each selects.
ROTATIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "out-proj": (OUT_PROJ,),
    "residual": (RESIDUAL,),
    "both": (RESIDUAL, OUT_PROJ),
}
EIGHT_BIT_ROWS = "w8a16-channel"  # of any width: dt_proj, where the scheme does not fit it; costs less than 1e-6 nats
MIXED = "mixed"  # the scheme of a recipe with several schemes
_LAYER = re.compile(r"(?<=backbone\.layers\.)\d+(?=\.)")
_EMBEDDING = "backbone.embedding.weight"
_DT_PROJ = "backbone.layers.*.mixer.dt_proj.weight"
# Matrices. Everything else (norms, convolution, A_log, D, the bias of dt) is small, sensitive, and stays float32.
_MATRICES = (
    _EMBEDDING,
    "backbone.layers.*.mixer.in_proj.weight",
    "backbone.layers.*.mixer.x_proj.weight",
    _DT_PROJ,
    "backbone.layers.*.mixer.out_proj.weight",
    "lm_head.weight",
)


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a decoder was quantized.

    Attributes:
        scheme: the requested scheme, or "mixed".
        method: the quantization method.
        tensors: storage by tensor name, with `*` for any layer: a scheme's name, "float16" or "float32". An exact name takes
            precedence over a pattern; a tensor without an entry is float32.
        statistics: hash of the calibration statistics, or None.
        rotations: rotations by R of `hadamard.rotate`. "out-proj": out_proj's stored weight is W Rᵀ and the runtime rotates its
            input. "residual": the residual stream is rotated; the matrices that read or write it are stored accordingly, norms
            before in_proj are folded into it (their weight is 1 except for AWQ's scales), and the runtime rotates embeddings at
            the input, back before norm_f, and again before the head.
        activations: "float32" or "int8": the runtime's default for the inputs of matmuls.
        activation_percentile: quantized activations are clipped at this percentile of their group's magnitudes in the
            calibration data, stored as NAME.clips; None for no clipping.
    """

    scheme: str
    method: str
    tensors: dict[str, str]
    statistics: str | None = None
    rotations: tuple[Literal["residual", "out-proj"], ...] = ()
    activations: Literal["float32", "int8"] = "float32"
    activation_percentile: float | None = None

    def storage(self, name: str) -> str:
        """Return the tensor's storage: a scheme's name, "float16" or "float32"."""
        return self.tensors.get(name) or self.tensors.get(_pattern(name)) or FLOAT32

    @property
    def rotates_residual(self) -> bool:
        """Whether the residual stream is rotated."""
        return RESIDUAL in self.rotations

    @property
    def rotates_out_proj(self) -> bool:
        """Whether out_proj's input is rotated."""
        return OUT_PROJ in self.rotations


@dataclass(frozen=True)
class StoredTensor:
    """One entry of decoder.safetensors: its name, numpy's name of its dtype, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size of its values in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def uniform_recipe(
    config: MambaConfig, scheme: Scheme, method: str = "rtn", rotations: tuple[str, ...] = ()
) -> tuple[Recipe, dict[str, str]]:
    """Return the recipe that stores every matrix in one scheme, and why some matrices stay float16.

    Args:
        config: sizes of the decoder.
        scheme: the requested scheme.
        method: the quantization method; "none" is recorded for a scheme without codes of our own format.
        rotations: see `Recipe`.

    Raises:
        InputError: an unknown method, a scheme that fits no matrix, or a width to be rotated that has no Hadamard matrix.
    """
    method_named(method)
    require_hadamard(config, rotations)
    shapes = decoder_shapes(config)
    tensors, kept = {}, {}
    for pattern in _MATRICES:
        shape = shapes.get(pattern.replace("*", "0"))
        if shape is None:
            continue
        reason = _keeps_float(pattern, shape[1], scheme)
        if pattern == _DT_PROJ and reason and scheme.weight_bits != 16 and scheme.code_format == "int":
            tensors[pattern] = EIGHT_BIT_ROWS
            continue
        tensors[pattern] = FLOAT16 if scheme.weight_bits == 16 or reason else scheme.name
        if reason:
            kept[pattern] = reason
    if scheme.weight_bits != 16 and scheme.name not in tensors.values():
        raise InputError(f"scheme {scheme.name} fits no matrix of this model: {next(iter(kept.values()))}")
    recipe = Recipe(
        scheme.name,
        method if scheme.weight_bits != 16 and scheme.code_format == "int" else NO_METHOD.name,
        tensors,
        rotations=rotations,  # type: ignore[arg-type] # checked above
        activations=activations_of(scheme),
    )
    return recipe, kept


def activations_of(scheme: Scheme) -> Literal["float32", "int8"]:
    """Return the activations that a scheme's name includes."""
    return "int8" if scheme.activation_bits == 8 else "float32"


def require_hadamard(config: MambaConfig, rotations: tuple[str, ...]) -> None:
    """Raise InputError for an unknown rotation, or one of a width that has no Hadamard matrix."""
    widths = {RESIDUAL: ("the residual stream", config.d_model), OUT_PROJ: ("out_proj's input", config.d_inner)}
    for rotation in rotations:
        if rotation not in widths:
            raise InputError(f"unknown rotation {rotation!r}{near_matches(rotation, widths)}")
        what, width = widths[rotation]
        try:
            hadamard_factors(width)
        except InputError as error:
            raise InputError(f"{what} cannot be rotated: {error}; export without that rotation") from error


def stored_tensors(config: MambaConfig, recipe: Recipe) -> dict[str, list[StoredTensor]]:
    """Return the entries of decoder.safetensors for each tensor of the decoder, in file order.

    Raises:
        InputError: the recipe names an unknown storage, a scheme that does not fit the tensor, or an impossible rotation.
    """
    require_hadamard(config, recipe.rotations)
    return {name: _stored(config, recipe, name, shape) for name, shape in decoder_shapes(config).items()}


def _stored(config: MambaConfig, recipe: Recipe, name: str, shape: tuple[int, ...]) -> list[StoredTensor]:
    storage = recipe.storage(name)
    if storage in (FLOAT16, FLOAT32):
        return [StoredTensor(name, storage, shape)]
    scheme = scheme_named(storage)
    if scheme.group_size is None or len(shape) != 2 or scheme.refuses(shape[1]):
        raise InputError(f"recipe: {name} of shape {shape} cannot be stored as {storage}")
    out, n_in = shape
    groups = n_in // scheme.group(n_in)
    entries = [
        StoredTensor(f"{name}.codes", scheme.code_dtype, (out, n_in * scheme.weight_bits // 8)),
        StoredTensor(f"{name}.scales", scheme.scale_dtype, (out, groups)),
    ]
    if has_clips(config, recipe, name):
        entries.append(StoredTensor(f"{name}.clips", "float32", (groups,)))
    return entries


def has_clips(config: MambaConfig, recipe: Recipe, name: str) -> bool:
    """Return whether clips are stored with a quantized matrix."""
    # An embedding that is not also the head is only looked up, never multiplied.
    multiplied = config.tied or name != _EMBEDDING
    scheme = quantized_scheme(recipe, name)
    return recipe.activation_percentile is not None and multiplied and scheme is not None and scheme.code_format == "int"


def matrix_names(config: MambaConfig) -> list[str]:
    """Return the names of the decoder's matrices, in file order; a tied head is not listed separately."""
    return [name for name in decoder_shapes(config) if _pattern(name) in _MATRICES]


def matrix_bits(config: MambaConfig, recipe: Recipe) -> dict[str, int]:
    """Return the bits that each matrix takes in the file: codes, scales and clips, or float values.

    Raises:
        InputError: the recipe names an unknown storage, or a scheme that does not fit the matrix.
    """
    shapes = decoder_shapes(config)
    return {n: 8 * sum(e.n_bytes for e in _stored(config, recipe, n, shapes[n])) for n in matrix_names(config)}


def matrix_weights(config: MambaConfig) -> int:
    """Return the number of weights in all matrices: the denominator of bits per weight."""
    shapes = decoder_shapes(config)
    return sum(math.prod(shapes[name]) for name in matrix_names(config))


def storages(config: MambaConfig, name: str, schemes: Iterable[str]) -> list[str]:
    """Return the schemes that fit a matrix, in the given order, then always "float16"."""
    n_in = decoder_shapes(config)[name][1]
    return [s for s in schemes if _keeps_float(_pattern(name), n_in, scheme_named(s)) is None] + [FLOAT16]


def _pattern(name: str) -> str:
    return _LAYER.sub("*", name)


def _keeps_float(pattern: str, n_in: int, scheme: Scheme) -> str | None:
    """Return why a matrix that matches the pattern stays float16, or None if it does not."""
    if pattern == _DT_PROJ and scheme.weight_bits < 8:
        return "it controls the decay of the recurrent state, and is small: 8 bits or float"
    return scheme.refuses(n_in)


def quantized_scheme(recipe: Recipe, name: str) -> Scheme | None:
    """Return the scheme a tensor is quantized with, or None if it stays float."""
    return SCHEMES.get(recipe.storage(name))
