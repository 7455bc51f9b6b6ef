"""Other runtimes on a GPU, timed in the same process: a table of peers, each with its reason if it is not available."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..bundle.memory_plan import state_bytes
from ..errors import MachineError
from ..formats.bitsandbytes_codes import load_bitsandbytes, why_no_bitsandbytes
from ..formats.model_config import CobraConfig
from ..model.mamba import Mamba, MambaState, Mixer
from ..model.torch_device import why_no_torch_gpu
from .decode_result import RunnerFacts
from .gpu import Gpu
from .gpu_runners import GpuRunner
from .machine import version_of
from .transformer import PYTHIA_2_8B, Transformer

_QUANTIZED = ("in_proj", "x_proj", "out_proj")
_CHUNK = 1024


@dataclass(frozen=True)
class GpuPeer:
    """One peer: its name for --peer, why it is not available (or None), and how it is opened."""

    name: str
    refuses: Callable[[], str | None]
    open: Callable[[CobraConfig, tuple[int, ...], Gpu], GpuRunner]


class MambaSsm:
    """mamba-ssm's own model and generation, its steps with its CUDA graph: the runtime of the published Cobra."""

    name = "mamba-ssm fp16"
    reads_prompts = True

    def __init__(self, config: CobraConfig, context: int, gpu: Gpu) -> None:
        """Build its model with random float16 weights."""
        sizes = importlib.import_module("mamba_ssm.models.config_mamba")
        models = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
        m = config.mamba
        inner = {"d_state": m.d_state, "d_conv": m.d_conv, "expand": m.d_inner // m.d_model, "dt_rank": m.dt_rank}
        shape = sizes.MambaConfig(d_model=m.d_model, n_layer=m.n_layer, vocab_size=m.vocab, ssm_cfg=inner)
        self._model = models.MambaLMHeadModel(shape, device=gpu.device, dtype=torch.float16).eval()
        self.contexts: tuple[int, ...] = (context,)
        self.weights_bytes = sum(p.nbytes for p in self._model.parameters())
        self._state_bytes, self._vocab, self._gpu = 2 * state_bytes(config), m.vocab, gpu
        self._longest = 0  # length that its graph was captured for

    def facts(self) -> RunnerFacts:
        """See `Runner.facts`."""
        conv = version_of("causal-conv1d")
        return RunnerFacts(version=f"mamba-ssm {version_of('mamba-ssm')}", described=f"CUDA graph, causal-conv1d {conv}")

    def traffic_bytes(self, context: int) -> int:
        """See `GpuRunner.traffic_bytes`."""
        return self.weights_bytes + self._state_bytes

    def prefill(self, tokens: int) -> float:
        """See `Runner.prefill`: its generation of one token."""
        return self._generate(tokens, 1)

    def steps(self, count: int, context: int) -> float:
        """See `Runner.steps`: the time of an answer of count + 1 tokens minus that of one token."""
        longer = self._generate(context, count + 1)
        return max(longer - self._generate(context, 1), 1e-9)

    def _generate(self, prompt: int, new: int) -> float:
        tokens = torch.randint(self._vocab, (1, prompt), device=self._gpu.device)

        def answer() -> object:
            return self._model.generate(tokens, prompt + new, top_k=1, cg=True)

        if prompt + new > self._longest:  # a longer text is captured again, which is not timed
            self._longest = prompt + new
            answer()
        return self._gpu.seconds(answer)


def _no_mamba_ssm() -> str | None:
    why = "pip install --no-build-isolation causal-conv1d mamba-ssm, with MAMBA_KEEP_CUDA_BUILD=TRUE and nvcc installed"
    try:
        importlib.import_module("selective_scan_cuda")
    except ImportError as error:
        return f"mamba-ssm's CUDA scan cannot be imported ({error}); {why}"
    try:
        importlib.import_module("mamba_ssm.models.mixer_seq_simple")
    except ImportError as error:
        return f"mamba-ssm cannot be imported ({error}); {why}"
    return None


class BitsAndBytesModules:
    """The torch model in float16 with bitsandbytes' 4-bit layers, as its users assemble it: without a CUDA graph."""

    name = "bitsandbytes nf4"
    reads_prompts = True

    def __init__(self, config: CobraConfig, context: int, gpu: Gpu, dtype: torch.dtype = torch.float16) -> None:
        """Build the model with random weights; each layer is quantized when it is moved to the GPU."""
        bnb, m = load_bitsandbytes(), config.mamba
        with torch.device("meta"):
            empty = Mamba(m)
        self._model = empty.to(dtype).to_empty(device=gpu.device).eval()
        if m.tied:
            self._model.lm_head.weight = self._model.backbone.embedding.weight
        _fill(self._model)
        for layer in self._model.modules():
            if isinstance(layer, Mixer):
                for kind in _QUANTIZED:
                    setattr(layer, kind, _four_bits(bnb, getattr(layer, kind), dtype, gpu.device))
        self.contexts: tuple[int, ...] = (context,)
        self.weights_bytes = sum(_stored(self._model))
        self._state_bytes, self._config, self._gpu = 2 * state_bytes(config), m, gpu
        self._read = self._after(context)

    def facts(self) -> RunnerFacts:
        """See `Runner.facts`."""
        where = "Linear4bit nf4 for in_proj, x_proj and out_proj, the rest float16 in plain torch"
        return RunnerFacts(version=f"bitsandbytes {version_of('bitsandbytes')}", described=where)

    def traffic_bytes(self, context: int) -> int:
        """See `GpuRunner.traffic_bytes`."""
        return self.weights_bytes + self._state_bytes

    def prefill(self, tokens: int) -> float:
        """See `Runner.prefill`."""
        prompt = self._tokens(tokens)
        return self._gpu.seconds(lambda: self._run(prompt, self._new_state()))

    def steps(self, count: int, context: int) -> float:
        """See `Runner.steps`: greedy, each token fed back on the GPU."""
        token, state = self._read

        def answer() -> None:
            nonlocal token, state
            for _ in range(count):
                token, state = self._run(token, state)

        return self._gpu.seconds(answer)

    def _after(self, context: int) -> tuple[torch.Tensor, MambaState]:
        state = self._new_state()
        for start in range(0, context, _CHUNK):
            token, state = self._run(self._tokens(min(_CHUNK, context - start)), state)
        return token, state

    def _tokens(self, count: int) -> torch.Tensor:
        return torch.randint(self._config.vocab, (1, count), device=self._gpu.device)

    def _new_state(self) -> MambaState:
        zeros = MambaState.zeros(self._config, 1)
        return MambaState(*(tuple(t.to(self._gpu.device) for t in part) for part in (zeros.conv, zeros.ssm)))

    @torch.inference_mode()
    def _run(self, tokens: torch.Tensor, state: MambaState) -> tuple[torch.Tensor, MambaState]:
        """Read tokens (1, seq) int64; returns the most likely next one, (1, 1) int64, and the state."""
        hidden, state = self._model.hidden(self._model.embed(tokens), state)
        return self._model.lm_head(hidden[:, -1]).argmax(-1, keepdim=True), state


def _fill(model: nn.Module) -> None:
    """Initialise every parameter so that a deep model stays finite."""
    for name, p in model.named_parameters():
        with torch.no_grad():
            if name.endswith("A_log"):
                p.copy_(torch.log(torch.arange(1, p.shape[1] + 1, device=p.device, dtype=torch.float32)).expand_as(p))
            elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
                p.fill_(1)
            else:
                p.normal_(std=p.shape[1] ** -0.5 / 2 if p.ndim == 2 else 0.1)


def _four_bits(bnb: Any, linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return the layer in nf4 with float32 scales, the default of transformers and the faster choice."""
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
    weight = linear.weight.detach().cpu()
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    placed: nn.Module = made.to(device)
    return placed


def _stored(model: nn.Module) -> Iterator[int]:
    """Yield the bytes of every parameter, scales of 4-bit ones included."""
    for p in model.parameters():
        yield p.nbytes
        state = getattr(p, "quant_state", None)
        if state is not None:
            yield state.absmax.nbytes


# The state of bitsandbytes and mamba-ssm has a fixed size, so one context is enough.
GPU_PEERS: dict[str, GpuPeer] = {
    p.name: p
    for p in (
        GpuPeer("mamba-ssm", _no_mamba_ssm, lambda config, contexts, gpu: MambaSsm(config, contexts[0], gpu)),
        GpuPeer(
            "bitsandbytes", why_no_bitsandbytes, lambda config, contexts, gpu: BitsAndBytesModules(config, contexts[0], gpu)
        ),
        GpuPeer("transformer", lambda: None, lambda config, contexts, gpu: Transformer(PYTHIA_2_8B, contexts, gpu)),
    )
}


def check_peers(names: tuple[str, ...]) -> None:
    """Raise MachineError, with what to install, for a peer that is not available; before gigabytes are written."""
    for name in names:
        reason = why_no_torch_gpu() or GPU_PEERS[name].refuses()
        if reason is not None:
            raise MachineError(f"--peer {name}: {reason}, or omit it")
