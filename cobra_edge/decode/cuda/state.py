"""A decoder's state that lives on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from ...errors import InputError
from ...formats.model_config import MambaConfig
from ..decoder import DecoderState


class GpuState(DecoderState):
    """A state on a GPU: `conv` and `ssm` are copies in the host's memory, made when they are asked for.

    Attributes:
        tensors: (n_layer, d_inner, d_conv) and (n_layer, d_inner, d_state) float32, as in `DecoderState`.
        stream: work on it is done there, in order; None where the device has none.
    """

    def __init__(self, tensors: tuple[torch.Tensor, torch.Tensor], n_tokens: int, stream: torch.cuda.Stream | None) -> None:
        """Take tensors that belong to this state alone."""
        self.tensors, self.n_tokens, self.stream = tensors, n_tokens, stream

    @classmethod
    def blank(cls, config: MambaConfig, device: torch.device, stream: torch.cuda.Stream | None) -> GpuState:
        """Return the state before the first token."""
        with on_stream(stream):
            shapes = ((config.n_layer, config.d_inner, width) for width in (config.d_conv, config.d_state))
            conv, ssm = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes)
        return cls((conv, ssm), 0, stream)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.tensors[0].device

    @property
    def conv(self) -> np.ndarray:
        """A copy of the convolutions' last inputs."""
        return self._host(0)

    @property
    def ssm(self) -> np.ndarray:
        """A copy of the recurrent state."""
        return self._host(1)

    def _host(self, index: int) -> np.ndarray:
        with on_stream(self.stream):
            return self.tensors[index].to("cpu", copy=True).numpy()

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `DecoderState.shapes`."""
        conv, ssm = self.tensors
        return tuple(conv.shape), tuple(ssm.shape)

    def _require_memory(self) -> None:
        for name, tensor in zip(("conv", "ssm"), self.tensors, strict=True):
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                order = "contiguous" if tensor.is_contiguous() else "strided"
                raise InputError(
                    f"the state's {name} is {order} {tensor.dtype}, expected contiguous float32; take a state of `new_state`"
                )

    @contextmanager
    def in_host_memory(self) -> Iterator[DecoderState]:
        """Give a copy in the host's memory, from which this state is filled when the block ends well."""
        here = self.host()
        yield here
        self.fill(here)

    def copy(self) -> GpuState:
        """Return an independent copy, on the GPU too."""
        with on_stream(self.stream):
            conv, ssm = (tensor.clone() for tensor in self.tensors)
        return GpuState((conv, ssm), self.n_tokens, self.stream)

    def fill(self, state: DecoderState) -> None:
        """Become a copy of a state of the same shapes, on a GPU or in the host's memory."""
        if isinstance(state, GpuState):
            sources: tuple[torch.Tensor, ...] = state.tensors
            after = state.stream
        else:
            sources, after = (torch.tensor(state.conv), torch.tensor(state.ssm)), None
        with on_stream(self.stream):
            if self.stream is not None and after not in (None, self.stream):
                self.stream.wait_stream(after)
            for tensor, source in zip(self.tensors, sources, strict=True):
                tensor.copy_(source)
        self.n_tokens = state.n_tokens


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """Have work go to a stream of a GPU; where there is none, as it would."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


@contextmanager
def on_gpu(state: DecoderState, blank: GpuState) -> Iterator[GpuState]:
    """Give a state as one on the GPU: itself where it is there, else a copy, from which it is filled when the block ends well.

    Args:
        state: of the same model; `blank.shapes` says which shapes.
        blank: a state on the GPU that nobody needs, to take a host's.
    """
    if isinstance(state, GpuState) and state.device == blank.device:
        yield state
        return
    blank.fill(state)
    yield blank
    with state.in_host_memory() as here:
        here.conv[:], here.ssm[:], here.n_tokens = blank.conv, blank.ssm, blank.n_tokens
