"""What the CUDA decoder takes of a GPU, computed from sizes alone: before an export, and before weights are copied."""

from __future__ import annotations

from dataclasses import dataclass

from ...formats.model_config import MambaConfig
from ...formats.recipe import Recipe
from .prefill import CHUNK, prefill_bytes
from .state import state_bytes
from .step import pinned_bytes, step_bytes
from .weights import weight_bytes

_STATES = 2  # a session's, and the decoder's own, through which states in the host's memory go
# A context without any allocation: 107 MiB on an RTX 4060 Ti (34 multiprocessors), 555 MiB on an RTX PRO 6000 (188).
# Source: measured by others, https://github.com/ggml-org/llama.cpp/pull/23604. Not measured on a Jetson.
_LEAST_CONTEXT_BYTES = 107 << 20
_CONTEXT_BYTES_A_MULTIPROCESSOR = (555 << 20) // 188


@dataclass(frozen=True)
class DeviceMemory:
    """What a decoder allocates, in bytes.

    Attributes:
        weights: one block.
        states: a session's and the decoder's own.
        token: buffers of one token.
        prompt: buffers of the longest chunk of a prompt; they stay.
        pinned: memory of the host that the GPU copies from and to.
    """

    weights: int
    states: int
    token: int
    prompt: int
    pinned: int

    @classmethod
    def of(cls, config: MambaConfig, recipe: Recipe, multiprocessors: int, longest_prompt: int = CHUNK) -> DeviceMemory:
        """Return what a decoder allocates.

        Args:
            config, recipe: of the decoder.
            multiprocessors: of the GPU, by which prompts are cut into blocks.
            longest_prompt: in tokens.
        """
        return cls(
            weights=weight_bytes(config, recipe),
            states=_STATES * state_bytes(config),
            token=step_bytes(config),
            prompt=prefill_bytes(config, multiprocessors, longest_prompt),
            pinned=pinned_bytes(config),
        )

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.states + self.token + self.prompt + self.pinned


def context_bytes(multiprocessors: int) -> int:
    """Return what a CUDA context takes on a GPU by itself; an estimate, see the constants."""
    return max(_LEAST_CONTEXT_BYTES, multiprocessors * _CONTEXT_BYTES_A_MULTIPROCESSOR)
