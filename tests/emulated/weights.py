"""Decoders' weights in memory, by any scheme and rotation: for tests that need no bundle."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec
import numpy as np

from cobra_edge.decode.decoder import Weights
from cobra_edge.formats.model_config import MambaConfig, decoder_shapes
from cobra_edge.formats.recipe import FLOAT16, FLOAT32, ROTATIONS, uniform_recipe
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.quantize.rtn import round_to_nearest

from ..conftest import random_tensors


def random_weights(
    config: MambaConfig, scheme: str, rotation: str = "none", others: Mapping[str, str] = MappingProxyType({})
) -> Weights:
    """Return weights of a decoder that works; those of a rotated one are as random as any. `others` are stored otherwise."""
    recipe, _ = uniform_recipe(config, scheme_named(scheme), rotations=ROTATIONS[rotation])
    recipe = msgspec.structs.replace(recipe, tensors={**recipe.tensors, **others})
    tensors = {}
    for name, tensor in random_tensors(decoder_shapes(config)).items():
        storage, values = recipe.storage(name), np.asarray(tensor.numpy())
        is_float = storage in (FLOAT16, FLOAT32)
        tensors[name] = values.astype(storage) if is_float else round_to_nearest(values, scheme_named(storage))
    return Weights(config, recipe, tensors, "a small decoder")
