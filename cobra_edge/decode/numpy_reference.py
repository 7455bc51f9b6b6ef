"""The decoder in plain numpy: runs with the base install, and is the float32 reference of every native kernel.

Activations, residual stream and recurrence are float32. Weights are dequantized: once if the decoder is small, otherwise layer
by layer for every token, which is slow.
"""

from __future__ import annotations

import logging

import numpy as np

from ..bundle.reader import Bundle
from ..formats.hadamard import rotate, unrotate
from ..formats.packing import QuantizedTensor
from .arguments import checked_embeddings, checked_tokens
from .decoder import DEFAULT_OPTIONS, DecoderOptions, DecoderState, Weights

log = logging.getLogger(__name__)

_KEEP_BYTES = 2 << 30  # a decoder of at most this size in float32 is dequantized once
_SMALLEST_MAGNITUDE = np.float32(1e-36)  # a group without a larger one is quantized to zeros: 127 / it would overflow
_SCAN_CHUNK_BYTES = 1 << 22  # precomputed decay factors; about the size of an L2 cache


def silu(x: np.ndarray) -> np.ndarray:
    """Return x · sigmoid(x), of the same shape (any) and dtype."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    """Return log(1 + exp(x)) without overflow, of the same shape (any) and dtype."""
    return np.logaddexp(np.zeros((), x.dtype), x)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Normalize x (..., width) by its RMS along the last axis (Zhang and Sennrich 2019); weight (width,); float32."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True, dtype=np.float32) + np.float32(eps)) * weight


def causal_conv(x: np.ndarray, state: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Convolve each channel with its last d_conv inputs, add the bias, apply SiLU; the state is updated in place.

    x is (seq, d_inner), state (d_inner, d_conv) newest last, weight (d_inner, d_conv), bias (d_inner,), all float32.
    Returns (seq, d_inner).
    """
    seq, d_conv = len(x), weight.shape[1]
    window = np.concatenate([state.T, x])
    out = np.broadcast_to(bias, x.shape).copy()
    for k in range(d_conv):
        out += window[k + 1 : k + 1 + seq] * weight[:, k]
    state[:] = window[-d_conv:].T
    return silu(out)


def selective_scan(u: np.ndarray, dt: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Compute h = exp(dt·A)·h + dt·B·u and y = C·h; h is updated in place (Gu and Dao 2023, algorithm 2).

    u, dt (seq, d_inner); A (d_inner, d_state) negative; B, C (seq, d_state); h (d_inner, d_state); all float32.
    Returns y (seq, d_inner).
    """
    y = np.empty_like(u)
    chunk = max(1, _SCAN_CHUNK_BYTES // A.nbytes)
    for start in range(0, len(u), chunk):
        part = slice(start, start + chunk)
        decay = np.exp(dt[part, :, None] * A)
        inflow = (dt[part] * u[part])[:, :, None] * B[part, None, :]
        for t in range(len(decay)):
            h *= decay[t]
            h += inflow[t]
            np.dot(h, C[start + t], out=y[start + t])
    return y


def round_activations(x: np.ndarray, group: int, clips: np.ndarray | None = None) -> np.ndarray:
    """Quantize x (seq, width) float32 to signed 8-bit codes, one scale per `group` inputs, and return them dequantized.

    The scale is a group's largest magnitude / 127. With clips (width / group,) float32 it is at most clip / 127, and values
    beyond the clip saturate. A group with a value that is not finite becomes NaN.
    """
    groups = x.reshape(len(x), -1, group)
    top = np.abs(groups).max(axis=2, keepdims=True)
    odd = ~np.isfinite(top)
    if odd.any():
        groups, top = np.where(odd, np.float32(0), groups), np.where(odd, np.float32(np.nan), top)
    if clips is not None:
        top = np.minimum(top, clips[:, None])
        groups = np.clip(groups, -top, top)
    codes = np.rint(groups * np.divide(127, top, out=np.zeros_like(top), where=top > _SMALLEST_MAGNITUDE))
    return (codes * (top / np.float32(127))).reshape(x.shape).astype(np.float32)


class NumpyDecoder:
    """The numpy decoder."""

    name, runs_on = "numpy", "cpu"
    same_bits_however_cut = False

    def __init__(self, source: Bundle | Weights, options: DecoderOptions = DEFAULT_OPTIONS) -> None:
        """Load the decoder; of the options only `activations` is used. Raises BundleError if a tensor does not match."""
        weights = Weights.of(source)
        self.config, self._recipe = weights.config, weights.recipe
        self.activations = options.activations_of(self._recipe)
        self._tensors = weights.tensors
        self._keep = self.config.n_parameters * 4 <= _KEEP_BYTES
        if not self._keep:
            log.warning("this decoder is dequantized layer by layer for every token, which is slow")
        self._dense: dict[str, np.ndarray] = {}
        for name, value in self._tensors.items():
            if name.endswith("A_log"):
                self._dense[name] = -np.exp(np.asarray(value))

    def _float(self, name: str) -> np.ndarray:
        """Return a tensor as float32."""
        if name in self._dense:
            return self._dense[name]
        value = self._tensors[name]
        dense = value.dequantize() if isinstance(value, QuantizedTensor) else value.astype(np.float32, copy=False)
        if self._keep:
            self._dense[name] = dense
        return dense

    def _multiply(self, x: np.ndarray, name: str) -> np.ndarray:
        """Return x (seq, in) times the transposed matrix, (seq, out); x is quantized first if `activations` says so."""
        weight = self._tensors[name]
        if self.activations == "int8" and isinstance(weight, QuantizedTensor):
            x = round_activations(x, weight.scheme.group(weight.shape[1]), weight.clips)
        return x @ self._float(name).T

    def new_state(self, like: DecoderState | None = None) -> DecoderState:
        """See `Decoder.new_state`."""
        if like is None:
            return DecoderState.zeros(self.config)
        like.require(self.config)
        return like.host()

    def embed(self, tokens: list[int]) -> np.ndarray:
        """See `Decoder.embed`."""
        table = self._tensors["backbone.embedding.weight"]
        rows = checked_tokens(tokens, self.config)
        found = table.rows(rows).dequantize() if isinstance(table, QuantizedTensor) else table[rows].astype(np.float32)
        return unrotate(found) if self._recipe.rotates_residual else found

    def _read(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """Return the residual stream after the last layer, in the basis of the stored weights."""
        rows = checked_embeddings(embeddings, self.config)
        state.require_writable(self.config)
        # NaN and infinity propagate to the logits, where they are refused.
        with state.in_host_memory() as here, np.errstate(invalid="ignore", over="ignore"):
            residual = self._blocks(rows, here)
            here.n_tokens += len(rows)
        return residual

    def _blocks(self, residual: np.ndarray, state: DecoderState) -> np.ndarray:
        c = self.config
        if self._recipe.rotates_residual:
            residual = rotate(residual)
        for i in range(c.n_layer):
            prefix = f"backbone.layers.{i}."
            mixer = prefix + "mixer."
            normed = rms_norm(residual, self._float(prefix + "norm.weight"), c.norm_eps)
            x, z = np.split(self._multiply(normed, mixer + "in_proj.weight"), 2, axis=1)
            taps, bias = self._float(mixer + "conv1d.weight")[:, 0], self._float(mixer + "conv1d.bias")
            u = causal_conv(x, state.conv[i], taps, bias)
            low, B, C = np.split(self._multiply(u, mixer + "x_proj.weight"), [c.dt_rank, c.dt_rank + c.d_state], axis=1)
            dt = softplus(self._multiply(low, mixer + "dt_proj.weight") + self._float(mixer + "dt_proj.bias"))
            y = selective_scan(u, dt, self._float(mixer + "A_log"), B, np.ascontiguousarray(C), state.ssm[i])
            y += self._float(mixer + "D") * u
            y *= silu(z)
            y = rotate(y) if self._recipe.rotates_out_proj else y
            residual = residual + self._multiply(y, mixer + "out_proj.weight")
        return residual

    def _head(self, residual: np.ndarray) -> np.ndarray:
        turned = self._recipe.rotates_residual
        own = unrotate(residual) if turned else residual
        normed = rms_norm(own, self._float("backbone.norm_f.weight"), self.config.norm_eps)
        name = "backbone.embedding.weight" if self.config.tied else "lm_head.weight"
        return self._multiply(rotate(normed) if turned else normed, name)

    def prefill(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """See `Decoder.prefill`."""
        return self._head(self._read(embeddings, state)[-1:])[0]

    def step(self, token: int, state: DecoderState) -> np.ndarray:
        """See `Decoder.step`."""
        return self.prefill(self.embed([token]), state)

    def forward(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """See `Decoder.forward`."""
        return self._head(self._read(embeddings, state))
