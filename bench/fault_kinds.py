"""Kinds of faults: of a bundle on disk, with the hashes of its manifest updated, or of the runtime inside a block.

A broken bundle opens like any other; only its answers show the fault.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np

from cobra_edge.bundle.manifest import Manifest, PromptFile
from cobra_edge.bundle.reader import DECODER, MANIFEST, PROMPT, TOKENIZER, VISION, Bundle, Tensors, file_entries
from cobra_edge.decode.cpu import CpuDecoder
from cobra_edge.decode.decoder import DecoderState
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.packing import QuantizedTensor, pack, unpack
from cobra_edge.formats.recipe import stored_tensors
from cobra_edge.formats.safetensors_file import SafetensorsWriter
from cobra_edge.formats.targets import target_named
from cobra_edge.inference import generate
from cobra_edge.inputs.image import ImageTransform
from cobra_edge.regress import predictions as predictions
from cobra_edge.suite.line_set import LineSet
from cobra_edge.suite.reader import HELDOUT

# Takes the decoder's tensors by name, in the shapes of `decoder_shapes`; returns those that change, in the same shapes.
Change = Callable[[Tensors, np.random.Generator], Mapping[str, "np.ndarray | QuantizedTensor"]]


def seal(directory: Path, **changes: Any) -> None:
    """Update the hashes of a manifest, and these fields."""
    manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    manifest = msgspec.structs.replace(manifest, files=file_entries(directory), **changes)
    (directory / MANIFEST).write_bytes(msgspec.json.encode(manifest))


def change_tensors(directory: Path, changed: Mapping[str, np.ndarray | QuantizedTensor], recipe: Any = None) -> None:
    """Replace tensors of a bundle's decoder, each in its own shape and dtype, and its recipe if one is given."""
    bundle = Bundle.open(directory)
    recipe = recipe or bundle.manifest.recipe
    plan, tensors = stored_tensors(bundle.manifest.model.mamba, recipe), bundle.decoder_tensors() | dict(changed)
    file = directory / f"{DECODER}.new"
    with SafetensorsWriter(file, [entry for entries in plan.values() for entry in entries]) as writer:
        for name, entries in plan.items():
            value = tensors[name]
            parts = (value.codes, value.scales, value.clips) if isinstance(value, QuantizedTensor) else (value,)
            for entry, part in zip(entries, parts, strict=False):
                assert part is not None
                writer.write(entry.name, part)
    file.replace(directory / DECODER)
    seal(directory, recipe=recipe)


def quantized(tensors: Tensors, name: str) -> QuantizedTensor:
    """Return a quantized tensor (out, in)."""
    value = tensors[name]
    assert isinstance(value, QuantizedTensor)
    return value


def one_scale(name: str, times: float) -> Change:
    """Return a change: one random scale of a tensor is multiplied by a factor."""

    def change(tensors: Tensors, random: np.random.Generator) -> dict[str, QuantizedTensor]:
        value = quantized(tensors, name)
        scales = value.scales.copy()
        at = tuple(int(random.integers(n)) for n in scales.shape)
        scales[at] *= scales.dtype.type(times)
        return {name: replace(value, scales=scales)}

    return change


def all_scales(name: str, times: float) -> Change:
    """Return a change: every scale of a tensor is multiplied by a factor."""

    def change(tensors: Tensors, random: np.random.Generator) -> dict[str, QuantizedTensor]:
        value = quantized(tensors, name)
        return {name: replace(value, scales=value.scales * value.scales.dtype.type(times))}

    return change


def scales_reversed(name: str) -> Change:
    """Return a change: the scales of each row are reversed."""

    def change(tensors: Tensors, random: np.random.Generator) -> dict[str, QuantizedTensor]:
        value = quantized(tensors, name)
        return {name: replace(value, scales=np.ascontiguousarray(value.scales[:, ::-1]))}

    return change


def group_scales(name: str, times: float) -> Change:
    """Return a change: the scales of one random group of inputs, in every row, are multiplied by a factor."""

    def change(tensors: Tensors, random: np.random.Generator) -> dict[str, QuantizedTensor]:
        value = quantized(tensors, name)
        scales = value.scales.copy()
        scales[:, int(random.integers(scales.shape[1]))] *= scales.dtype.type(times)
        return {name: replace(value, scales=scales)}

    return change


def row_scales(name: str, times: float) -> Change:
    """Return a change: all scales of one random row are multiplied by a factor."""

    def change(tensors: Tensors, random: np.random.Generator) -> dict[str, QuantizedTensor]:
        value = quantized(tensors, name)
        scales = value.scales.copy()
        scales[int(random.integers(len(scales)))] *= scales.dtype.type(times)
        return {name: replace(value, scales=scales)}

    return change


def rows_rolled(name: str) -> Change:
    """Return a change: every row of a quantized matrix is taken from the row before it, as from a stale table."""

    def change(tensors: Tensors, random: np.random.Generator) -> dict[str, QuantizedTensor]:
        value = quantized(tensors, name)
        return {name: replace(value, codes=np.roll(value.codes, 1, 0), scales=np.roll(value.scales, 1, 0))}

    return change


def layers_swapped(one: int, other: int) -> Change:
    """Return a change: all tensors of two layers are swapped."""

    def change(tensors: Tensors, random: np.random.Generator) -> dict[str, np.ndarray | QuantizedTensor]:
        a, b = (f"backbone.layers.{layer}." for layer in (one, other))
        return {
            name.replace(old, new): tensors[name] for old, new in ((a, b), (b, a)) for name in tensors if name.startswith(old)
        }

    return change


def row_zeroed(name: str) -> Change:
    """Return a change: one random row of a quantized matrix becomes zeros."""

    def change(tensors: Tensors, random: np.random.Generator) -> dict[str, QuantizedTensor]:
        value = quantized(tensors, name)
        scales = value.scales.copy()
        scales[int(random.integers(len(scales)))] = 0
        return {name: replace(value, scales=scales)}

    return change


def fewer_bits(layer: int, bits: int) -> Change:
    """Return a change: the codes of a layer's matrices are reduced to fewer bits."""

    def change(tensors: Tensors, random: np.random.Generator) -> dict[str, QuantizedTensor]:
        changed = {}
        for name, value in tensors.items():
            if not name.startswith(f"backbone.layers.{layer}.") or not isinstance(value, QuantizedTensor):
                continue
            zero, most = value.scheme.zero_code, 1 << (bits - 1)
            codes = unpack(value.codes, value.scheme).astype(np.int32) - zero
            # Scaling the step of the codes is the same as scaling the scales.
            step = zero // most
            coarse = np.clip(np.round(codes / step), -most, most - 1) * step + zero
            changed[name] = replace(value, codes=pack(coarse.astype(np.uint8), value.scheme))
        return changed

    return change


def nibbles_swapped(name: str) -> Change:
    """Return a change: the two codes in every byte of a 4-bit tensor are swapped."""

    def change(tensors: Tensors, random: np.random.Generator) -> dict[str, QuantizedTensor]:
        value = quantized(tensors, name)
        return {name: replace(value, codes=(value.codes << 4) | (value.codes >> 4))}

    return change


def codes_off_by_one(name: str) -> Change:
    """Return a change: every code of a tensor is one too low, as with a wrong zero point."""

    def change(tensors: Tensors, random: np.random.Generator) -> dict[str, QuantizedTensor]:
        value = quantized(tensors, name)
        codes = np.maximum(unpack(value.codes, value.scheme), 1) - 1
        return {name: replace(value, codes=pack(codes.astype(np.uint8), value.scheme))}

    return change


def shifted(name: str, by: float) -> Change:
    """Return a change: a constant is added to a float tensor."""
    return lambda tensors, random: {name: np.asarray(tensors[name]) + np.float32(by)}


def zeroed(name: str) -> Change:
    """Return a change: a float tensor becomes zeros."""
    return lambda tensors, random: {name: np.zeros_like(np.asarray(tensors[name]))}


def swapped(one: str, other: str) -> Change:
    """Return a change: two tensors of the same shape are swapped."""
    return lambda tensors, random: {one: tensors[other], other: tensors[one]}


def on_tensors(change: Change) -> Callable[[Path, np.random.Generator], None]:
    """Return a fault on disk that applies a change to the decoder file."""
    return lambda directory, random: change_tensors(directory, change(Bundle.open(directory).decoder_tensors(), random))


def clips_at(clip: float) -> Callable[[Path, np.random.Generator], None]:
    """Return a fault on disk that clips the inputs of all matmuls at one magnitude."""

    def broken(directory: Path, random: np.random.Generator) -> None:
        bundle = Bundle.open(directory)
        changed = {
            name: replace(value, clips=np.full(value.scales.shape[1], clip, np.float32))
            for name, value in bundle.decoder_tensors().items()
            if isinstance(value, QuantizedTensor)
        }
        recipe = msgspec.structs.replace(bundle.manifest.recipe, activation_percentile=50.0)
        change_tensors(directory, changed, recipe)

    return broken


def no_rotation(directory: Path, random: np.random.Generator) -> None:
    """Remove the rotations from the recipe."""
    seal(directory, recipe=msgspec.structs.replace(Bundle.open(directory).manifest.recipe, rotations=()))


def other_prompt_style(directory: Path, random: np.random.Generator) -> None:
    """Set the prompt style of the base model."""
    bundle = Bundle.open(directory)
    prompt = msgspec.json.decode((directory / PROMPT).read_bytes(), type=PromptFile)
    (directory / PROMPT).write_bytes(msgspec.json.encode(msgspec.structs.replace(prompt, style="base")))
    seal(directory, model=msgspec.structs.replace(bundle.manifest.model, prompt_style="base"))


def other_end_token(directory: Path, random: np.random.Generator) -> None:
    """Set the token that ends an answer to another one."""
    prompt = msgspec.json.decode((directory / PROMPT).read_bytes(), type=PromptFile)
    (directory / PROMPT).write_bytes(msgspec.json.encode(msgspec.structs.replace(prompt, end_id=prompt.end_id + 1)))
    seal(directory)


def tokens_swapped(directory: Path, random: np.random.Generator) -> None:
    """Swap the ids of every two neighbouring merged tokens of the tokenizer, as of another training run."""
    tokenizer = msgspec.json.decode((directory / TOKENIZER).read_bytes())
    vocabulary = tokenizer["model"]["vocab"]
    merged = [token for token, number in sorted(vocabulary.items(), key=lambda pair: pair[1]) if len(token) > 1]
    for one, other in zip(merged[::2], merged[1::2], strict=False):
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (directory / TOKENIZER).write_bytes(msgspec.json.encode(tokenizer))
    seal(directory)


def of_few_images(directory: Path, random: np.random.Generator) -> None:
    """Replace the decoder by one that was calibrated on two images."""
    with tempfile.TemporaryDirectory() as folder:
        lines = LineSet.embedded(more=True).about(2)
        few = Path(folder) / "few.jsonl"
        few.write_bytes(b"\n".join(
            msgspec.json.encode(msgspec.structs.replace(line, image=line.image and str(lines.directory / line.image)))
            for line in lines.lines
        ))  # fmt: skip
        target = target_named(Bundle.open(directory).manifest.target)
        other = export_bundle("mini", target, Path(folder) / "other", calibration=few, golden=HELDOUT, golden_lines=2).directory
        shutil.copyfile(other / DECODER, directory / DECODER)
        seal(directory, recipe=Bundle.open(other).manifest.recipe)


def _on_graph(change: Callable[[Any, np.random.Generator], None]) -> Callable[[Path, np.random.Generator], None]:
    def broken(directory: Path, random: np.random.Generator) -> None:
        import onnx

        model = onnx.load(directory / VISION)
        change(model.graph, random)
        onnx.save(model, directory / VISION)
        seal(directory)

    return broken


def _swap_normalisations(graph: Any, random: np.random.Generator) -> None:
    """Swap mean and deviation of the two encoders, which a uint8 graph stores as factors and summands."""
    factors_and_summands = [i for i in graph.initializer if list(i.dims) == [1, 3, 1, 1]]
    first, second = factors_and_summands[:2], factors_and_summands[2:]
    names = [i.name for i in (*first, *second)]
    assert len(names) == 4
    for initializer, name in zip((*first, *second), names[2:] + names[:2], strict=True):
        initializer.name = name


def _random_projector_bias(graph: Any, random: np.random.Generator) -> None:
    from onnx import numpy_helper

    bias = [i for i in graph.initializer if i.name.startswith("projector.") and i.name.endswith(".bias")][-1]
    values = numpy_helper.to_array(bias)
    drawn = random.normal(values.mean(), values.std(), values.shape).astype(values.dtype)
    bias.CopyFrom(numpy_helper.from_array(drawn, bias.name))


def _projector_of_few_bits(graph: Any, random: np.random.Generator) -> None:
    from onnx import numpy_helper

    name = [node for node in graph.node if node.op_type == "MatMul"][-1].input[1]  # of the projector's last layer
    (weight,) = (i for i in graph.initializer if i.name == name)
    values = numpy_helper.to_array(weight)
    step = np.abs(values).max() / 31
    weight.CopyFrom(numpy_helper.from_array((np.round(values / step) * step).astype(values.dtype), weight.name))


graph_of_few_bits = _on_graph(_projector_of_few_bits)
swapped_normalisations = _on_graph(_swap_normalisations)
random_projector_bias = _on_graph(_random_projector_bias)


@contextmanager
def pixels_changed(change: Callable[[np.ndarray], np.ndarray]) -> Iterator[None]:
    """Change the input of the vision graph, (squares, size, size, 3) uint8, inside the block."""
    right = ImageTransform.pixels
    with patch.object(ImageTransform, "pixels", lambda self, image: np.ascontiguousarray(change(right(self, image)))):
        yield


@contextmanager
def products_cut() -> Iterator[None]:
    """Cut what enters the decoder to the 8 leading bits of bfloat16, where a kernel should round."""
    right = CpuDecoder._run

    def run(self: CpuDecoder, embeddings: np.ndarray, state: DecoderState, **options: Any) -> np.ndarray:
        cut = (np.ascontiguousarray(embeddings, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return right(self, cut, state, **options)

    with patch.object(CpuDecoder, "_run", run):
        yield


@contextmanager
def image_forgotten() -> Iterator[None]:
    """Reset the state between image and question."""
    right = CpuDecoder.prefill

    def prefill(self: CpuDecoder, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        return right(self, embeddings, state if len(embeddings) == 1 else state.copy())

    with patch.object(CpuDecoder, "prefill", prefill):
        yield


@contextmanager
def stale_convolution() -> Iterator[None]:
    """Keep the old inputs of the convolution in single steps; prefill is correct."""
    right = CpuDecoder.step

    def step(self: CpuDecoder, token: int, state: DecoderState) -> np.ndarray:
        before = state.conv.copy()
        logits = right(self, token, state)
        state.conv[:] = before
        return logits

    with patch.object(CpuDecoder, "step", step):
        yield


@contextmanager
def no_end_token() -> Iterator[None]:
    """Ignore the end token."""
    right = generate.generate

    def endless(decoder: Any, logits: Any, state: Any, end_id: int, limit: int, sampling: Any) -> Iterator[int]:
        return right(decoder, logits, state, -1, limit, sampling)

    with patch.object(predictions, "generate", endless):
        yield
