"""A bundle's decoder in the plain torch model: the reference for other backends.

On a CPU the matrices are dequantized once. On a GPU their codes stay integers, a byte each, and every matmul dequantizes its
matrix: slow, but within a quarter of the memory and one matrix. States are in host memory and are copied in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bundle.reader import Bundle
from ..formats.hadamard import hadamard_matrix
from ..formats.packing import QuantizedTensor, unpack
from ..model.fused_kernels import fused_operations
from ..model.mamba import Mamba, MambaState
from .arguments import checked_embeddings, checked_tokens
from .decoder import DecoderState

_CPU = torch.device("cpu")
_EMBEDDING, _HEAD = "backbone.embedding", "lm_head"
_PROJECTIONS = (".in_proj", ".x_proj", ".out_proj")
# x (..., in) float32 -> (..., out) float32; for an embedding: tokens (...) int64 -> (..., d_model) float32
Forward = Callable[[Tensor], Tensor]


class TorchDecoder:
    """A bundle's weights in `cobra_edge.model.mamba`, float32."""

    name, activations = "torch", "float32"

    def __init__(self, bundle: Bundle, device: torch.device = _CPU) -> None:
        """Load the decoder. Raises BundleError if a tensor does not match."""
        self.config, self.device = bundle.manifest.model.mamba, device
        operations = fused_operations(device, self.config.d_inner, self.config.d_conv)
        with torch.device("meta"):
            self.model = Mamba(self.config, operations).eval()
        tensors = bundle.decoder_tensors()
        dense = {
            name: torch.from_numpy(_dense(value)).to(device)
            for name, value in tensors.items()
            if not self._stays_codes(name.removesuffix(".weight"), value)
        }
        self.model.load_state_dict(dense, strict=False, assign=True)
        if self.config.tied:
            self.model.lm_head.weight = self.model.backbone.embedding.weight
        for name, value in tensors.items():
            if name not in dense:
                assert isinstance(value, QuantizedTensor)
                self._keep_codes(name.removesuffix(".weight"), value)
        self._rotation: Tensor | None = None  # of the residual stream
        if bundle.manifest.recipe.rotates_out_proj:
            self._rotate_inputs_of_out_proj()
        if bundle.manifest.recipe.rotates_residual:
            self._rotation = self._rotation_of(self.config.d_model)
            self._turn_the_residual_around_norm_f(self._rotation)

    same_bits_however_cut = False

    @property
    def runs_on(self) -> str:
        """See `Decoder.runs_on`."""
        return self.device.type

    def _stays_codes(self, name: str, value: np.ndarray | QuantizedTensor) -> bool:
        """Return whether a matrix stays quantized. dt_proj does not: torch multiplies it without a module."""
        has_product = name in (_EMBEDDING, _HEAD) or name.endswith(_PROJECTIONS)
        return isinstance(value, QuantizedTensor) and has_product and self._multiplies_codes(value)

    def _multiplies_codes(self, value: QuantizedTensor) -> bool:
        """Return whether there is a matmul for a matrix as it is stored."""
        return self.device.type != "cpu" and value.scheme.code_format == "int"

    def _matmul_with(self, value: QuantizedTensor) -> Forward:
        """Return the matmul with a matrix that stays quantized, its codes unpacked."""
        codes = torch.tensor(unpack(value.codes, value.scheme), device=self.device)
        scales = torch.tensor(value.scales, device=self.device).float()[..., None]
        out, n_groups = value.scales.shape

        def matmul(x: Tensor) -> Tensor:
            values = (codes.float() - value.scheme.zero_code).reshape(out, n_groups, -1) * scales
            return x @ values.reshape(out, -1).T

        return matmul

    def _keep_codes(self, name: str, value: QuantizedTensor) -> None:
        matmul = self._matmul_with(value)
        if name != _EMBEDDING:
            _replace_forward(self.model.get_submodule(name), matmul)
            return
        _replace_forward(self.model.backbone.embedding, self._embedding_of(value))
        if self.config.tied:
            _replace_forward(self.model.lm_head, matmul)

    def _embedding_of(self, table: QuantizedTensor) -> Forward:
        def rows(tokens: Tensor) -> Tensor:
            found = table.rows(tokens.cpu().numpy().reshape(-1)).dequantize()
            return torch.from_numpy(found).reshape(*tokens.shape, found.shape[1]).to(self.device)

        return rows

    def _rotation_of(self, width: int) -> Tensor:
        """Return R as a matrix (width, width) float32: the reference for the fast transform of `rotate`."""
        matrix = hadamard_matrix(width)
        matrix /= np.float32(width**0.5)
        return torch.from_numpy(matrix).to(self.device)

    def _rotate_inputs_of_out_proj(self) -> None:
        """Rotate the input of every out_proj: y becomes R y."""
        rotation = self._rotation_of(self.config.d_inner)

        def rotated(_module: Any, inputs: tuple[Tensor]) -> Tensor:
            return inputs[0] @ rotation.T

        for name, module in self.model.named_modules():
            if name.endswith(".mixer.out_proj"):
                module.register_forward_pre_hook(rotated)

    def _turn_the_residual_around_norm_f(self, rotation: Tensor) -> None:
        """Rotate the residual stream back before norm_f, which has a weight, and rotate its output before the head."""
        norm = self.model.backbone.norm_f
        norm.register_forward_pre_hook(lambda _module, inputs: inputs[0] @ rotation)
        norm.register_forward_hook(lambda _module, _inputs, normed: normed @ rotation.T)

    def new_state(self, like: DecoderState | None = None) -> DecoderState:
        """See `Decoder.new_state`."""
        if like is None:
            return DecoderState.zeros(self.config)
        like.require(self.config)
        return like.host()

    @torch.inference_mode()
    def embed(self, tokens: list[int]) -> np.ndarray:
        """See `Decoder.embed`."""
        rows = self.model.embed(torch.from_numpy(checked_tokens(tokens, self.config)).to(self.device))
        return (rows if self._rotation is None else rows @ self._rotation).cpu().numpy()

    @torch.inference_mode()
    def _hidden(self, embeddings: np.ndarray, state: DecoderState) -> Tensor:
        rows = checked_embeddings(embeddings, self.config)
        state.require_writable(self.config)
        residual = torch.tensor(rows, device=self.device)
        if self._rotation is not None:
            residual = residual @ self._rotation.T
        with state.in_host_memory() as here:
            before = MambaState(*(tuple(torch.tensor(a, device=self.device)[:, None]) for a in (here.conv, here.ssm)))
            hidden, after = self.model.hidden(residual[None], before)
            for array, layers in zip((here.conv, here.ssm), (after.conv, after.ssm), strict=True):
                array[:] = torch.cat(layers).cpu().numpy()
            here.n_tokens += len(rows)
        return hidden[0]

    @torch.inference_mode()
    def prefill(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """See `Decoder.prefill`."""
        return self.model.lm_head(self._hidden(embeddings, state)[-1]).cpu().numpy()

    def step(self, token: int, state: DecoderState) -> np.ndarray:
        """See `Decoder.step`."""
        return self.prefill(self.embed([token]), state)

    @torch.inference_mode()
    def forward(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """See `Decoder.forward`."""
        return self.model.lm_head(self._hidden(embeddings, state)).cpu().numpy()


def _dense(value: np.ndarray | QuantizedTensor) -> np.ndarray:
    return value.dequantize() if isinstance(value, QuantizedTensor) else np.array(value, np.float32)


def _replace_forward(module: nn.Module, forward: Forward) -> None:
    """Replace a module's forward and free its weight; its hooks are kept."""
    module.forward = forward
    del module.weight
