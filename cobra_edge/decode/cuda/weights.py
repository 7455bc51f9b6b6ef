"""A bundle's decoder on the GPU: codes in the bundle's own bytes, all tensors in one block of memory.

The block is allocated first and filled tensor after tensor in slices, while what was read leaves the page cache: on a Jetson
file, cache and GPU share one memory, and a model that fits once does not fit twice.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...formats.model_config import MambaConfig
from ...formats.packing import QuantizedTensor
from ...formats.recipe import Recipe, StoredTensor, quantized_scheme, stored_tensors
from ..decoder import Weights
from .launch import Address, Queue
from .memory import DeviceBlock, Layout, copy_in, slices
from .rotations import Rotation, RotationSigns

_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"
_SLICE_BYTES = 8 << 20
WHOLE_ROW_SHIFT = 31
_FLOAT16_STEP = 8  # elements that rows of a float16 matrix are a multiple of


@dataclass(frozen=True)
class GpuMatrix:
    """A matrix as kernels get it.

    Attributes:
        codes: (out, in · bits / 8) bytes as a bundle packs them; of 16 bits float16, (out, row_stride).
        scales: (out, groups) float16; null of 16 bits.
        bits: of a weight: 3, 4, 8 or 16.
        shape: (out, in).
        group_shift: log2 of how many inputs share a scale, 31 for a whole row and for 16 bits.
    """

    codes: Address
    scales: Address
    bits: int
    shape: tuple[int, int]
    group_shift: int

    @property
    def row_stride(self) -> int:
        """How many elements rows of 16 bits are apart: behind the inputs lie zeros."""
        return _padded(self.shape[1])

    @property
    def read_width(self) -> int:
        """How many inputs of a row are read: with those zeros of 16 bits."""
        return self.row_stride if self.bits == 16 else self.shape[1]

    @property
    def layout(self) -> int:
        """What a kernel for one token is told of rows: group_shift, or of 16 bits the stride."""
        return self.row_stride if self.bits == 16 else self.group_shift


@dataclass(frozen=True)
class GpuLayer:
    """One layer's tensors.

    Attributes:
        norm: (d_model,) float32.
        in_proj, x_proj, out_proj: (2·d_inner, d_model), (dt_rank + 2·d_state, d_inner), (d_model, d_inner).
        taps, conv_bias: (d_inner, d_conv) and (d_inner,) float32, of the convolution.
        dt_proj: (d_inner, dt_rank), of 8 or 16 bits: it is small, and float16 here if stored in fewer or narrow.
        dt_bias, D: (d_inner,) float32.
        A: (d_inner, d_state) float32, negative: -exp(A_log).
    """

    norm: Address
    in_proj: GpuMatrix
    taps: Address
    conv_bias: Address
    x_proj: GpuMatrix
    dt_proj: GpuMatrix
    dt_bias: Address
    A: Address
    D: Address
    out_proj: GpuMatrix


@dataclass(frozen=True)
class GpuWeights:
    """All of a decoder on a GPU.

    Attributes:
        config: sizes.
        layers: in order.
        embedding, head: (vocab, d_model); the same where they are tied.
        norm_f: (d_model,) float32.
        residual_rotation, inner_rotation: of the residual stream and of out_proj's input, where the recipe rotates them.
        block: where all of it lies.
    """

    config: MambaConfig
    layers: tuple[GpuLayer, ...]
    embedding: GpuMatrix
    head: GpuMatrix
    norm_f: Address
    residual_rotation: Rotation | None
    inner_rotation: Rotation | None
    block: DeviceBlock


Source = Callable[[], np.ndarray]


class _Plan:
    """Which arrays go where, before there is a block: addresses are offsets until then."""

    def __init__(self) -> None:
        self.layout = Layout()
        self.sources: list[tuple[int, Source]] = []
        self.base = 0

    def put(self, nbytes: int, source: Source) -> Address:
        offset = self.layout.add(nbytes)
        self.sources.append((offset, source))
        return Address(self.base + offset)

    def floats(self, value: np.ndarray | QuantizedTensor, change: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Address:
        assert not isinstance(value, QuantizedTensor)
        return self.put(4 * value.size, lambda: np.ascontiguousarray(change(np.asarray(value, np.float32)), np.float32))

    def matrix(self, value: np.ndarray | QuantizedTensor, codes_of: tuple[int, ...] = (3, 4, 8)) -> GpuMatrix:
        n_in = value.shape[1]
        if isinstance(value, QuantizedTensor) and value.scheme.weight_bits in codes_of and value.scheme.in_blocks(n_in):
            group = value.scheme.group(n_in)
            codes = self.put(value.codes.nbytes, lambda: value.codes)
            scales = self.put(value.scales.nbytes, lambda: value.scales)
            shift = WHOLE_ROW_SHIFT if group == n_in else group.bit_length() - 1
            return GpuMatrix(codes, scales, value.scheme.weight_bits, value.shape, shift)
        n_out = value.shape[0]
        there = self.put(2 * n_out * _padded(n_in), lambda: _as_float16(value))
        return GpuMatrix(there, Address(0), 16, (n_out, n_in), WHOLE_ROW_SHIFT)

    def rotation(self, width: int) -> Rotation:
        signs = RotationSigns.of(width)

        def place(array: np.ndarray) -> Address:
            return self.put(array.nbytes, lambda: np.ascontiguousarray(array))

        forth, back, words, words_back = (place(a) for a in (signs.forth, signs.back, signs.words, signs.words_back))
        return Rotation(width, signs.m, signs.p, signs.base, signs.power, forth, back, words, words_back)


def _padded(n_in: int) -> int:
    return -(-n_in // _FLOAT16_STEP) * _FLOAT16_STEP


def _as_float16(value: np.ndarray | QuantizedTensor) -> np.ndarray:
    dense = value.dequantize() if isinstance(value, QuantizedTensor) else value
    n_out, n_in = dense.shape
    if dense.dtype == np.float16 and n_in == _padded(n_in):
        return np.ascontiguousarray(dense)
    rows = np.zeros((n_out, _padded(n_in)), np.float16)
    with np.errstate(over="ignore"):
        rows[:, :n_in] = dense
    return rows


def _planned(weights: Weights, plan: _Plan) -> Callable[[DeviceBlock], GpuWeights]:
    config, tensors = weights.config, weights.tensors
    embedding = plan.matrix(tensors[_EMBEDDING])
    head = embedding if config.tied else plan.matrix(tensors[_HEAD])
    norm_f = plan.floats(tensors["backbone.norm_f.weight"])
    layers = tuple(_layer(tensors, f"backbone.layers.{i}.", plan) for i in range(config.n_layer))
    residual = plan.rotation(config.d_model) if weights.recipe.rotates_residual else None
    inner = plan.rotation(config.d_inner) if weights.recipe.rotates_out_proj else None
    return lambda block: GpuWeights(config, layers, embedding, head, norm_f, residual, inner, block)


def _layer(tensors: Mapping[str, np.ndarray | QuantizedTensor], prefix: str, plan: _Plan) -> GpuLayer:
    mixer = prefix + "mixer."
    return GpuLayer(
        norm=plan.floats(tensors[prefix + "norm.weight"]),
        in_proj=plan.matrix(tensors[mixer + "in_proj.weight"]),
        taps=plan.floats(tensors[mixer + "conv1d.weight"]),
        conv_bias=plan.floats(tensors[mixer + "conv1d.bias"]),
        x_proj=plan.matrix(tensors[mixer + "x_proj.weight"]),
        dt_proj=plan.matrix(tensors[mixer + "dt_proj.weight"], codes_of=(8,)),
        dt_bias=plan.floats(tensors[mixer + "dt_proj.bias"]),
        A=plan.floats(tensors[mixer + "A_log"], lambda a_log: -np.exp(a_log)),
        D=plan.floats(tensors[mixer + "D"]),
        out_proj=plan.matrix(tensors[mixer + "out_proj.weight"]),
    )


def weight_bytes(config: MambaConfig, recipe: Recipe) -> int:
    """Return what a decoder's tensors take on a GPU, without reading one."""
    plan = _Plan()
    _planned(_hollow(config, recipe), plan)
    return plan.layout.nbytes


def _hollow(config: MambaConfig, recipe: Recipe) -> Weights:
    """Return weights of the right shapes and dtypes that take no memory."""

    def array(entry: StoredTensor) -> np.ndarray:
        return np.broadcast_to(np.zeros((), entry.dtype), entry.shape)

    tensors: dict[str, np.ndarray | QuantizedTensor] = {}
    for name, entries in stored_tensors(config, recipe).items():
        scheme = quantized_scheme(recipe, name)
        tensors[name] = array(entries[0]) if scheme is None else QuantizedTensor(array(entries[0]), array(entries[1]), scheme)
    return Weights(config, recipe, tensors, "a decoder without values")


def upload(weights: Weights, queue: Queue, file: Path | None) -> GpuWeights:
    """Copy a decoder's weights to the GPU.

    Args:
        weights: the tensors, perhaps mapped from a file.
        queue: of the GPU; it is done when this returns.
        file: what they are mapped from, to leave the page cache as it is read; None where they are in memory.

    Raises:
        CudaError: no room, or the GPU fails.
    """
    block = DeviceBlock(queue.gpu, weight_bytes(weights.config, weights.recipe), "the decoder's weights")
    plan = _Plan()
    plan.base = block.address
    built = _planned(weights, plan)(block)
    with _Forgetting(file) as forgetting:
        for offset, source in plan.sources:
            flat = source().reshape(-1).view(np.uint8)
            for begin, end in slices(flat.nbytes, _SLICE_BYTES):
                copy_in(block.address + offset + begin, flat[begin:end], queue.stream, "copying weights")
                queue.wait("copying weights")
                forgetting.done_with(flat[begin:end])
    return built


class _Forgetting:
    """Has a mapped file leave this process and the page cache, slice after slice; it is advice, and what fails does no harm.

    All of the file is named each time: the cache keeps large pages of which only a part is named.
    """

    def __init__(self, file: Path | None) -> None:
        self._descriptor: int | None = None
        self._view: mmap.mmap | None = None
        self._waiting = 0
        if file is not None and hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                self._descriptor = os.open(file, os.O_RDONLY)

    def __enter__(self) -> _Forgetting:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._descriptor is not None:
            self._forget()
            os.close(self._descriptor)

    def done_with(self, part: np.ndarray) -> None:
        """Note that a part of the mapping has been copied."""
        self._view = _mapping_of(part) or self._view
        self._waiting += part.nbytes
        if self._descriptor is not None and self._waiting >= _SLICE_BYTES:
            self._forget()

    def _forget(self) -> None:
        self._waiting = 0
        with suppress(OSError, ValueError):
            if self._view is not None:
                self._view.madvise(mmap.MADV_DONTNEED)
        with suppress(OSError):
            assert self._descriptor is not None
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _mapping_of(array: np.ndarray) -> mmap.mmap | None:
    """Return the mapping that an array looks into, or None."""
    base: object = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None
