"""The memory plan: what running a bundle takes, counted before anything is written and told where it is not there."""

from __future__ import annotations

import errno
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..errors import InputError, MachineError
from ..formats.model_config import CobraConfig, projector_shapes
from ..formats.precision import PrecisionName, precision_named
from ..formats.recipe import Recipe, stored_tensors
from ..formats.targets import Target
from .manifest import Manifest, MemoryPlan

_FLOAT = 4


def decoder_bytes(config: CobraConfig, recipe: Recipe) -> int:
    """Return the bytes of decoder.safetensors' data."""
    plan = stored_tensors(config.mamba, recipe)
    return sum(math.prod(t.shape) * np.dtype(t.dtype).itemsize for entries in plan.values() for t in entries)


def state_bytes(config: CobraConfig) -> int:
    """Return the bytes of one decoding state, whatever the context length."""
    m = config.mamba
    return m.n_layer * m.d_inner * (m.d_conv + m.d_state) * _FLOAT


def working_bytes(config: CobraConfig) -> int:
    """Return an upper estimate of activations: the larger of one vision block and one decoder block over a full prompt."""
    m = config.mamba
    decoder = config.max_length * (2 * m.d_model + 5 * m.d_inner) * _FLOAT + m.vocab * _FLOAT
    vision = 0
    if config.vision is not None:
        for e in config.vision.encoders:
            tokens = config.vision.n_patches + e.n_prefix
            # Queries, keys, values, the four-fold hidden layer and two residuals; scores of heads 64 wide.
            heads = max(1, e.embed_dim // 64)
            vision = max(vision, tokens * 9 * e.embed_dim * _FLOAT + heads * tokens**2 * _FLOAT)
    return max(decoder, vision)


def vision_bytes(config: CobraConfig, precision: PrecisionName) -> int:
    """Return an estimate of the vision graph's weights, from the encoders' widths and depths."""
    if config.vision is None or config.projector is None:
        return 0
    shapes = projector_shapes(config.projector, config.vision.feature_dim, config.mamba.d_model)
    total = sum(math.prod(s) for s in shapes.values())
    for e in config.vision.encoders:
        total += (e.depth - 1) * 12 * e.embed_dim**2 + e.embed_dim * (3 * e.patch_size**2 + config.vision.n_patches)
    return total * precision_named(precision).bits // 8


def plan_memory(
    config: CobraConfig,
    recipe: Recipe,
    target: Target,
    precision: PrecisionName | None = None,
    vision_file_bytes: int | None = None,
) -> MemoryPlan:
    """Return the plan; the vision graph's size is estimated, in a precision or the target's own, until the file is written.

    Raises:
        InputError: the model cannot fit the target; the numbers are given.
    """
    plan = MemoryPlan(
        vision_bytes=vision_bytes(config, precision or target.vision_precision)
        if vision_file_bytes is None
        else vision_file_bytes,
        decoder_bytes=decoder_bytes(config, recipe),
        state_bytes=state_bytes(config),
        working_bytes=working_bytes(config),
        reserved_bytes=int(target.reserved_gb * 1e9),
        available_bytes=None if target.memory_gb is None else int(target.memory_gb * 1e9),
    )
    if plan.available_bytes is not None and plan.total_bytes > plan.available_bytes:
        raise InputError(
            f"{config.model_id} as {recipe.scheme} does not fit {target.title}: {plan.total_bytes / 1e9:.2f} GB needed "
            f"(vision {plan.vision_bytes / 1e9:.2f}, decoder {plan.decoder_bytes / 1e9:.2f}, state "
            f"{plan.state_bytes / 1e9:.2f}, working {plan.working_bytes / 1e9:.2f}, system "
            f"{plan.reserved_bytes / 1e9:.2f}), {plan.available_bytes / 1e9:.2f} GB there; "
            "take fewer bits or a larger target"
        )
    return plan


# Torch's words where it raises nothing but a RuntimeError: on a processor, and on a GPU before its allocator is up.
_ON_A_PROCESSOR, _ON_A_GPU = "DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory"


def lacks_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out: Python's, the system's or torch's, which is not imported for it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return _of_a_gpu(error) or _ON_A_PROCESSOR in str(error)
    return isinstance(error, MemoryError)


def _of_a_gpu(error: Exception) -> bool:
    """Return whether it is torch that says so, of a GPU."""
    names = {(t.__module__.partition(".")[0], t.__name__) for t in type(error).__mro__}
    return ("torch", "OutOfMemoryError") in names or (isinstance(error, RuntimeError) and _ON_A_GPU in str(error))


def _gpu_words() -> str:
    """Return what GPU it is and how much of it is free, to follow "no memory for …"; no figures where torch cannot say."""
    cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
    try:
        if cuda is None or not cuda.is_available():
            return " on the GPU"
        (free, total), name = cuda.mem_get_info(), cuda.get_device_name()
    except RuntimeError:  # a GPU without room for torch itself
        return " on the GPU"
    return f" on {name}, where {free / 1e9:.2f} of {total / 1e9:.2f} GB are free"


@contextmanager
def memory_for(what: str, manifest: Manifest) -> Iterator[None]:
    """Say, where memory runs out, what it was for, how much the decoder takes, and of a GPU what it has.

    Args:
        what: continues "no memory for …".
        manifest: of the bundle that runs.

    Raises:
        MachineError: in the place of an error that `lacks_memory`.
    """
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        on_gpu = _of_a_gpu(error)
        where = _gpu_words() if on_gpu else ""
        config, recipe = manifest.model, manifest.recipe
        weights, state, working = decoder_bytes(config, recipe), state_bytes(config), working_bytes(config)
        advice = "close what else is on the GPU" if on_gpu else "close other programs, raise this process's limit"
        raise MachineError(
            f"no memory for {what}{where}; the decoder of {config.model_id} as {recipe.scheme} takes about "
            f"{(weights + state + working) / 1e9:.2f} GB (weights {weights / 1e9:.2f}, state {state / 1e9:.2f}, working "
            f"{working / 1e9:.2f}): {advice}, or export with fewer bits"
        ) from error
