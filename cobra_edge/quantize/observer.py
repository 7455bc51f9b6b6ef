"""What is gathered at one site while positions stream by: the sum of x xᵀ, and some positions for the histograms."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..formats.hadamard import hadamard_factors, rotate
from .statistics import histogram_of, packed_moment

_CPU = torch.device("cpu")
_SAMPLES = 4096  # positions that histograms are made of, evenly spaced
_COLUMNS_AT_ONCE = 640  # of the second moment; what lies right of its diagonal's blocks is never computed


class Site:
    """One product's input."""

    def __init__(self, name: str, width: int, positions: int, device: torch.device = _CPU) -> None:
        """Begin.

        Args:
            name: what the site's tensors begin with.
            width: inputs of the product.
            positions: how many there will be.
            device: where they are, and where they are summed.
        """
        self.name, self._stride, self._seen = name, -(-positions // _SAMPLES), 0
        self._sum, self._samples = torch.zeros(width, width, device=device), list[Tensor]()

    def add(self, x: Tensor) -> None:
        """Take in the positions x (…, width) float32."""
        x = x.reshape(-1, x.shape[-1]).contiguous()
        for start in range(0, x.shape[1], _COLUMNS_AT_ONCE):
            end = start + _COLUMNS_AT_ONCE
            self._sum[start:end, :end].addmm_(x[:, start:end].T, x[:, :end])
        self._samples.append(x[-self._seen % self._stride :: self._stride].clone())
        self._seen += len(x)

    def tensors(self, weight: np.ndarray | None = None, rotation: str | None = None) -> dict[str, np.ndarray]:
        """Return the site's tensors as `site_tensors` says.

        Args:
            weight: the norm's, that x was taken without, (width,) float32; None where there is no norm.
            rotation: "own" where R is applied to what enters the product, "unit" where to x without the norm's weight; None
                where the site is never rotated.

        Raises:
            InputError: something that is not finite came by.
        """
        moment = self._sum.div_(self._seen).cpu().numpy()
        if not np.isfinite(np.diagonal(moment)).all():
            raise InputError(
                f"{self.name}: its input holds NaN, infinity, or values whose squares overflow float32; the checkpoint is "
                "damaged, or its activations diverge on this data"
            )
        unit = torch.cat(self._samples).cpu().numpy()
        own = unit if weight is None else unit * weight
        model = histogram_of(own)
        rotated = model
        if rotation is not None:
            rotated = _rotated_histogram(own if rotation == "own" else unit, model)
        diagonal, correlation = packed_moment(moment)
        return {
            f"{self.name}.diagonal": diagonal,
            f"{self.name}.correlation": correlation,
            f"{self.name}.peak": np.stack([model[0], rotated[0]]),
            f"{self.name}.histogram": np.stack([model[1], rotated[1]]),
        }


def _rotated_histogram(x: np.ndarray, like: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the histogram of R x, or zeros where the width has no Hadamard matrix."""
    try:
        hadamard_factors(x.shape[1])
    except InputError:
        return np.zeros_like(like[0]), np.zeros_like(like[1])
    return histogram_of(rotate(x))
