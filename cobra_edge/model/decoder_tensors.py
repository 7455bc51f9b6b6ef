"""Infer a decoder's sizes from its tensors, and check that all tensors match them."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..formats.model_config import MambaConfig, decoder_shapes
from .backbones import ONLY_MAMBA_1


def plain_names(decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a decoder's tensors, of any shape and dtype, from transformers' or Cobra's names to those of state-spaces."""
    return {k.removeprefix("llm.").replace("backbone.embeddings.", "backbone.embedding."): v for k, v in decoder.items()}


def infer_mamba(decoder: dict[str, Tensor], file: str, norm_eps: float = 1e-5) -> MambaConfig:
    """Infer all sizes from the tensors, of any float dtype and the shapes of `decoder_shapes`, and check that all match.

    Raises:
        CheckpointError: not a Mamba-1 decoder, or a tensor is missing, unexpected or of another shape.
    """
    layers = [int(m.group(1)) for k in decoder if (m := re.match(r"backbone\.layers\.(\d{1,4})\.", k))]
    if any(name.endswith(".mixer.dt_bias") for name in decoder):
        raise CheckpointError(f"{file}: a Mamba-2 decoder, by its tensors named mixer.dt_bias; {ONLY_MAMBA_1}")
    embedding = decoder.get("backbone.embedding.weight")
    first = "backbone.layers.0.mixer."
    needed = [first + n for n in ("A_log", "conv1d.weight", "dt_proj.weight")]
    absent = [n for n in needed if n not in decoder or decoder[n].ndim < 2]
    if embedding is None or embedding.ndim != 2 or absent:
        lacking = absent or ["backbone.embedding.weight"]
        raise CheckpointError(f"{file}: not a Mamba-1 decoder, tensor {lacking[0]} is missing or has the wrong rank")
    head = decoder.get("lm_head.weight")
    config = MambaConfig(
        d_model=embedding.shape[1],
        n_layer=max(layers) + 1,
        vocab=embedding.shape[0],
        d_inner=decoder[needed[0]].shape[0],
        d_state=decoder[needed[0]].shape[1],
        d_conv=decoder[needed[1]].shape[-1],
        dt_rank=decoder[needed[2]].shape[1],
        norm_eps=norm_eps,
        tied=head is None or (head.shape == embedding.shape and torch.equal(head, embedding)),
    )
    shapes = decoder_shapes(config)
    if config.tied:
        decoder.pop("lm_head.weight", None)
    check_shapes(decoder, shapes, file)
    return config


def check_shapes(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Raise CheckpointError unless the tensors have exactly the expected names and shapes, and a float dtype."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        parts = [f"{what} {', '.join(n[:4])}{' …' if len(n) > 4 else ''}" for what, n in
                 (("missing", missing), ("unexpected", extra)) if n]  # fmt: skip
        raise CheckpointError(f"{where}: {'; '.join(parts)}; does the config belong to this checkpoint?")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, expected {shape}; "
                "use config and weights of the same checkpoint"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {name} has dtype {tensor.dtype}, expected a float type; save it as one")
