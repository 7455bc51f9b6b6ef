"""A rival's decoder as GGUF with random weights, written in blocks as llama.cpp stores them: no float file comes first."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .rival_shapes import BLOCKS, SHORT_CONVOLUTION, Decoder, RivalTensor

_POOL_BLOCKS = 1 << 16  # drawn of each format; larger tensors repeat them from other beginnings
_DEVIATION = 0.02  # of weights
_LONGEST = 1 << 20  # context that the file names
_MOSTLY_Q4_0 = 2  # llama.cpp's number of the file type
_PHI_ROTARY = 32  # of a head's 80 values
# Where a block's float16 scale lies, and the root mean square of a weight before it is multiplied.
_SCALE = {"Q4_0": (slice(0, 2), 4.6), "Q6_K": (slice(208, 210), 18.5 * 73.9)}


def write_rival(decoder: Decoder, file: Path) -> Path:
    """Write its GGUF unless it is there.

    Args:
        decoder: its shape.
        file: to write, atomically.

    Returns:
        The file.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.partial-") as stage:
            staged = Path(stage) / file.name
            _write(decoder, staged)
            staged.rename(file)
    return file


def _write(decoder: Decoder, file: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, decoder.architecture)
    _facts(writer, decoder)
    random = np.random.default_rng(0)
    pools = {name: _pool(name, random) for name in _SCALE}
    tensors = decoder.tensors()
    for name, tensor in tensors.items():
        dtype = np.float32 if tensor.format == "F32" else np.uint8
        kind = None if tensor.format == "F32" else gguf.GGMLQuantizationType[tensor.format]
        writer.add_tensor_info(name, _stored_shape(tensor), np.dtype(dtype), tensor.bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        writer.write_tensor_data(_values(name, tensor, pools, random))
    writer.close()


def _facts(writer: Any, decoder: Decoder) -> None:
    """Write the sizes under llama.cpp's keys."""
    writer.add_name("bench")
    writer.add_context_length(_LONGEST)
    writer.add_embedding_length(decoder.width)
    writer.add_block_count(decoder.layers)
    writer.add_feed_forward_length(decoder.feed_forward)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(decoder.vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(_MOSTLY_Q4_0)
    writer.add_head_count(decoder.heads)
    if decoder.architecture == "mamba":
        sizes = decoder.mamba
        writer.add_ssm_conv_kernel(sizes.d_conv)
        writer.add_ssm_inner_size(sizes.d_inner)
        writer.add_ssm_state_size(sizes.d_state)
        writer.add_ssm_time_step_rank(sizes.dt_rank)
        writer.add_ssm_dt_b_c_rms(False)
        return
    attends = [decoder.attends(i) for i in range(decoder.layers)]
    writer.add_head_count_kv(decoder.kv_heads if all(attends) else [decoder.kv_heads * a for a in attends])
    writer.add_key_length(decoder.head_size)
    writer.add_value_length(decoder.head_size)
    writer.add_rope_dimension_count(_PHI_ROTARY if decoder.architecture == "phi2" else decoder.head_size)
    writer.add_rope_freq_base(10000.0)
    if decoder.rope_sections is not None:
        writer.add_rope_dimension_sections(list(decoder.rope_sections))
    if decoder.attention_layers is not None:
        writer.add_shortconv_l_cache(SHORT_CONVOLUTION)


def _stored_shape(tensor: RivalTensor) -> tuple[int, ...]:
    """Return the shape in elements, or in bytes a row where it is made of blocks."""
    if tensor.format == "F32":
        return tensor.shape
    weights, size = BLOCKS[tensor.format]
    return (*tensor.shape[:-1], tensor.shape[-1] // weights * size)


def _pool(name: str, random: np.random.Generator) -> np.ndarray:
    """Return blocks of random codes, (blocks, bytes) uint8, whose weights have the deviation."""
    _, size = BLOCKS[name]  # type: ignore[index]
    blocks = random.integers(0, 256, (_POOL_BLOCKS, size), np.uint8)
    place, deviation = _SCALE[name]
    blocks[:, place] = np.array([_DEVIATION / deviation], np.float16).view(np.uint8)
    return blocks


def _values(name: str, tensor: RivalTensor, pools: dict[str, np.ndarray], random: np.random.Generator) -> np.ndarray:
    if tensor.format == "F32":
        if "norm" in name and name.endswith("weight"):
            return np.ones(tensor.shape, np.float32)
        values = (random.standard_normal(tensor.shape) * _DEVIATION).astype(np.float32)
        return -np.abs(values) - 1 if name.endswith("ssm_a") else values  # a state decays
    pool, (_, size) = pools[tensor.format], BLOCKS[tensor.format]
    blocks = (int(random.integers(len(pool))) + np.arange(tensor.bytes // size)) % len(pool)
    return pool[blocks].reshape(_stored_shape(tensor))
