"""One token on a GPU: a few launches a layer between buffers that never move, so that a CUDA graph can replay them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from .kernels.conv_step import convolve_and_project, n_slices
from .kernels.embedding import look_up
from .kernels.gemv import multiply_one
from .kernels.rotation import norm_between_rotations, rotate_many
from .kernels.selective_state_update import recur_and_gate
from .state import GpuState, on_stream
from .weights import GpuLayer, GpuWeights

log = logging.getLogger(__name__)

_WARM_RUNS = 2  # kernels are compiled by the first


class Step:
    """Reads the token in `token` into the state that was pointed at, and leaves the logits after it in `logits`.

    Attributes:
        token: (1,) int64 on the GPU.
        logits: (vocab,) float32 on the GPU.
    """

    def __init__(self, weights: GpuWeights) -> None:
        """Allocate the buffers."""
        self._weights = weights
        c, device = weights.config, weights.device

        def buffer(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        def cell() -> torch.Tensor:
            return torch.zeros(1, dtype=torch.int64, device=device)

        self.token, self._conv_at, self._ssm_at = cell(), cell(), cell()
        self._residual, self._normed = buffer(1, c.d_model), buffer(1, c.d_model)
        self._xz, self._u = buffer(2 * c.d_inner), buffer(c.d_inner)
        self._partials = buffer(n_slices(weights.layers[0].x_proj), c.dt_rank + 2 * c.d_state)
        self._y, self._turned = buffer(1, c.d_inner), buffer(1, c.d_inner)
        self.logits = buffer(c.vocab)
        self._pointed_at: tuple[int, int] | None = None

    def point_at(self, state: GpuState) -> None:
        """Have the next runs read and change this state, which has to live until they are done."""
        addresses = state.tensors[0].data_ptr(), state.tensors[1].data_ptr()
        if addresses != self._pointed_at:
            self._conv_at.fill_(addresses[0])
            self._ssm_at.fill_(addresses[1])
            self._pointed_at = addresses

    def run(self) -> None:
        """Enqueue one token's launches."""
        weights = self._weights
        look_up(weights.embedding, self.token, self._residual)
        for index, layer in enumerate(weights.layers):
            self._layer(index, layer)
        self.head(self._residual)

    def _layer(self, index: int, layer: GpuLayer) -> None:
        eps, residual = self._weights.config.norm_eps, self._residual[0]
        multiply_one(layer.in_proj, residual, self._xz, norm=layer.norm, eps=eps)
        convolve_and_project(layer.x_proj, self._xz, self._conv_at, index, layer.taps, layer.conv_bias, self._u, self._partials)
        recur_and_gate(
            self._partials, layer.dt_proj.codes, layer.dt_bias, layer.A, layer.D, self._xz, self._u, self._ssm_at, index,
            self._y[0],
        )  # fmt: skip
        y = self._y
        if self._weights.rotates_out_proj:
            rotate_many(self._y, self._turned)
            y = self._turned
        multiply_one(layer.out_proj, y[0], residual, add=True)

    def head(self, residual: torch.Tensor) -> None:
        """Turn a residual stream behind the last layer, (1, d_model) float32, into `logits`."""
        weights = self._weights
        eps = weights.config.norm_eps
        if weights.rotates_residual:
            norm_between_rotations(residual, weights.norm_f, eps, self._normed)
            multiply_one(weights.head, self._normed[0], self.logits)
        else:
            multiply_one(weights.head, residual[0], self.logits, norm=weights.norm_f, eps=eps)


def captured(run: Callable[[], None], stream: torch.cuda.Stream | None) -> Callable[[], None]:
    """Return what replays the launches of `run` as one CUDA graph; `run` itself where there is no GPU.

    `run` is called a few times first, so whatever it changes has to be something nobody needs.
    """
    if stream is None:
        return run
    with on_stream(stream):
        for _ in range(_WARM_RUNS):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # others may go on working
        run()
    log.debug("captured a graph")
    return graph.replay
