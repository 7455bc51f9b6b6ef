"""Peers that quantize torch's Linear layers: torchao and HQQ, in this process, on the CPU.

As in transformers, embedding and head stay in float; so does dt_proj, whose input is narrower than a group. Quantized layers
run in float16 through the matmul of the library, the others in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cobra_edge.environment.requirements import install_hint
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.model.mamba import Mamba, MambaState, Mixer
from cobra_edge.suite.tokenized import TokenizedSuite

from .quality_llamacpp import OnLines, RunnerOutput
from .stored_bits import with_float_rest

_QUANTIZED = ("in_proj", "x_proj", "out_proj")
# Takes a float16 layer; returns its replacement and the bytes it stores.
Quantizer = Callable[[nn.Linear], tuple[nn.Module, int]]


@dataclass(frozen=True)
class TorchPeer:
    """One way to quantize with a library; `quantizer` imports it."""

    label: str
    weight_bits: int
    quantizer: Callable[[], Quantizer]


class InHalf(nn.Module):
    """A float16 module among float32 ones."""

    def __init__(self, inner: nn.Module) -> None:
        """Wrap the module."""
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return inner(x), x (…, in) float32, as (…, out) float32."""
        out: Tensor = self.inner(x.half())
        return out.float()


class TorchLibrary:
    """Peers of one torch library on `model.mamba`; the float form is that model itself."""

    def __init__(self, name: str, peers: tuple[TorchPeer, ...], config: MambaConfig, tensors: Mapping[str, np.ndarray]) -> None:
        """Set the library's name in pip, its peers, and config and weights of the decoder.

        Tensors are by state-spaces names, in the shapes of `decoder_shapes`, any float dtype.
        """
        self.name = name
        self.peers: Mapping[str, int] = {p.label: p.weight_bits for p in peers}
        self._quantizers = {p.label: p.quantizer for p in peers}
        self._config, self._tensors = config, tensors

    def refuses(self) -> str | None:
        """See `PeerLibrary.refuses`."""
        try:
            for quantizer in self._quantizers.values():
                quantizer()
        except ImportError as error:
            return f"{self.name}: {error}; {install_hint('peers')}"
        return None

    def answer_in_float(self, suite: TokenizedSuite, on_lines: OnLines) -> list[np.ndarray]:
        """See `PeerLibrary.answer_in_float`; of each line (n_answer, vocab) float32."""
        return _answers(self._model(), suite, on_lines)

    def answer(self, label: str, suite: TokenizedSuite, on_lines: OnLines) -> RunnerOutput:
        """See `PeerLibrary.answer`."""
        quantize, model, total, names = self._quantizers[label](), self._model(), 0, []
        for place, mixer in list(model.named_modules()):
            for kind in _QUANTIZED if isinstance(mixer, Mixer) else ():
                layer, size = quantize(getattr(mixer, kind).half())
                setattr(mixer, kind, InHalf(layer))
                total += size
                names.append(f"{place}.{kind}.weight")
        facts = {"runtime": f"{self.name} {_version(self.name)}", "activations": "float16", "left_float": "embedding, dt_proj"}
        return RunnerOutput(_answers(model, suite, on_lines), with_float_rest(self._config, names, total), facts)

    def _model(self) -> Mamba:
        model = Mamba(self._config).eval()
        state = {name: torch.from_numpy(np.array(values, np.float32)) for name, values in self._tensors.items()}
        model.load_state_dict(state, strict=False)  # a tied head has no tensor of its own
        return model


@torch.inference_mode()
def _answers(model: Mamba, suite: TokenizedSuite, on_lines: OnLines) -> list[np.ndarray]:
    """Prefill all images at once, then read each line from a copy of its image's state."""
    assert suite.embeddings is not None
    _, seen = model.hidden(torch.from_numpy(suite.embeddings))
    found = []
    for number, line in enumerate(suite.lines, 1):
        assert line.image is not None
        rows = slice(line.image, line.image + 1)
        state = MambaState(*(tuple(layer[rows] for layer in part) for part in (seen.conv, seen.ssm)))
        logits, _ = model(model.embed(torch.tensor([line.inputs])), state)
        found.append(logits[0, line.answer_from :].numpy())
        on_lines(number)
    return found


def _torchao(algorithm: str) -> Quantizer:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    config = PrototypeInt4WeightOnlyConfig(group_size=128, int4_choose_qparams_algorithm=algorithm, set_inductor_config=False)

    def quantize(layer: nn.Linear) -> tuple[nn.Module, int]:
        quantize_(layer, config)
        stored: Any = layer.weight
        return layer, sum(getattr(stored, name).nbytes for name in stored.tensor_data_names)

    return quantize


def _hqq() -> Quantizer:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)

    def quantize(layer: nn.Linear) -> tuple[nn.Module, int]:
        made = HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu")
        return made, made.W_q.nbytes + made.meta["scale"].nbytes + made.meta["zero"].nbytes

    return quantize


TORCHAO = (
    TorchPeer("torchao int4 g128", 4, lambda: _torchao("tinygemm")),
    TorchPeer("torchao int4 g128 hqq", 4, lambda: _torchao("hqq")),
)
HQQ = (TorchPeer("hqq int4 g64", 4, _hqq),)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"
