"""Observer of one projection's input x: accumulates the sum of x xᵀ and samples positions for the histograms."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..formats.hadamard import hadamard_factors, rotate
from .moments import add_products
from .statistics import histogram_of, pack_second_moment

_CPU = torch.device("cpu")
_SAMPLES = 4096  # positions in the histograms at most, evenly spaced


class Observer:
    """Accumulates statistics of one projection's input."""

    def __init__(self, name: str, width: int, positions: int, device: torch.device = _CPU) -> None:
        """Start with no positions.

        Args:
            name: prefix of the projection's tensors.
            width: number of inputs.
            positions: how many will be added in total.
            device: where they are, and where they are summed.
        """
        self.name, self._stride, self._seen = name, -(-positions // _SAMPLES), 0
        self._sum, self._samples = torch.zeros(width, width, device=device), list[Tensor]()

    def add(self, x: Tensor) -> None:
        """Add positions x (…, width) float32."""
        x = x.reshape(-1, x.shape[-1]).contiguous()
        add_products(self._sum, x)
        self._samples.append(x[-self._seen % self._stride :: self._stride].clone())
        self._seen += len(x)

    def tensors(self, weight: np.ndarray | None = None, rotation: str | None = None) -> dict[str, np.ndarray]:
        """Return the projection's tensors as `projection_tensors` lists them.

        Args:
            weight: of the norm, (width,) float32, if x was observed without it; None if there is no norm.
            rotation: "own" if R is applied to the projection's input, "unit" if to x without the norm's weight; None if
                the projection is never rotated.

        Raises:
            InputError: an input was not finite.
        """
        second_moment = self._sum.div_(self._seen).cpu().numpy()
        if not np.isfinite(np.diagonal(second_moment)).all():
            raise InputError(
                f"{self.name}: its input contains NaN, infinity, or values whose squares overflow float32; the checkpoint is "
                "damaged, or its activations diverge on this data"
            )
        unit = torch.cat(self._samples).cpu().numpy()
        own = unit if weight is None else unit * weight
        model = histogram_of(own)
        rotated = model
        if rotation is not None:
            rotated = _rotated_histogram(own if rotation == "own" else unit, model)
        diagonal, correlation = pack_second_moment(second_moment)
        return {
            f"{self.name}.diagonal": diagonal,
            f"{self.name}.correlation": correlation,
            f"{self.name}.peak": np.stack([model[0], rotated[0]]),
            f"{self.name}.histogram": np.stack([model[1], rotated[1]]),
        }


def _rotated_histogram(x: np.ndarray, like: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the histogram of R x for x (positions, n) float32; zeros if the width has no Hadamard matrix."""
    try:
        hadamard_factors(x.shape[1])
    except InputError:
        return np.zeros_like(like[0]), np.zeros_like(like[1])
    return histogram_of(rotate(x))
