"""Write cobra-mini, an image, a question and the reference's logits into plain files for the native self-test.

python -m tests.decode.native_case build/cases

The self-test (`selftest FILE…`) runs them where there is no Python: on an emulated ARM, under sanitizers. Numbers are
little-endian int64; an array is its length and its values. runtimes/cpu/replay.cpp reads it in the same order.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import BinaryIO

import click
import msgspec
import numpy as np

import cobra_edge
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.decoder import ACTIVATIONS, DecoderOptions
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.hadamard import hadamard_factors, hadamard_matrix
from cobra_edge.formats.package_data import MINI
from cobra_edge.formats.packing import QuantizedTensor
from cobra_edge.formats.recipe import ROTATIONS
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.formats.targets import target_named
from cobra_edge.model.checkpoint import Checkpoint, open_checkpoint

from ..handmade import INT_SCHEMES, magnitudes, mixed_recipe, write_bundle

_STORAGES = {"float32": 0, "float16": 1, 8: 2, 4: 3, 3: 4}  # enum class Storage in runtimes/cpu/kernels.h

# A layer's tensors in the order of struct LayerWeights in runtimes/cpu/decoder.h.
_LAYER = (
    "norm.weight",
    "mixer.in_proj.weight",
    "mixer.conv1d.weight",
    "mixer.conv1d.bias",
    "mixer.x_proj.weight",
    "mixer.dt_proj.weight",
    "mixer.dt_proj.bias",
    "mixer.A_log",
    "mixer.D",
    "mixer.out_proj.weight",
)


def _numbers(out: BinaryIO, *values: int) -> None:
    out.write(struct.pack(f"<{len(values)}q", *values))


def _array(out: BinaryIO, values: np.ndarray, dtype: str = "<f4") -> None:
    _numbers(out, values.size)
    out.write(np.ascontiguousarray(values, dtype).tobytes())


def _matrix(out: BinaryIO, value: np.ndarray | QuantizedTensor) -> None:
    if isinstance(value, QuantizedTensor):
        _numbers(out, _STORAGES[value.scheme.weight_bits], *value.shape, value.scheme.group(value.shape[1]))
        out.write(value.codes.tobytes() + value.scales.tobytes())
        _array(out, np.zeros(0) if value.clips is None else value.clips)
    else:
        _numbers(out, _STORAGES[value.dtype.name], *value.shape, 0)
        out.write(value.tobytes())


def write_case(bundle: Bundle, activations: str, file: Path) -> None:
    """Write the decoder of a cobra-mini bundle, its input, and the numpy decoder's logits (positions, vocab) float32.

    Args:
        bundle: the bundle to run.
        activations: "float32" or "int8".
        file: the file to write.
    """
    c, tensors = bundle.manifest.model.mamba, bundle.decoder_tensors()
    session = cobra_edge.load(bundle)
    seen = session.visual_embeddings(MINI / "demo.png")
    tokens = session.codec.encode(session.template.first_turn("Is there a red circle?"))
    truth = NumpyDecoder(bundle, DecoderOptions(activations=activations))
    logits = truth.forward(np.concatenate([seen, truth.embed(tokens)]), truth.new_state())
    with file.open("wb") as out:
        _numbers(out, c.d_model, c.n_layer, c.vocab, c.d_inner, c.d_state, c.d_conv, c.dt_rank, c.tied, activations == "int8")
        _array(out, np.array([c.norm_eps]))
        _matrix(out, tensors["backbone.embedding.weight"])
        for i in range(c.n_layer):
            layer = f"backbone.layers.{i}."
            for name in _LAYER:
                value = tensors[layer + name]
                if "proj.weight" in name:
                    _matrix(out, value)
                else:
                    assert isinstance(value, np.ndarray)
                    _array(out, value)
        norm = tensors["backbone.norm_f.weight"]
        assert isinstance(norm, np.ndarray)
        _array(out, norm)
        if not c.tied:
            _matrix(out, tensors["lm_head.weight"])
        recipe = bundle.manifest.recipe
        for rotated, width in ((recipe.rotates_out_proj, c.d_inner), (recipe.rotates_residual, c.d_model)):
            _array(out, hadamard_matrix(hadamard_factors(width)[0]) if rotated else np.zeros(0))
        _array(out, seen)
        _array(out, np.array(tokens), "<i8")
        _array(out, logits)


@click.command(epilog="Example: python -m tests.decode.native_case build/cases")
@click.argument("directory", type=click.Path(path_type=Path))
def command(directory: Path) -> None:
    """Write test cases of cobra-mini for both activations: every scheme, rotated, and all of it mixed and clipped."""
    directory.mkdir(parents=True, exist_ok=True)
    # One of the schemes with the same storage is enough.
    schemes = {(s.weight_bits, s.group_size): s.name for s in map(scheme_named, reversed(INT_SCHEMES))}
    plans = [*((scheme, "none") for scheme in schemes.values()), ("w4a16-g128", "out-proj"), ("w4a16-g128", "both")]
    checkpoint = open_checkpoint("mini")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundles = {}
        for scheme, rotation in plans:
            name = scheme if rotation == "none" else f"{scheme}-{rotation}"
            out = folder / name
            bundles[name] = Bundle.open(
                export_bundle(
                    "mini",
                    target_named("cpu"),
                    out,
                    scheme=scheme,
                    rotation=rotation,
                    method="rtn",
                    vision_precision="fp32",
                    golden_lines=16,
                ).directory
            )
        bundles["mixed"] = _mixed(bundles["fp16"], checkpoint, folder)
        for name, bundle in bundles.items():
            for activations in ACTIVATIONS:
                write_case(bundle, activations, directory / f"{name}-{activations}.bin")


def _mixed(plain: Bundle, checkpoint: Checkpoint, folder: Path) -> Bundle:
    recipe = mixed_recipe(checkpoint.config.mamba, rotations=ROTATIONS["both"], activation_percentile=99.9)
    free = write_bundle(plain, checkpoint, msgspec.structs.replace(recipe, activation_percentile=None), folder / "free")
    seen = cobra_edge.load(plain).visual_embeddings(MINI / "demo.png")
    return write_bundle(plain, checkpoint, recipe, folder / "mixed", magnitudes(free, seen))


if __name__ == "__main__":
    command()
