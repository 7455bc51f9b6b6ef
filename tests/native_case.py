"""Write cobra-mini, a picture, a question and the reference's logits into plain files for the native self-test.

python -m tests.native_case build/cases

The self-test (`selftest FILE…`) runs them where there is no Python: on an emulated ARM, under sanitizers. Numbers are
little-endian int64; an array is its length and its values. runtimes/cpu/replay.cpp reads it in the same order.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import BinaryIO

import click
import numpy as np

import cobra_edge
from cobra_edge.assemble import export_bundle
from cobra_edge.bundle import Bundle
from cobra_edge.decode.decoder import ACTIVATIONS, DecoderOptions
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.hadamard import hadamard_factors, hadamard_matrix
from cobra_edge.packing import QuantizedTensor
from cobra_edge.resources import MINI
from cobra_edge.scheme import SCHEMES
from cobra_edge.targets import target_named

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
        assert value.scheme.group_size is not None
        _numbers(out, _STORAGES[value.scheme.weight_bits], *value.shape, value.scheme.group_size)
        out.write(value.codes.tobytes() + value.scales.tobytes())
    else:
        _numbers(out, _STORAGES[value.dtype.name], *value.shape, 0)
        out.write(value.tobytes())


def write_case(bundle: Bundle, activations: str, file: Path) -> None:
    """Write the decoder of a bundle of cobra-mini, its input, and the numpy decoder's logits (positions, vocab).

    Args:
        bundle: what to run.
        activations: "float32" or "int8".
        file: where.
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
        rotated = bundle.manifest.recipe.online_hadamard
        _array(out, hadamard_matrix(hadamard_factors(c.d_inner)[0]) if rotated else np.zeros(0))
        _array(out, seen)
        _array(out, np.array(tokens), "<i8")
        _array(out, logits)


@click.command(epilog="Example: python -m tests.native_case build/cases")
@click.argument("directory", type=click.Path(path_type=Path))
def command(directory: Path) -> None:
    """Export cobra-mini by every scheme, one of them rotated too, and write a case for each form of activations."""
    directory.mkdir(parents=True, exist_ok=True)
    for scheme, rotation in [*((scheme, "none") for scheme in SCHEMES), ("w4a16-g128", "out-proj")]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "bundle"
            made = export_bundle("mini", target_named("cpu"), out, scheme=scheme, rotation=rotation, golden_lines=1)
            for activations in ACTIVATIONS:
                mark = "" if rotation == "none" else "-rotated"
                write_case(Bundle.open(made.directory), activations, directory / f"{scheme}{mark}-{activations}.bin")


if __name__ == "__main__":
    command()
