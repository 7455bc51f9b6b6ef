"""Quantize a decoder's tensors by a recipe: transforms, then the codes of its method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..errors import InputError
from ..formats.bitsandbytes_codes import quantize_bitsandbytes
from ..formats.method import recipe_method
from ..formats.model_config import MambaConfig, decoder_shapes
from ..formats.packing import QuantizedTensor
from ..formats.recipe import Recipe, quantized_scheme
from ..formats.scheme import Scheme
from .awq import input_scales
from .gptq import DAMPING, EMBEDDING_DAMPING, gptq
from .hessian import stored_second_moment
from .rtn import require_fit, round_to_nearest
from .scales import least_error_scales
from .statistics import Statistics, projection_of
from .transforms import InputScales, transformed_tensor

EMBEDDING = "backbone.embedding.weight"
_SCALED = {"in_proj", "dt_proj"}  # projections whose inputs AWQ can scale


@dataclass(frozen=True, eq=False)
class Quantizer:
    """Quantizes the tensors of one model by one recipe.

    Attributes:
        config: sizes of the decoder.
        recipe: schemes, rotations and the method.
        tensor: returns any tensor of the model by name, float32; raises InputError if it is not finite.
        statistics: of this model; None if the method needs none.
        scales: AWQ's, (in,) float32 by matrix.
    """

    config: MambaConfig
    recipe: Recipe
    tensor: Callable[[str], np.ndarray]
    statistics: Statistics | None
    scales: InputScales

    def transformed(self, name: str) -> np.ndarray:
        """Return a tensor's values before quantization, float32, of its shape."""
        return transformed_tensor(name, self.tensor, self.recipe, self.scales)

    def quantize(self, name: str, scheme: Scheme) -> QuantizedTensor:
        """Return a matrix (out, in) as codes and scales.

        Raises:
            InputError: the matrix does not fit the scheme, the statistics hold invalid values, or the method quantizes whole
                models only; the message names it.
            MachineError: a library is missing.
        """
        if recipe_method(self.recipe.method).needs_gradients:
            raise InputError(
                f"{name}: method {self.recipe.method} needs gradients and the matrices before; export the model by it"
            )
        values, hessian = self.transformed(name), self._hessian(name, scheme)
        try:
            return self._codes(name, values, scheme, hessian)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    def _hessian(self, name: str, scheme: Scheme) -> np.ndarray | None:
        """Return the second moment of a stored matrix's inputs, (in, in) float32, or None if the method uses none."""
        looked_up_only = name == EMBEDDING and not self.config.tied
        if self.statistics is None or scheme.code_format != "int" or looked_up_only:
            return None
        return stored_second_moment(name, self.tensor, self.recipe, self.statistics, self.scales)

    def _codes(self, name: str, values: np.ndarray, scheme: Scheme, hessian: np.ndarray | None) -> QuantizedTensor:
        if scheme.code_format != "int":
            return quantize_bitsandbytes(values, scheme)
        require_fit(values, scheme)
        if hessian is not None and recipe_method(self.recipe.method).compensates:
            return gptq(values, hessian, scheme, EMBEDDING_DAMPING if name == EMBEDDING else DAMPING)
        importance = None if hessian is None else np.diagonal(hessian)
        return round_to_nearest(values, scheme, least_error_scales(values, scheme, importance))


def quantizer(
    config: MambaConfig,
    recipe: Recipe,
    tensor: Callable[[str], np.ndarray],
    statistics: Statistics | None,
    on_matrix: Callable[[], None] = lambda: None,
) -> Quantizer:
    """Return the quantizer of a model, with AWQ's scales searched.

    Args:
        config: sizes of the decoder.
        recipe: schemes, rotations and the method.
        tensor: returns any tensor of the model by name, float32, matrices as (out, in); raises InputError if it is not finite.
        statistics: of this model; required by methods that need them.
        on_matrix: called after each of `scaled_matrices`.

    Raises:
        InputError: the statistics hold invalid values, or a matrix does not fit its scheme.
    """
    method = recipe_method(recipe.method)
    assert statistics is not None or not method.needs_statistics
    plain = Quantizer(config, recipe, tensor, statistics if method.needs_statistics else None, {})
    scales = {}
    for name, scheme in scaled_matrices(config, recipe).items():
        assert statistics is not None
        hessian = stored_second_moment(name, tensor, recipe, statistics)
        scales[name] = input_scales(plain.transformed(name), hessian, scheme)
        on_matrix()
    return replace(plain, scales=scales)


def scaled_matrices(config: MambaConfig, recipe: Recipe) -> dict[str, Scheme]:
    """Return the matrices whose inputs are scaled, with their schemes; none if the method does not scale inputs."""
    if not recipe_method(recipe.method).scales_inputs:
        return {}
    kinds = {name: projection_of(name) for name in decoder_shapes(config)}
    found = {name: quantized_scheme(recipe, name) for name, kind in kinds.items() if kind is not None and kind[1] in _SCALED}
    return {name: scheme for name, scheme in found.items() if scheme is not None and scheme.code_format == "int"}
