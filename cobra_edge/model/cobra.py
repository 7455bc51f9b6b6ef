"""The complete Cobra in plain torch: visual embeddings before the text, one decoder over both.

Source: Cobra (Zhao et al., AAAI-25), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
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
    projector = Projector(config.projector, config.vision.feature_dim, config.mamba.d_model)
    tensors = {k: require_finite(k, v.float()) for k, v in checkpoint.projector.items()}
    projector.load_state_dict(tensors)
    return VisionModel(load_tower(config.vision, checkpoint.vision_weights, checkpoint.tower), projector).eval()


def load_block(checkpoint: Checkpoint, index: int, operations: Operations = REFERENCE) -> Block:
    """Load layer `index` of the decoder in float32.

    Raises:
        InputError: a tensor contains NaN or infinity; the message names it.
    """
    prefix = f"backbone.layers.{index}."
    with torch.device("meta"):  # neither allocated nor initialized: replaced below
        block = Block(checkpoint.config.mamba, operations)
    own = {k: v for k, v in checkpoint.decoder.items() if k.startswith(prefix)}
    block.load_state_dict({k[len(prefix) :]: require_finite(k, v.float()) for k, v in own.items()}, assign=True)
    return block.eval()


def stream_blocks(checkpoint: Checkpoint, operations: Operations = REFERENCE, first: int = 0) -> Iterator[Block]:
    """Yield the decoder's blocks from layer `first` on, in float32, one in memory at a time. Raises as `load_block`."""
    for index in range(first, checkpoint.config.mamba.n_layer):
        yield load_block(checkpoint, index, operations)
