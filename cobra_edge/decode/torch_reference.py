"""The decoder of a bundle run by the plain torch model: the reference that other backends are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..bundle import Bundle
from ..hadamard import hadamard_matrix
from ..model.mamba import Mamba, MambaState
from ..packing import QuantizedTensor
from .decoder import DecoderState


class TorchDecoder:
    """A bundle's dequantized weights in `cobra_edge.model.mamba`, float32 on the CPU."""

    name = "torch"

    def __init__(self, bundle: Bundle) -> None:
        """Dequantize the decoder. Raises BundleError when a tensor does not fit."""
        self.config = bundle.manifest.model.mamba
        self.model = Mamba(self.config).eval()
        dense = {
            name: v.dequantize() if isinstance(v, QuantizedTensor) else v.astype(np.float32)
            for name, v in bundle.decoder_tensors().items()
        }
        self.model.load_state_dict({k: torch.from_numpy(v) for k, v in dense.items()}, strict=False)
        if bundle.manifest.recipe.rotates_out_proj:
            self._rotate_inputs_of_out_proj()

    def _rotate_inputs_of_out_proj(self) -> None:
        """Have every out_proj see R y, R written out: the plain form that the butterflies of `rotate` are compared with."""
        width = self.config.d_inner
        rotation = torch.from_numpy(hadamard_matrix(width) / np.float32(width**0.5))

        def rotated(_module: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
            return inputs[0] @ rotation.T

        for name, module in self.model.named_modules():
            if name.endswith(".mixer.out_proj"):
                module.register_forward_pre_hook(rotated)

    def new_state(self) -> DecoderState:
        """See `Decoder.new_state`."""
        return DecoderState.zeros(self.config)

    @torch.inference_mode()
    def embed(self, tokens: list[int]) -> np.ndarray:
        """See `Decoder.embed`."""
        return self.model.embed(torch.tensor(tokens)).numpy()

    @torch.inference_mode()
    def _hidden(self, embeddings: np.ndarray, state: DecoderState) -> torch.Tensor:
        before = MambaState(*(tuple(torch.from_numpy(a)[:, None]) for a in (state.conv, state.ssm)))
        hidden, after = self.model.hidden(torch.from_numpy(embeddings.astype(np.float32))[None], before)
        state.conv[:], state.ssm[:] = (torch.cat(t).numpy() for t in (after.conv, after.ssm))
        state.n_tokens += len(embeddings)
        return hidden[0]

    @torch.inference_mode()
    def prefill(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """See `Decoder.prefill`."""
        return self.model.lm_head(self._hidden(embeddings, state)[-1]).numpy()

    def step(self, token: int, state: DecoderState) -> np.ndarray:
        """See `Decoder.step`."""
        return self.prefill(self.embed([token]), state)

    @torch.inference_mode()
    def forward(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """See `Decoder.forward`."""
        return self.model.lm_head(self._hidden(embeddings, state)).numpy()
