"""The complete Cobra in plain torch: visual embeddings before the text, one decoder over both.

Source: Cobra (Zhao et al., AAAI-25), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .mamba import REFERENCE, Block, Operations
from .projector import Projector
from .vision import load_tower
from .weight_files import require_finite


class VisionModel(nn.Module):
    """Vision tower and projector: what becomes one ONNX graph."""

    def __init__(self, tower: nn.Module, projector: Projector) -> None:
        """Combine tower and projector."""
        super().__init__()
        self.tower, self.projector = tower, projector

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn pixels (batch, 3·n_encoders, size, size) into embeddings (batch, n_visual_tokens, d_model), both float32."""
        return self.projector(self.tower(pixels))


def load_vision(checkpoint: Checkpoint) -> VisionModel:
    """Load tower and projector in float32. Raises what `load_tower` raises."""
    config = checkpoint.config
    assert config.vision is not None and config.projector is not None
    with torch.device("meta"):
        projector = Projector(config.projector, config.vision.feature_dim, config.mamba.d_model)
    copied = {k: require_finite(k, v).to(torch.float32, copy=True) for k, v in checkpoint.projector.items()}
    projector.load_state_dict(copied, assign=True)
    return VisionModel(load_tower(config.vision, checkpoint.vision_weights, checkpoint.tower), projector).eval()


class StoredLinear(nn.Module):
    """A linear layer that keeps its matrix as stored, and converts some rows at a time to float32 at each use.

    For one token of few lines, where reading the matrix is all that takes time: nothing is written to memory.
    """

    _ROWS = 256

    def __init__(self, weight: Tensor) -> None:
        """Keep a weight (out, in) of any float dtype."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ (…, out) of x (…, in), both float32."""
        return torch.cat([F.linear(x, rows.float()) for rows in self.weight.split(self._ROWS)], dim=-1)


_PROJECTIONS = ("in_proj", "x_proj", "out_proj")


def load_block(checkpoint: Checkpoint, index: int, operations: Operations = REFERENCE, *, for_a_token: bool = False) -> Block:
    """Load layer `index` of the decoder in float32.

    Args:
        checkpoint: with its decoder.
        index: of the layer.
        operations: sequential operations of its mixer.
        for_a_token: with StoredLinear projections, whose values are not checked.

    Raises:
        InputError: a tensor contains NaN or infinity; the message names it.
    """
    prefix = f"backbone.layers.{index}."
    with torch.device("meta"):  # neither allocated nor initialized: replaced below
        block = Block(checkpoint.config.mamba, operations)
    own = {k[len(prefix) :]: v for k, v in checkpoint.decoder.items() if k.startswith(prefix)}
    if for_a_token:
        for name in _PROJECTIONS:
            setattr(block.mixer, name, StoredLinear(own[f"mixer.{name}.weight"]))
    kept = {f"mixer.{name}.weight" for name in _PROJECTIONS} if for_a_token else set()
    tensors = {k: v if k in kept else require_finite(prefix + k, v.float()) for k, v in own.items()}
    block.load_state_dict(tensors, assign=True)
    return block.eval()


def stream_blocks(
    checkpoint: Checkpoint, operations: Operations = REFERENCE, first: int = 0, *, for_a_token: bool = False
) -> Iterator[Block]:
    """Yield the decoder's blocks from layer `first` on, one in memory at a time; arguments and errors as of `load_block`."""
    for index in range(first, checkpoint.config.mamba.n_layer):
        yield load_block(checkpoint, index, operations, for_a_token=for_a_token)
