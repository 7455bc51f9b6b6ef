"""Weighted second moments of a projection's inputs: H_k = Σ_p w_pk x_p x_pᵀ for groups k of its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS_AT_ONCE = 640  # what lies right of the diagonal's blocks is never computed


def add_products(total: Tensor, x: Tensor) -> None:
    """Add the sum of x xᵀ over positions x (positions, width) float32 to the lower triangle of total (width, width)."""
    for start in range(0, x.shape[1], _COLUMNS_AT_ONCE):
        end = start + _COLUMNS_AT_ONCE
        total[start:end, :end].addmm_(x[:, start:end].T, x[:, :end])


class WeightedMoments:
    """Sums of w x xᵀ for each group of outputs, lower triangle, added up batch by batch."""

    def __init__(self, groups: int, width: int) -> None:
        """Start with zeros for `groups` groups of outputs and `width` inputs."""
        self._sums = torch.zeros(groups, width, width)

    def add(self, x: Tensor, weights: Tensor) -> None:
        """Add positions x (positions, width) float32 with weights (positions, groups) float32, not negative."""
        for group, total in enumerate(self._sums):
            add_products(total, x * weights[:, group, None].sqrt())

    def tensor(self) -> Tensor:
        """Return the moments, (groups, width, width) float32, symmetric."""
        for total in self._sums:
            total.tril_()
            total += total.tril(-1).T
        return self._sums
