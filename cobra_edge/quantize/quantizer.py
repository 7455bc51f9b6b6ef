"""Which method makes a matrix's codes, and what it needs to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..errors import InputError
from ..formats.bitsandbytes_codes import quantize_bitsandbytes
from ..formats.model_config import MambaConfig, decoder_shapes
from ..formats.packing import QuantizedTensor
from ..formats.recipe import Recipe, quantized_scheme
from ..formats.scheme import Scheme
from .awq import input_scales
from .gptq import gptq
from .hessian import stored_second_moment
from .rtn import require_fit, round_to_nearest
from .scales import least_error_scales
from .statistics import Statistics
from .transforms import InputScales, transformed_tensor

EMBEDDING = "backbone.embedding.weight"
_SCALED = ("mixer.in_proj.weight", "mixer.dt_proj.weight")


@dataclass(frozen=True, eq=False)
class Quantizer:
    """Quantizes the tensors of one model by one recipe.

    Attributes:
        config: sizes of the decoder.
        recipe: schemes, rotations, and the method.
        tensor: gives any of the model's own tensors by name, float32, and raises InputError where it is not finite.
        statistics: of this model; None where the method needs none.
        scales: AWQ's, by matrix.
    """

    config: MambaConfig
    recipe: Recipe
    tensor: Callable[[str], np.ndarray]
    statistics: Statistics | None
    scales: InputScales

    def transformed(self, name: str) -> np.ndarray:
        """Return what takes the place of a tensor before it is quantized, float32."""
        return transformed_tensor(name, self.tensor, self.recipe, self.scales)

    def quantize(self, name: str, scheme: Scheme) -> QuantizedTensor:
        """Return a matrix's codes and scales.

        Raises:
            InputError: it does not fit the scheme, or the statistics hold nonsense; it is named. MachineError: a library is
                missing.
        """
        values, moment = self.transformed(name), self._moment(name, scheme)
        try:
            return self._codes(name, values, scheme, moment)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    def _moment(self, name: str, scheme: Scheme) -> np.ndarray | None:
        """Return the second moment of what a stored matrix is multiplied with, or None where none counts."""
        looked_up_only = name == EMBEDDING and not self.config.tied
        if self.statistics is None or scheme.code_format != "int" or looked_up_only:
            return None
        return stored_second_moment(name, self.tensor, self.recipe, self.statistics, self.scales)

    def _codes(self, name: str, values: np.ndarray, scheme: Scheme, moment: np.ndarray | None) -> QuantizedTensor:
        if scheme.code_format != "int":
            return quantize_bitsandbytes(values, scheme)
        require_fit(values, scheme)
        # The table is looked up as well as multiplied with: each of its rows has to stay what it is, so no error is moved.
        if moment is not None and name != EMBEDDING and self.recipe.method.endswith("gptq"):
            return gptq(values, moment, scheme)
        importance = None if moment is None else np.diagonal(moment)
        return round_to_nearest(values, scheme, least_error_scales(values, scheme, importance))


def quantizer(
    config: MambaConfig,
    recipe: Recipe,
    tensor: Callable[[str], np.ndarray],
    statistics: Statistics | None,
    on_matrix: Callable[[], None] = lambda: None,
) -> Quantizer:
    """Return what quantizes a model, AWQ's scales found; on_matrix is called after each of `scaled_matrices`."""
    assert statistics is not None or recipe.method in ("none", "rtn")
    plain = Quantizer(config, recipe, tensor, statistics if recipe.method != "rtn" else None, {})
    scales = {}
    for name, scheme in scaled_matrices(config, recipe).items():
        assert statistics is not None
        moment = stored_second_moment(name, tensor, recipe, statistics)
        scales[name] = input_scales(plain.transformed(name), moment, scheme)
        on_matrix()
    return replace(plain, scales=scales)


def scaled_matrices(config: MambaConfig, recipe: Recipe) -> dict[str, Scheme]:
    """Return the matrices whose inputs get AWQ's scales, with their schemes; none by other methods."""
    if not recipe.method.startswith("awq"):
        return {}
    found = {name: quantized_scheme(recipe, name) for name in decoder_shapes(config) if name.endswith(_SCALED)}
    return {name: scheme for name, scheme in found.items() if scheme is not None and scheme.code_format == "int"}
