"""The memory that running a bundle takes on a CPU, and the error when memory runs out."""

from __future__ import annotations

import errno
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..errors import MachineError
from ..formats.model_config import CobraConfig
from ..formats.recipe import Recipe, stored_tensors
from .manifest import Manifest

_FLOAT = 4


def decoder_bytes(config: CobraConfig, recipe: Recipe) -> int:
    """Return the size of the data in decoder.safetensors."""
    plan = stored_tensors(config.mamba, recipe)
    return sum(math.prod(t.shape) * np.dtype(t.dtype).itemsize for entries in plan.values() for t in entries)


def state_bytes(config: CobraConfig) -> int:
    """Return the size of one decoder state, independent of the context length."""
    m = config.mamba
    return m.n_layer * m.d_inner * (m.d_conv + m.d_state) * _FLOAT


def working_bytes(config: CobraConfig) -> int:
    """Return an upper estimate of activations: the larger of one vision block and one decoder block over a full prompt."""
    m = config.mamba
    decoder = config.max_length * (2 * m.d_model + 5 * m.d_inner) * _FLOAT + m.vocab * _FLOAT
    return max(decoder, vision_working_bytes(config))


def vision_working_bytes(config: CobraConfig) -> int:
    """Return an upper estimate of the activations of one vision block; 0 of a text-only model."""
    largest = 0
    if config.vision is not None:
        for e in config.vision.encoders:
            tokens = config.vision.n_patches + e.n_prefix
            # Queries, keys, values, the hidden layer of 4 · embed_dim and two residuals; attention scores of heads of width 64.
            heads = max(1, e.embed_dim // 64)
            largest = max(largest, tokens * 9 * e.embed_dim * _FLOAT + heads * tokens**2 * _FLOAT)
    return largest


# Messages by which torch's plain RuntimeErrors are recognized: on a CPU, and on a GPU before its allocator is initialized.
_ON_A_PROCESSOR, _ON_A_GPU = "DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory"


def lacks_memory(error: Exception) -> bool:
    """Return whether an error means out of memory: Python's, the system's or torch's (which is not imported)."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return _of_a_gpu(error) or _ON_A_PROCESSOR in str(error)
    return isinstance(error, MemoryError)


def _of_a_gpu(error: Exception) -> bool:
    """Return whether it is torch's out-of-memory error of a GPU."""
    names = {(t.__module__.partition(".")[0], t.__name__) for t in type(error).__mro__}
    return ("torch", "OutOfMemoryError") in names or (isinstance(error, RuntimeError) and _ON_A_GPU in str(error))


def _gpu_words() -> str:
    """Return the GPU and its free memory, to follow "no memory for …"; without numbers if torch cannot say."""
    cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
    try:
        if cuda is None or not cuda.is_available():
            return " on the GPU"
        (free, total), name = cuda.mem_get_info(), cuda.get_device_name()
    except RuntimeError:  # too little memory for torch's own context
        return " on the GPU"
    return f" on {name}, where {free / 1e9:.2f} of {total / 1e9:.2f} GB are free"


@contextmanager
def memory_for(what: str, manifest: Manifest) -> Iterator[None]:
    """Turn out-of-memory errors into one that says what the memory was for, what the decoder needs and what a GPU has free.

    Args:
        what: completes "no memory for …".
        manifest: of the running bundle.

    Raises:
        MachineError: instead of an error that `lacks_memory` recognizes.
    """
    try:
        yield
    except Exception as error:  # torch raises plain RuntimeErrors; all that is not about memory is raised again
        if not lacks_memory(error):
            raise
        on_gpu = _of_a_gpu(error)
        where = _gpu_words() if on_gpu else ""
        config, recipe = manifest.model, manifest.recipe
        weights, state, working = decoder_bytes(config, recipe), state_bytes(config), working_bytes(config)
        advice = "close other programs on the GPU" if on_gpu else "close other programs, raise this process's limit"
        raise MachineError(
            f"no memory for {what}{where}; the decoder of {config.model_id} as {recipe.scheme} takes about "
            f"{(weights + state + working) / 1e9:.2f} GB (weights {weights / 1e9:.2f}, state {state / 1e9:.2f}, working "
            f"{working / 1e9:.2f}): {advice}, or export with fewer bits"
        ) from error
