"""What one token costs at the least: bytes that have to be moved, and kernels that have to be launched."""

from __future__ import annotations

from ..bundle.memory_plan import state_bytes
from ..formats.model_config import CobraConfig, MambaConfig
from ..formats.recipe import Recipe, stored_tensors

_EMBEDDING = "backbone.embedding.weight"
# Of the CUDA decoder: in_proj with its norm; convolution with x_proj; recurrence with dt_proj and gate; out_proj with the sum.
LAUNCHES_A_LAYER = 4
_LOOK_UP, _HEAD = 1, 1
CHOICE_LAUNCHES = 10  # torch's own, about: are all logits finite, which is the largest


def weights_read_bytes(config: MambaConfig, recipe: Recipe) -> int:
    """Return the bytes of weights that a token reads: all of them once; of a table that is only looked up, one row.

    A tied head is the embedding's table, read once for the head.
    """
    sizes = {name: sum(t.n_bytes for t in entries) for name, entries in stored_tensors(config, recipe).items()}
    if not config.tied:
        sizes[_EMBEDDING] //= config.vocab
    return sum(sizes.values())


def token_bytes(config: CobraConfig, recipe: Recipe) -> int:
    """Return the bytes that a token moves: its weights, and the state, which is read and written."""
    return weights_read_bytes(config.mamba, recipe) + 2 * state_bytes(config)


def launches_per_token(config: MambaConfig, recipe: Recipe) -> int:
    """Return how many kernels the CUDA decoder launches for a token inside its graph, the choice of the next one included."""
    a_layer = LAUNCHES_A_LAYER + recipe.rotates_out_proj
    return config.n_layer * a_layer + _LOOK_UP + _HEAD + recipe.rotates_residual + CHOICE_LAUNCHES
