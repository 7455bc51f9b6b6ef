"""Expected cost of storing a matrix by a scheme, in nats, before any code is chosen.

GPTQ rounds column by column, and the columns that follow compensate: with the Cholesky factor U of the inverse of H + λ I, the
rounding error e_j of column j becomes the error e_j U_j / U_jj of the whole row, which costs ½ e_j² (1 - λ |U_j|²) / U_jj²
under H. A rounding error is nearly uniform on one step s: its mean square is s² / 12. Only the scales depend on the scheme; one
factorization serves all of them. Source: Frantar et al. 2023, section 3.3, whose error this sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import InputError
from ..formats.scheme import SCHEMES
from .gptq import DAMPING, inverse_factor
from .scales import least_error_scales

ROWS_LOOKED_AT = 2048  # of a larger matrix, evenly spaced: a sum over them is that of all rows to some per cent


def unexplained(second_moment: torch.Tensor, damping: float = DAMPING) -> np.ndarray:
    """Return the variance of each input that is left when the inputs after it are known, in GPTQ's order.

    Args:
        second_moment: (in, in) float32, symmetric.
        damping: share of the mean diagonal that GPTQ adds.

    Returns:
        (in,) float32, in the inputs' own order.
    """
    diagonal = second_moment.diagonal().numpy()
    found = np.zeros_like(diagonal)
    if diagonal.max() <= 0:  # outputs without any gradient
        return found
    order = np.argsort(-diagonal, kind="stable")
    factor = inverse_factor(second_moment.numpy()[np.ix_(order, order)], damping).numpy()
    added = damping * diagonal.mean()
    found[order] = (1 - added * np.square(factor).sum(1)).clip(0) / np.square(np.diagonal(factor))
    return found


def expected_costs(
    weight: np.ndarray, variances: np.ndarray, schemes: Sequence[str], row_weights: np.ndarray | None = None
) -> dict[str, float]:
    """Return the expected cost of each scheme, in the unit of the variances.

    Args:
        weight: (out, in) float32, as stored.
        variances: (groups, in) float32, of `unexplained`; groups of consecutive rows.
        schemes: names; a storage without codes costs nothing.
        row_weights: (out,) float32, how much the errors of each row count, on average 1; None counts all alike.

    Raises:
        InputError: no scale of a scheme fits float16.
    """
    found, every = {}, max(1, len(weight) // ROWS_LOOKED_AT)
    rows_seen = None if row_weights is None else row_weights[::every]
    for name in schemes:
        scheme = SCHEMES.get(name)
        if scheme is None or scheme.group_size is None:
            found[name] = 0.0
            continue
        try:
            scales = least_error_scales(weight[::every], scheme).astype(np.float64)
        except InputError:  # does not fit this scheme; another one may
            continue
        by_group = variances.reshape(len(variances), scales.shape[1], -1).sum(-1, dtype=np.float64)
        squares = np.square(scales) if rows_seen is None else np.square(scales) * rows_seen[:, None]
        rows = np.stack([part.sum(0) for part in np.array_split(squares, len(variances))])
        found[name] = float((rows * by_group).sum() / 24 * (len(weight) / len(scales)))
    return found
