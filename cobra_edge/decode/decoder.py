"""What every decoder backend offers, and the state they carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..bundle import read_tensors
from ..errors import InputError
from ..model.config import MambaConfig
from ..recipe import StoredTensor


@dataclass(eq=False)
class DecoderState:
    """What a decoder remembers of all tokens so far: a fixed size, whatever their number.

    Attributes:
        conv: (n_layer, d_inner, d_conv) float32, the last inputs of each causal convolution, newest last.
        ssm: (n_layer, d_inner, d_state) float32, the recurrent state.
        n_tokens: positions read so far, visual and text.
    """

    conv: np.ndarray
    ssm: np.ndarray
    n_tokens: int = 0

    @classmethod
    def zeros(cls, config: MambaConfig) -> DecoderState:
        """Return the state before the first token."""
        return cls(
            np.zeros((config.n_layer, config.d_inner, config.d_conv), np.float32),
            np.zeros((config.n_layer, config.d_inner, config.d_state), np.float32),
        )

    def copy(self) -> DecoderState:
        """Return an independent copy."""
        return DecoderState(self.conv.copy(), self.ssm.copy(), self.n_tokens)

    def save(self, file: Path) -> None:
        """Write the state as safetensors."""
        from safetensors.numpy import save_file

        save_file({"conv": self.conv, "ssm": self.ssm, "n_tokens": np.array([self.n_tokens], np.int32)}, file)

    @classmethod
    def load(cls, file: Path, config: MambaConfig) -> DecoderState:
        """Read a saved state. Raises BundleError when it is not one of this model."""
        zeros = cls.zeros(config)
        shapes = [
            StoredTensor("conv", "float32", zeros.conv.shape),
            StoredTensor("ssm", "float32", zeros.ssm.shape),
            StoredTensor("n_tokens", "int32", (1,)),
        ]
        saved = read_tensors(file, shapes)
        if not (np.isfinite(saved["conv"]).all() and np.isfinite(saved["ssm"]).all()):
            raise InputError(f"{file}: holds NaN or infinity; look at the image again")
        return cls(saved["conv"], saved["ssm"], int(saved["n_tokens"][0]))


class Decoder(Protocol):
    """A quantized Mamba that runs. States are changed in place; logits are float32."""

    name: str
    config: MambaConfig

    def new_state(self) -> DecoderState:
        """Return the state before the first token."""
        ...

    def embed(self, tokens: list[int]) -> np.ndarray:
        """Look up tokens; returns (seq, d_model) float32."""
        ...

    def prefill(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """Read embeddings (seq, d_model) float32; returns the logits after the last one, (vocab,)."""
        ...

    def step(self, token: int, state: DecoderState) -> np.ndarray:
        """Read one token; returns the logits after it, (vocab,)."""
        ...

    def forward(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """Read embeddings (seq, d_model) float32; returns logits at every position, (seq, vocab)."""
        ...
