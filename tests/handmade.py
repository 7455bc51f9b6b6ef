"""Bundles of recipes that no export makes: each tensor stored as one likes, with clips."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np

from cobra_edge.bundle.reader import DECODER, Bundle
from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.formats.model_config import MambaConfig, decoder_shapes
from cobra_edge.formats.recipe import Recipe, quantized_scheme, stored_tensors
from cobra_edge.formats.safetensors_file import SafetensorsWriter
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.model.checkpoint import Checkpoint
from cobra_edge.quantize.rtn import round_to_nearest
from cobra_edge.quantize.transforms import transformed_tensor

INT_SCHEMES = [s.name for s in SCHEMES.values() if s.code_format == "int"]


def mixed_recipe(config: MambaConfig, **fields: object) -> Recipe:
    """Return a recipe that takes the schemes in turns: every matrix has the one that was taken least and fits it."""
    tensors, taken = {}, Counter[str]()
    for name, shape in decoder_shapes(config).items():
        if not name.endswith(("proj.weight", "embedding.weight", "lm_head.weight")):
            continue
        scheme = min((s for s in INT_SCHEMES if SCHEMES[s].refuses(shape[1]) is None), key=taken.__getitem__)
        taken[scheme] += 1
        tensors[name] = "float16" if scheme == "fp16" else scheme
    return Recipe("mixed", "rtn", tensors, **fields)  # type: ignore[arg-type]


def magnitudes(bundle: Bundle, embeddings: np.ndarray) -> dict[str, np.ndarray]:
    """Return the largest magnitude of each input (in,) of every matrix while numpy reads embeddings (seq, d_model)."""
    found: dict[str, np.ndarray] = {}

    class Watched(NumpyDecoder):
        def _multiply(self, x: np.ndarray, name: str) -> np.ndarray:
            found[name] = np.abs(x).max(axis=0)
            return super()._multiply(x, name)

    decoder = Watched(bundle, DecoderOptions(activations="float32"))
    decoder.forward(embeddings, decoder.new_state())
    return found


def write_bundle(
    model: Bundle, checkpoint: Checkpoint, recipe: Recipe, folder: Path, tops: dict[str, np.ndarray] | None = None
) -> Bundle:
    """Write the checkpoint's decoder as the recipe says, beside the other files of a bundle of that model.

    Args:
        model: the bundle they are taken from.
        checkpoint: the model's.
        recipe: rounded to nearest.
        folder: where.
        tops: `magnitudes`; a group's clip is 0.7 of the largest in it.
    """
    shutil.copytree(model.directory, folder)
    config, plan = checkpoint.config.mamba, stored_tensors(checkpoint.config.mamba, recipe)
    with SafetensorsWriter(folder / DECODER, [t for entries in plan.values() for t in entries]) as writer:
        for name, entries in plan.items():
            values = transformed_tensor(name, lambda n: checkpoint.decoder[n].float().numpy(), recipe)
            scheme = quantized_scheme(recipe, name)
            if scheme is None:
                writer.write(name, values.astype(entries[0].dtype))
                continue
            quantized = round_to_nearest(values, scheme)
            writer.write(entries[0].name, quantized.codes)
            writer.write(entries[1].name, quantized.scales)
            if len(entries) == 3:
                assert tops is not None and (config.tied or "embedding" not in name)
                writer.write(entries[2].name, 0.7 * tops[name].reshape(entries[2].shape[0], -1).max(axis=1))
    return Bundle(folder, msgspec.structs.replace(model.manifest, recipe=recipe))
