"""Fisher information of the model's own predictions, by random signs.

For logits with probabilities p, the Hessian of KL(p ‖ ·) is diag(p) - p pᵀ. A random vector v with E[v vᵀ] equal to that
matrix, propagated backward, gives gradients whose squares estimate the diagonal of the Hessian at every product of the model.
Signs s through its factor, √p ⊙ s - p (√p · s), give such a v without drawing rare tokens: less variance than sampled labels.
Source: Hutchinson 1990 (random signs); GuidedQuant (Kim et al., ICML 2025) for weighing a layer's error by squared gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fisher_rows(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return v (positions, vocab) float32 with E[v vᵀ] = diag(p) - p pᵀ for p = softmax(logits).

    Args:
        logits: (positions, vocab) float32.
        generator: of the signs, on the CPU.
    """
    root = logits.softmax(-1).sqrt_()
    signs = torch.randint(0, 2, root.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1).to(root.device)
    v = root * signs
    return v - root.square_() * v.sum(-1, keepdim=True)
