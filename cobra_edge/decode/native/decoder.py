"""The compiled decoder over arrays in memory. What it is given is checked here as far as numpy knows it, the rest in C++."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .arguments import array, in_range, memory
from .library import COUNTS, Array, Sizes, library, require

_MOST = 2**63 - 1
_Last = tuple[Callable[[], np.ndarray | None], Callable[[], np.ndarray | None], tuple[int, int, int, int]]


class CompiledDecoder:
    """A quantized Mamba over borrowed arrays. Several threads may use it; forwards run one after another.

    Attributes:
        kernels: the instruction set.
        threads: their number.
    """

    def __init__(
        self, sizes: Mapping[str, Any], tensors: Mapping[str, np.ndarray], kernels: str, threads: int, int8_activations: bool
    ) -> None:
        """Check the tensors and start the threads.

        Args:
            sizes: the fields of a `MambaConfig`.
            tensors: by name; a matrix is NAME of float16 or float32, or NAME.codes (out, n) uint8, NAME.scales (out, groups)
                float16 and optionally NAME.clips (groups,) float32; all others float32.
            kernels: name of an instruction set, or "auto".
            threads: 1 to 1024.
            int8_activations: whether the inputs of quantized matrices are quantized.

        Raises:
            ValueError, TypeError: a size or tensor that does not match.
            IndexError, MemoryError, RuntimeError: as the library found.
        """
        lib = library()
        counts = {name: in_range(name, sizes[name], -_MOST, _MOST) for name in COUNTS}
        config = Sizes(**counts, norm_eps=float(sizes["norm_eps"]), tied=bool(sizes["tied"]))
        self.threads = in_range("threads", threads, 1, 1024)
        self._arrays = dict(tensors)  # keeps them alive
        described = (Array * len(tensors))(*(array(name, values) for name, values in tensors.items()))
        names = (ctypes.c_char_p * len(tensors))(*(name.encode() for name in tensors))
        handle = ctypes.c_void_p()
        require(
            lib.cobra_open(
                config, names, described, len(tensors), kernels.encode(), self.threads, int8_activations, ctypes.byref(handle)
            )
        )
        self._handle = handle.value
        # Not at exit: a daemon thread may still be in a forward.
        weakref.finalize(self, lib.cobra_close, self._handle).atexit = False
        self.kernels: str = lib.cobra_kernels_of(self._handle).decode()
        self._step, self._forward = lib.cobra_step, lib.cobra_forward
        self._vocab, self._d_model = config.vocab, config.d_model
        rows = (config.n_layer, config.d_inner)
        self._conv_shape, self._ssm_shape = (*rows, config.d_conv), (*rows, config.d_state)
        self._last: _Last = (lambda: None, lambda: None, (0, 0, 0, 0))

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """Return the embeddings (n, d_model) float32 of tokens (n,) int64.

        Raises:
            IndexError: a token outside the vocabulary.
            TypeError: not such an array.
        """
        if not isinstance(tokens, np.ndarray) or tokens.dtype != np.int64 or tokens.ndim != 1 or not tokens.flags.c_contiguous:
            raise TypeError("tokens must be a contiguous array (n,) of int64")
        out = np.empty((len(tokens), self._d_model), np.float32)
        require(library().cobra_embed(self._handle, tokens.ctypes.data, len(tokens), out.ctypes.data))
        return out

    def step(self, token: int, conv: np.ndarray, ssm: np.ndarray) -> np.ndarray:
        """Read one token; return logits (vocab,) float32. The state is as for `forward`. Raises IndexError, ValueError."""
        logits = np.empty(self._vocab, np.float32)
        token = in_range("token", token, -_MOST, _MOST)
        require(self._step(self._handle, token, *self._state(conv, ssm), memory(logits)))
        return logits

    def forward(self, embeddings: np.ndarray, conv: np.ndarray, ssm: np.ndarray, every_position: bool) -> np.ndarray:
        """Read embeddings.

        Args:
            embeddings: (n, d_model) float32, n at least 1.
            conv, ssm: (n_layer, d_inner, d_conv) and (n_layer, d_inner, d_state) float32, updated in place.
            every_position: whether to return logits (n, vocab), else (vocab,) of the last position; float32.

        Raises:
            ValueError: arrays of another shape, dtype or order.
        """
        n = len(embeddings) if isinstance(embeddings, np.ndarray) and embeddings.ndim == 2 else 0
        if n == 0 or embeddings.shape[1] != self._d_model:
            raise ValueError("embeddings must be (seq, d_model) with at least one position")
        if embeddings.dtype != np.float32 or not embeddings.flags.c_contiguous:
            raise ValueError("embeddings must be contiguous float32")
        logits = np.empty((n, self._vocab) if every_position else self._vocab, np.float32)
        state = self._state(conv, ssm)
        require(self._forward(self._handle, embeddings.ctypes.data, n, *state, memory(logits), bool(every_position)))
        return logits

    def _state(self, conv: np.ndarray, ssm: np.ndarray) -> tuple[int, int, int, int]:
        """Return addresses and sizes of the state's arrays, kept from the token before: numpy takes long to tell them."""
        last_conv, last_ssm, found = self._last
        if last_conv() is not conv or last_ssm() is not ssm:
            found = *_updated("conv", conv, self._conv_shape), *_updated("ssm", ssm, self._ssm_shape)
            self._last = weakref.ref(conv), weakref.ref(ssm), found
        return found


def _updated(name: str, values: np.ndarray, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return address and size of an array that the decoder updates. Raises ValueError if it is not of that shape."""
    if not isinstance(values, np.ndarray) or values.shape != shape:
        raise ValueError(f"the state's {name} is not of this model's shape")
    if values.dtype != np.float32 or not values.flags.carray:
        raise ValueError(f"the state's {name} must be writable contiguous float32")
    return values.ctypes.data, values.size
