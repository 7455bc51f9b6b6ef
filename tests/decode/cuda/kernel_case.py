"""Where a kernel under test writes: poisoned first, with a guard on both sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

GUARD = 64


@dataclass(frozen=True, eq=False)
class Guarded:
    """A tensor inside a larger one that is all NaN."""

    around: torch.Tensor
    tensor: torch.Tensor

    def checked(self) -> np.ndarray:
        """Return what was written; fails where something was written outside."""
        assert self.around[:GUARD].isnan().all() and self.around[-GUARD:].isnan().all(), "written outside of the output"
        return self.tensor.numpy()


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> Guarded:
    """Return an output of this shape, full of NaN."""
    size = int(np.prod(shape))
    around = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype)
    return Guarded(around, around[GUARD : GUARD + size].view(shape))
