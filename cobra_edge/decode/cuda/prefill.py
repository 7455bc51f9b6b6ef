"""Many tokens on the GPU: products on tensor cores in float16, everything that goes token after token in float32."""

from __future__ import annotations

from functools import partial

from ...formats.model_config import MambaConfig
from .launch import Address, Queue, blocks_of
from .layer_table import LayerTable
from .memory import DeviceBlock, Layout
from .state import GpuState
from .tiles import (
    ROW_THREADS,
    GemmLaunch,
    convolution_launch,
    gemm_launch,
    most_part_floats,
    most_scan_chunks,
    norm_shared_bytes,
    rotation_shared_bytes,
    scan_launch,
)
from .weights import GpuLayer, GpuMatrix, GpuWeights

CHUNK = 2048  # tokens that go through the layers together: what bounds the memory of a long prompt
LOGITS_CHUNK = 256  # positions whose logits are on the GPU together
_HALF, _FLOAT, _ADD, _SOFTPLUS, _PART = range(5)  # what becomes of a product: gemm.cu
_SUM_THREADS = 128
_STEP = 8  # elements that rows of float16 are a multiple of


class Prefill:
    """The layers over chunks of tokens.

    Its buffers are made for the longest chunk so far.
    """

    def __init__(self, weights: GpuWeights, queue: Queue) -> None:
        """Take what runs; nothing is allocated."""
        self._weights, self._queue = weights, queue
        self._table = LayerTable(weights.layers, weights.config)
        self._room: _Room | None = None

    @property
    def why_not(self) -> str | None:
        """Why prompts of this model go token by token, or None."""
        c, rotation = self._weights.config, self._weights.inner_rotation
        if c.d_model % _STEP or c.d_inner % _STEP:
            return f"widths {c.d_model} and {c.d_inner} are no multiples of {_STEP}"
        if rotation is not None and rotation_shared_bytes(c.d_inner) > self._queue.gpu.most_shared_bytes:
            return f"a rotation of {c.d_inner} channels does not fit shared memory"
        return None

    def room(self, tokens: int) -> _Room:
        """Return buffers for a chunk of so many tokens, whatever is in them. Raises CudaError where there is no room."""
        if self._room is None or tokens > self._room.tokens:
            self._room = None  # given back before more is taken
            self._room = _Room(self._weights.config, self._queue, tokens)
        return self._room

    def run_layers(self, room: _Room, tokens: int, state: GpuState) -> None:
        """Enqueue a chunk of tokens through all layers.

        Args:
            room: its residual stream (tokens, d_model) float32, in the basis the weights are stored in, becomes what is behind
                the last layer.
            tokens: of the chunk.
            state: read and changed; its `n_tokens` too.
        """
        table = self._table
        table.point_at(state)
        kinds = [self._queue.note(partial(self._layer, room, tokens, layer)) for layer in table.kinds]
        self._queue.repeat(kinds, table.kind_of, table.rows)
        state.n_tokens += tokens

    def logits(self, room: _Room, first: int, n: int) -> None:
        """Enqueue the logits after n tokens of the residual stream from `first` on: the room's logits (n, vocab) float32."""
        weights, c, queue = self._weights, self._weights.config, self._queue
        rows = Address(room.residual + 4 * c.d_model * first)
        rotation, eps = weights.residual_rotation, float(c.norm_eps)
        if rotation is None:
            self._norm(rows, weights.norm_f, room.normed, n)
        else:
            queue.launch(
                "norm_between_rotations", (n, 1, 1), ROW_THREADS, rows, rotation.words, rotation.words_back, weights.norm_f,
                room.normed, rotation.m, rotation.p, c.d_model, c.d_model, 1, eps,
                shared_bytes=rotation_shared_bytes(c.d_model, with_norm=True),
            )  # fmt: skip
        self._multiply(room, weights.head, room.normed, c.d_model, room.logits, c.vocab, n, _FLOAT)

    def _layer(self, room: _Room, tokens: int, layer: GpuLayer) -> None:
        c, queue, inner = self._weights.config, self._queue, self._weights.inner_rotation
        self._norm(room.residual, layer.norm, room.normed, tokens)
        self._multiply(room, layer.in_proj, room.normed, c.d_model, room.xz, 2 * c.d_inner, tokens, _HALF)
        kernel, grid, threads, length = convolution_launch(c.d_inner, c.d_conv, tokens)
        queue.launch(
            kernel, (*grid, 1), threads, room.xz, self._table.conv, layer.taps, layer.conv_bias, room.u, tokens, length,
            c.d_inner, c.d_conv, 2 * c.d_inner,
        )  # fmt: skip
        self._project(room, layer, tokens)
        self._multiply(room, layer.dt_proj, room.low, room.low_stride, room.delta, c.d_inner, tokens, _SOFTPLUS, layer.dt_bias)
        self._scan(room, layer, tokens)
        if inner is not None:
            queue.launch(
                "rotate_rows", (tokens, 1, 1), ROW_THREADS, room.y, inner.words, room.y, inner.m, inner.p, c.d_inner, c.d_inner,
                1, 1, shared_bytes=rotation_shared_bytes(c.d_inner),
            )  # fmt: skip
        self._multiply(room, layer.out_proj, room.y, c.d_inner, room.residual, c.d_model, tokens, _ADD)

    def _norm(self, x: Address, weight: Address, out: Address, tokens: int) -> None:
        c = self._weights.config
        arguments = (x, weight, out, c.d_model, c.d_model, float(c.norm_eps))
        self._queue.launch("norm_rows", (tokens, 1, 1), ROW_THREADS, *arguments, shared_bytes=norm_shared_bytes())

    def _project(self, room: _Room, layer: GpuLayer, tokens: int) -> None:
        c, matrix = self._weights.config, layer.x_proj
        launch = self._launch(matrix, tokens)
        width = matrix.shape[0]
        self._enqueue(launch, matrix, room.u, c.d_inner, room.parts, width, tokens, _PART, None)
        grid = (blocks_of(room.low_stride + 2 * room.states, _SUM_THREADS), tokens, 1)
        self._queue.launch(
            "split_projection", grid, _SUM_THREADS, room.parts, room.low, room.bc, launch.splits, tokens, c.dt_rank,
            room.low_stride, c.d_state, room.states,
        )  # fmt: skip

    def _scan(self, room: _Room, layer: GpuLayer, tokens: int) -> None:
        c, ssm = self._weights.config, self._table.ssm
        launch = scan_launch(c.d_inner, c.d_state, tokens, self._queue.gpu.multiprocessors)
        z = Address(room.xz + 2 * c.d_inner)
        if launch.chunks > 1:
            self._queue.launch(
                "scan_chunks", (launch.blocks, launch.chunks - 1, 1), launch.threads, room.u, room.delta, layer.A, room.bc, ssm,
                room.local, room.sums, launch.length, c.d_inner, c.d_state, launch.lanes, c.d_inner,
            )  # fmt: skip
        self._queue.launch(
            "scan_rows", (launch.blocks, launch.chunks, 1), launch.threads, room.u, room.delta, layer.A, room.bc, layer.D, z,
            ssm, room.local, room.sums, room.y, tokens, launch.length, c.d_inner, c.d_state, launch.lanes, c.d_inner,
            2 * c.d_inner, c.d_inner,
        )  # fmt: skip

    def _launch(self, matrix: GpuMatrix, tokens: int) -> GemmLaunch:
        return gemm_launch(matrix.bits, matrix.shape[0], matrix.read_width, tokens, self._queue.gpu.multiprocessors)

    def _multiply(
        self,
        room: _Room,
        matrix: GpuMatrix,
        x: Address,
        x_stride: int,
        out: Address,
        out_stride: int,
        tokens: int,
        epilogue: int,
        bias: Address | None = None,
    ) -> None:
        """Enqueue out = x (tokens, in) float16 times the transposed matrix; sums of parts where that fills the GPU."""
        launch, n_out = self._launch(matrix, tokens), matrix.shape[0]
        if launch.splits == 1 or epilogue == _SOFTPLUS:
            self._enqueue(launch, matrix, x, x_stride, out, out_stride, tokens, epilogue, bias)
            return
        self._enqueue(launch, matrix, x, x_stride, room.parts, n_out, tokens, _PART, None)
        grid = (blocks_of(n_out, _SUM_THREADS), tokens, 1)
        self._queue.launch(
            "sum_splits", grid, _SUM_THREADS, room.parts, out, launch.splits, tokens, n_out, out_stride, epilogue
        )

    def _enqueue(
        self,
        launch: GemmLaunch,
        matrix: GpuMatrix,
        x: Address,
        x_stride: int,
        out: Address,
        out_stride: int,
        tokens: int,
        epilogue: int,
        bias: Address | None,
    ) -> None:
        n_in = matrix.read_width
        whole = epilogue == _SOFTPLUS  # not the sum of parts
        grid = (*launch.grid[:2], 1) if whole else launch.grid
        inputs = blocks_of(n_in, 128) * 128 if whole else launch.inputs_a_split
        self._queue.launch(
            launch.kernel, grid, launch.tile.threads, matrix.codes, matrix.scales, x, out, bias, matrix.shape[0], n_in,
            matrix.group_shift, tokens, x_stride, out_stride, epilogue, inputs, shared_bytes=launch.tile.shared_bytes,
        )  # fmt: skip


class _Places:
    """Where the buffers of one chunk lie; they do for every shorter one.

    Attributes:
        tokens: of the chunk.
    """

    def __init__(self, c: MambaConfig, tokens: int, multiprocessors: int, base: int) -> None:
        layout, self.tokens = Layout(), tokens
        width = c.dt_rank + 2 * c.d_state  # x_proj leaves a part even where it is not cut
        chunks = most_scan_chunks(c.d_inner, c.d_state, tokens, multiprocessors)
        chunks = chunks if chunks > 1 else 0

        def rows(width: int, itemsize: int) -> Address:
            return Address(base + layout.add(tokens * width * itemsize))

        def room(n: int) -> Address:
            return Address(base + layout.add(4 * n))

        self.low_stride = blocks_of(c.dt_rank, _STEP) * _STEP
        self.states = scan_launch(c.d_inner, c.d_state, 1, 1).states
        self.residual, self.entering, self.normed = rows(c.d_model, 4), rows(c.d_model, 4), rows(c.d_model, 2)
        self.xz, self.u, self.y = rows(2 * c.d_inner, 2), rows(c.d_inner, 2), rows(c.d_inner, 2)
        self.low, self.bc, self.delta = rows(self.low_stride, 2), rows(2 * self.states, 4), rows(c.d_inner, 4)
        self.parts = room(max(tokens * width, most_part_floats(multiprocessors)))
        self.local, self.sums = room(chunks * self.states * c.d_inner), room(chunks * c.d_inner)
        self.logits = room(min(tokens, LOGITS_CHUNK) * c.vocab)
        self.nbytes = layout.nbytes


class _Room(_Places):
    """Buffers of one chunk, shared by all layers."""

    def __init__(self, c: MambaConfig, queue: Queue, tokens: int) -> None:
        """Allocate them. Raises CudaError where there is no room."""
        multiprocessors = queue.gpu.multiprocessors
        nbytes = _Places(c, tokens, multiprocessors, 0).nbytes
        self._block = DeviceBlock(queue.gpu, nbytes, f"a prompt of {tokens} tokens")
        super().__init__(c, tokens, multiprocessors, self._block.address)


def prefill_bytes(config: MambaConfig, multiprocessors: int, tokens: int = CHUNK) -> int:
    """Return what the buffers take of the longest chunk of a prompt of so many tokens."""
    return _Places(config, min(tokens, CHUNK), multiprocessors, 0).nbytes
