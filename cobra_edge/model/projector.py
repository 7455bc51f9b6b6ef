"""Projectors from concatenated patch features to the decoder's width.

Source: Cobra (Zhao et al., AAAI-25), section 3.2; the LDPv2 form is MobileVLM V2 (Chu et al. 2024), section 3.3.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..formats.model_config import ProjectorKind, ldpnet_grid


class _TokenDown(nn.Module):
    """Average-pool a square grid of tokens to the smaller one of `ldpnet_grid`."""

    def forward(self, x: Tensor) -> Tensor:
        batch, n, width = x.shape
        side = round(n**0.5)
        grid = x.transpose(1, 2).reshape(batch, width, side, side)
        return nn.functional.adaptive_avg_pool2d(grid, ldpnet_grid(n)).flatten(2).transpose(1, 2)


class _PositionInject(nn.Module):
    """Add a depthwise 3 × 3 convolution of the grid to the grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width))

    def forward(self, x: Tensor) -> Tensor:
        batch, n, width = x.shape
        side = round(n**0.5)
        grid = x.transpose(1, 2).reshape(batch, width, side, side)
        return (self.peg(grid) + grid).flatten(2).transpose(1, 2)


class Projector(nn.Module):
    """A projector; parameter names are those of the published checkpoints (`projector.0.weight`, …)."""

    def __init__(self, kind: ProjectorKind, feature_dim: int, d_model: int) -> None:
        """Create a projector from feature_dim to d_model."""
        super().__init__()
        wide = 4 * feature_dim
        self.projector: nn.Module
        if kind == "linear":
            self.projector = nn.Linear(feature_dim, d_model)
        elif kind == "gelu-mlp":
            self.projector = nn.Sequential(nn.Linear(feature_dim, d_model), nn.GELU(), nn.Linear(d_model, d_model))
        elif kind == "fused-gelu-mlp":
            self.projector = nn.Sequential(
                nn.Linear(feature_dim, wide),
                nn.GELU(),
                nn.Linear(wide, d_model),
                nn.GELU(),
                nn.Linear(d_model, d_model),
            )
        else:
            self.projector = nn.Sequential(
                nn.Linear(feature_dim, wide),
                nn.GELU(),
                nn.Linear(wide, d_model),
                _TokenDown(),
                _PositionInject(d_model),
            )

    def forward(self, features: Tensor) -> Tensor:
        """Project features (batch, n_patches, feature_dim) to (batch, n_visual_tokens, d_model), both in the weights' dtype."""
        return self.projector(features)
