"""The memory plan: what running a bundle takes on its target, computed before any work.

On a CPU the weights are the file's pages. On a GPU they are one block, and the decoder's buffers stay beside it: these sizes
are what the decoder allocates, to the byte. Estimates are the activations of the vision graph, the CUDA context, what the
process itself takes, and what the system takes (`Target.system_gb`).
"""

from __future__ import annotations

import math

import msgspec

from ..bundle.manifest import MemoryPlan
from ..bundle.memory_plan import decoder_bytes, state_bytes, vision_working_bytes, working_bytes
from ..decode.cuda.device_memory import DeviceMemory, context_bytes
from ..errors import InputError
from ..formats.model_config import CobraConfig, projector_shapes
from ..formats.precision import PrecisionName, precision_named
from ..formats.recipe import Recipe
from ..formats.targets import Target

_FLOAT = 4
# Of the process itself, where the GPU's memory is the host's: `run --device cuda` with cobra-mini peaked at 127 MiB, 12 MB of
# the emulated GPU's memory among them (x86-64, Python 3.11, vision by onnxruntime; not measured on a Jetson).
PROCESS_BYTES = 128 << 20


def vision_bytes(config: CobraConfig, precision: PrecisionName) -> int:
    """Return the estimated size of the vision graph's weights, from the encoders' widths and depths."""
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
    unallocated_bytes: int = 0,
) -> MemoryPlan:
    """Return the plan; the size of the vision graph is estimated, in `precision` or the target's default, until it is written.

    Args:
        config, recipe, target: of the bundle.
        precision, vision_file_bytes: of the vision graph.
        unallocated_bytes: what a budget of bits allows the decoder beyond the recipe.

    Raises:
        InputError: the model does not fit the target; the message has the numbers.
    """
    vision = vision_bytes(config, precision or target.vision_precision) if vision_file_bytes is None else vision_file_bytes
    plan = (_on_a_gpu if target.decoder_runtime == "cuda" else _on_a_cpu)(config, recipe, target, vision)
    plan = msgspec.structs.replace(plan, decoder_bytes=plan.decoder_bytes + unallocated_bytes)
    if plan.available_bytes is not None and plan.total_bytes > plan.available_bytes:
        raise InputError(
            f"{config.model_id} as {recipe.scheme} does not fit {target.title}: {plan.total_bytes / 1e9:.2f} GB needed "
            f"(vision {plan.vision_bytes / 1e9:.2f}, decoder {plan.decoder_bytes / 1e9:.2f}, state "
            f"{plan.state_bytes / 1e9:.2f}, buffers {plan.buffer_bytes / 1e9:.2f}, working {plan.working_bytes / 1e9:.2f}, "
            f"system {plan.reserved_bytes / 1e9:.2f}), {plan.available_bytes / 1e9:.2f} GB available; "
            "use fewer bits or a larger target"
        )
    return plan


def _on_a_cpu(config: CobraConfig, recipe: Recipe, target: Target, vision: int) -> MemoryPlan:
    return MemoryPlan(
        vision_bytes=vision,
        decoder_bytes=decoder_bytes(config, recipe),
        state_bytes=state_bytes(config),
        working_bytes=working_bytes(config),
        reserved_bytes=_system_bytes(target),
        available_bytes=_available_bytes(target),
    )


def _on_a_gpu(config: CobraConfig, recipe: Recipe, target: Target, vision: int) -> MemoryPlan:
    assert target.multiprocessors is not None, "held by tests/project/test_data.py"
    memory = DeviceMemory.of(config.mamba, recipe, target.multiprocessors, config.max_length)
    embeddings = config.n_visual_tokens * config.mamba.d_model * _FLOAT  # of an image, where its engine leaves them on the GPU
    reserved = _system_bytes(target) + context_bytes(target.multiprocessors)
    return MemoryPlan(
        vision_bytes=vision,
        decoder_bytes=memory.weights,
        state_bytes=memory.states,
        buffer_bytes=memory.token + memory.prompt + memory.pinned + embeddings,
        working_bytes=vision_working_bytes(config),
        reserved_bytes=reserved + (PROCESS_BYTES if target.family == "jetson" else 0),
        available_bytes=_available_bytes(target),
    )


def _system_bytes(target: Target) -> int:
    return int(target.system_gb * 1e9)


def _available_bytes(target: Target) -> int | None:
    return None if target.memory_gb is None else int(target.memory_gb * 1e9)
