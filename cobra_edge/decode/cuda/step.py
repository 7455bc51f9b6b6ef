"""One token on the GPU: a few launches a layer between buffers that never move, replayed as CUDA graphs.

A graph begins by copying what the host asks for (which state, which token, how to choose) from pinned memory, so a token costs
the host two launches and a wait.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from ...errors import InputError
from ...formats.model_config import MambaConfig
from ..sampling import NOT_FINITE, Sampling
from .calls import call
from .launch import Address, Graph, Queue, blocks_of
from .memory import DeviceBlock, Layout, copy_in, copy_out, pinned
from .state import GpuState
from .weights import GpuLayer, GpuMatrix, GpuWeights

# What the host asks for, and what it is told: the GPU has both as bytes in this order. `choice` is sampling.cu's struct.
_CHOICE = np.dtype([("temperature", "<f8"), ("top_p", "<f8"), ("uniform", "<f8"), ("top_k", "<i4"), ("unused", "<i4")])
_ASKED = np.dtype([("conv", "<u8"), ("ssm", "<u8"), ("choice", _CHOICE), ("token", "<i4"), ("unused", "<i4")])
_TOLD = np.dtype([("token", "<i4"), ("not_finite", "<i4"), ("top", "<f4"), ("unused", "<i4")])

_GEMV_THREADS, _GEMV_ROWS, _SPLIT_ROWS, _GEMV_TILE, _GEMV_HEAD = 128, 64, 16, 8192, 512
_CONV_CHANNELS, _CONV_HEAD = 128, 1024
_UPDATE_CHANNELS = 16
_EMBED_THREADS = 128
_SCAN_THREADS, _DRAW_THREADS = 256, 512
_MOST_SCAN_BLOCKS = 64
_INPUTS_A_BLOCK = {3: 64, 4: 32, 8: 16}


def rounded_bytes(n_in: int, bits: int) -> int:
    """Return the shared memory of n activations rounded to 16-bit integers, for codes of so many bits: rounded.cuh."""
    whole = blocks_of(n_in, 128) * 128
    return 2 * whole + 4 * (whole // 128) + 4 * (whole // _INPUTS_A_BLOCK[bits])


def step_bytes(config: MambaConfig) -> int:
    """Return what the buffers of one token take on the GPU."""
    return _Buffers(config, 0).nbytes


def pinned_bytes(config: MambaConfig) -> int:
    """Return the pinned memory of one token: what the host asks for, what it is told, and the logits."""
    return 256 + 4 * config.vocab


class _Buffers:
    """Where the buffers of one token lie."""

    def __init__(self, c: MambaConfig, base: int) -> None:
        layout = Layout()

        def room(n: int, itemsize: int = 4) -> Address:
            return Address(base + layout.add(n * itemsize))

        self.asked, self.told, self.arrived = room(_ASKED.itemsize, 1), room(_TOLD.itemsize, 1), room(2)
        self.residual, self.own, self.turned = room(c.d_model + 8), room(c.d_model), room(c.d_model)
        self.xz, self.u, self.y, self.turned_y = room(2 * c.d_inner), room(c.d_inner), room(c.d_inner), room(c.d_inner)
        width = c.dt_rank + 2 * c.d_state
        self.partials, self.projected = room(blocks_of(c.d_inner, _CONV_CHANNELS) * width), room(width)
        self.logits, self.weights, self.found = room(c.vocab), room(c.vocab, 8), room(2 * _MOST_SCAN_BLOCKS, 8)
        self.nbytes = layout.nbytes


class Step:
    """Reads a token into a state, and chooses the next one from the logits that leaves."""

    def __init__(self, weights: GpuWeights, queue: Queue) -> None:
        """Allocate the buffers. Raises CudaError where there is no room."""
        self._weights, self._queue = weights, queue
        c = weights.config
        self._block = DeviceBlock(queue.gpu, _Buffers(c, 0).nbytes, "the buffers of a token")
        self._at = _Buffers(c, self._block.address)
        call("clearing buffers", "cuMemsetD8Async", self._at.asked, 0, self._block.nbytes, queue.stream)
        queue.wait("clearing buffers")
        self._pinned = pinned(queue.gpu, pinned_bytes(c), "a token's inputs and outputs")
        self._asked = self._pinned[: _ASKED.itemsize].view(_ASKED)
        self._told = self._pinned[128 : 128 + _TOLD.itemsize].view(_TOLD)
        self._logits = self._pinned[256:].view(np.float32)
        self._conv_cell, self._ssm_cell = (_place(_ASKED, n, self._at.asked) for n in ("conv", "ssm"))
        self._token_cell, self._choice_cell = (_place(_ASKED, n, self._at.asked) for n in ("token", "choice"))

    def prepare(self, nobodys: GpuState) -> None:
        """Capture the graphs, now and not at the first token.

        Everything is run once before, on a state that nobody needs: a driver may load a kernel when it is first launched, which
        it must not while a graph is captured.
        """
        self._point_at(nobodys)
        self._asked["choice"] = (1.0, 1.0, 0.0, 0, 0)
        self._read_token()
        self._choose(drawn=True)
        self._queue.wait("trying the kernels")
        _ = self._read_graph, self._greedy_graph, self._drawn_graph

    @property
    def logits(self) -> Address:
        """(vocab,) float32 on the GPU."""
        return self._at.logits

    def read(self, token: int, state: GpuState) -> None:
        """Enqueue the reading of a token into a state, which has to live until it is done."""
        self._point_at(state)
        self._asked["token"] = token
        self._read_graph.launch()
        state.n_tokens += 1

    @property
    def residual(self) -> Address:
        """(d_model,) float32 on the GPU: what `read_residual` reads."""
        return self._at.residual

    @property
    def spare_row(self) -> Address:
        """(d_model,) float32 on the GPU that nobody needs between two tokens."""
        return self._at.own

    def read_residual(self, state: GpuState) -> None:
        """Read an embedding that is in `residual`, in the basis the weights are stored in; it is done on return."""
        self._point_at(state)
        self._fetch_asked()
        self._layers()
        self._queue.wait("reading an embedding")
        state.n_tokens += 1

    def logits_on_host(self) -> np.ndarray:
        """Wait for the logits, and return a copy, (vocab,) float32."""
        doing = "copying logits to the host"
        copy_out(self._logits, self._at.logits, self._queue.stream, doing)
        self._queue.wait(doing)
        return self._logits.copy()

    def put_logits(self, logits: np.ndarray) -> None:
        """Have other logits (vocab,) chosen from."""
        copy_in(self._at.logits, np.ascontiguousarray(logits, np.float32), self._queue.stream, "copying logits to the GPU")

    def choose(self, sampling: Sampling, uniform: float) -> int:
        """Choose a token from the logits by the rule of `decode.sampling.choose`. Raises InputError where one is not finite."""
        drawn = sampling.temperature > 0
        self._asked["choice"] = (sampling.temperature, sampling.top_p, uniform, min(sampling.top_k, 2**31 - 1), 0)
        (self._drawn_graph if drawn else self._greedy_graph).launch()
        self._queue.wait("choosing a token")
        if self._told["not_finite"][0]:
            raise InputError(NOT_FINITE)
        return int(self._told["token"][0])

    @cached_property
    def _read_graph(self) -> Graph:
        return self._queue.capture(self._read_token)

    @cached_property
    def _greedy_graph(self) -> Graph:
        return self._queue.capture(lambda: self._choose(drawn=False))

    @cached_property
    def _drawn_graph(self) -> Graph:
        return self._queue.capture(lambda: self._choose(drawn=True))

    def _point_at(self, state: GpuState) -> None:
        self._asked["conv"], self._asked["ssm"] = state.conv_address, state.ssm_address

    def _fetch_asked(self) -> None:
        copy_in(self._at.asked, self._pinned[: _ASKED.itemsize], self._queue.stream, "copying a token to the GPU")

    def _read_token(self) -> None:
        self._fetch_asked()
        embed_rows(self._queue, self._weights.embedding, self._token_cell, 1, self._at.residual)
        self._layers()
        self.head(self._at.residual)

    def _layers(self) -> None:
        for index, layer in enumerate(self._weights.layers):
            self._layer(index, layer)

    def _layer(self, index: int, layer: GpuLayer) -> None:
        at, inner = self._at, self._weights.inner_rotation
        self._multiply(layer.in_proj, at.residual, at.xz, norm=layer.norm, mean_of=at.residual)
        self._convolve(index, layer)
        self._update(index, layer)
        if inner is not None:
            inner.rotate(self._queue, at.y, at.turned_y, 1)
        self._multiply(layer.out_proj, at.y if inner is None else at.turned_y, at.residual, add=True)

    def head(self, residual: Address) -> None:
        """Enqueue the logits of a residual stream behind the last layer, (d_model,) float32."""
        weights, at = self._weights, self._at
        rotation = weights.residual_rotation
        if rotation is None:
            self._multiply(weights.head, residual, at.logits, norm=weights.norm_f, mean_of=residual)
            return
        # A rotation changes no mean of squares: the norm's division is left to the product.
        rotation.rotate(self._queue, residual, at.own, 1, back=True, after=weights.norm_f)
        rotation.rotate(self._queue, at.own, at.turned, 1)
        self._multiply(weights.head, at.turned, at.logits, mean_of=residual)

    def _multiply(
        self,
        matrix: GpuMatrix,
        x: Address,
        out: Address,
        *,
        norm: Address | None = None,
        mean_of: Address | None = None,
        add: bool = False,
    ) -> None:
        n_out, n_in = matrix.shape
        split = blocks_of(n_out, _GEMV_ROWS) < 2 * self._queue.gpu.multiprocessors
        arrays = (matrix.codes,) if matrix.bits == 16 else (matrix.codes, matrix.scales)
        held = min(n_in, _GEMV_TILE)
        room = 4 * min(matrix.row_stride, _GEMV_TILE) if matrix.bits == 16 else rounded_bytes(held, matrix.bits)
        self._queue.launch(
            f"gemv_w{matrix.bits}" + "_split" * split, (blocks_of(n_out, _SPLIT_ROWS if split else _GEMV_ROWS), 1, 1),
            _GEMV_THREADS, *arrays, x, norm, mean_of, float(self._weights.config.norm_eps), out, n_out, n_in, matrix.layout,
            int(add), shared_bytes=_GEMV_HEAD + room,
        )  # fmt: skip

    def _convolve(self, index: int, layer: GpuLayer) -> None:
        c, at, matrix = self._weights.config, self._at, layer.x_proj
        arrays = (matrix.codes,) if matrix.bits == 16 else (matrix.codes, matrix.scales)
        room = 0 if matrix.bits == 16 else rounded_bytes(_CONV_CHANNELS, matrix.bits)
        self._queue.launch(
            f"conv_step_w{matrix.bits}", (blocks_of(c.d_inner, _CONV_CHANNELS), 1, 1), _CONV_CHANNELS, *arrays, at.xz,
            self._conv_cell, index, layer.taps, layer.conv_bias, at.u, at.partials, at.projected, at.arrived,
            c.dt_rank + 2 * c.d_state, c.d_inner, c.d_conv, matrix.layout, shared_bytes=_CONV_HEAD + room,
        )  # fmt: skip

    def _update(self, index: int, layer: GpuLayer) -> None:
        c, at, matrix = self._weights.config, self._at, layer.dt_proj
        arrays = (matrix.codes,) if matrix.bits == 16 else (matrix.codes, matrix.scales)
        room = blocks_of(4 * (c.dt_rank + 2 * c.d_state), 16) * 16
        room += 0 if matrix.bits == 16 else rounded_bytes(c.dt_rank, matrix.bits)
        self._queue.launch(
            f"selective_state_update_w{matrix.bits}", (blocks_of(c.d_inner, _UPDATE_CHANNELS), 1, 1), 8 * _UPDATE_CHANNELS,
            at.projected, *arrays, layer.dt_bias, layer.A, layer.D, at.xz, at.u, self._ssm_cell, index, at.y, c.d_inner,
            c.dt_rank, c.d_state, matrix.layout, shared_bytes=room,
        )  # fmt: skip

    def _choose(self, *, drawn: bool) -> None:
        vocab, at, queue = self._weights.config.vocab, self._at, self._queue
        self._fetch_asked()
        token, not_finite, top = (_place(_TOLD, n, at.told) for n in ("token", "not_finite", "top"))
        grid = (min(blocks_of(vocab, _SCAN_THREADS), _MOST_SCAN_BLOCKS), 1, 1)
        arrived = Address(at.arrived + 4)
        queue.launch(
            "choose_likeliest", grid, _SCAN_THREADS, at.logits, vocab, at.found, arrived, token, not_finite, top,
            shared_bytes=16 + 2 * 8 * (_SCAN_THREADS // 32),
        )  # fmt: skip
        if drawn:
            choice = self._choice_cell
            queue.launch("choose_weigh", grid, _SCAN_THREADS, at.logits, vocab, top, choice, at.weights)
            queue.launch(
                "choose_drawn", (1, 1, 1), _DRAW_THREADS, at.logits, at.weights, vocab, choice, not_finite, token,
                shared_bytes=2 * 3 * 8 * (_DRAW_THREADS // 32),
            )  # fmt: skip
        copy_out(self._pinned[128 : 128 + _TOLD.itemsize], at.told, queue.stream, "copying a token to the host")


def _place(struct: np.dtype, name: str, base: Address) -> Address:
    """Return where a field lies of a struct that begins at `base`."""
    assert struct.fields is not None
    return Address(base + struct.fields[name][1])


def embed_rows(queue: Queue, matrix: GpuMatrix, tokens: Address, n: int, out: Address) -> None:
    """Enqueue the look-up of n tokens (n,) int32: out (n, d_model) float32, as stored; of float16 rows (n, row_stride)."""
    width = matrix.read_width
    arguments = (matrix.codes, matrix.scales, tokens, out, width, matrix.group_shift)
    queue.launch(f"embed_rows_w{matrix.bits}", (n, 1, 1), _EMBED_THREADS, *arguments)
