"""A transformer of the same size, to show how decoding slows down as the KV cache grows; a Mamba state has a fixed size.

Pythia-2.8B's sizes (Biderman et al. 2023, table 1) with random float16 weights in plain torch: pre-norm blocks whose attention
and MLP read the same input, scaled_dot_product_attention over a KV cache as long as the context, without
rotary embedding (which only makes it faster). A step is captured in a CUDA graph at each context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MachineError
from .decode_result import RunnerFacts
from .gpu import Gpu, captured

_HALF = 2  # bytes of a float16
_WORKING_BYTES = 1 << 30  # left for activations next to the cache


@dataclass(frozen=True)
class TransformerSizes:
    """Sizes of a decoder-only transformer."""

    d_model: int = 2560
    n_layer: int = 32
    heads: int = 32
    vocab: int = 50304

    def cache_bytes(self, context: int) -> int:
        """Return the bytes of a KV cache of that many tokens."""
        return 2 * self.n_layer * context * self.d_model * _HALF


PYTHIA_2_8B = TransformerSizes()


class _Block(nn.Module):
    """Attention and MLP in parallel."""

    def __init__(self, sizes: TransformerSizes, **kind: Any) -> None:
        super().__init__()
        d = sizes.d_model
        self.heads = sizes.heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(d, **kind), nn.LayerNorm(d, **kind)
        self.qkv, self.out = nn.Linear(d, 3 * d, **kind), nn.Linear(d, d, **kind)
        self.up, self.down = nn.Linear(d, 4 * d, **kind), nn.Linear(4 * d, d, **kind)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return (1, d_model) for x (1, d_model); its key and value are written to the end of (heads, context, d_head)."""
        q, k, v = self.qkv(self.norm_attention(x)).view(3, self.heads, 1, -1).unbind(0)
        keys[:, -1:], values[:, -1:] = k, v
        seen = F.scaled_dot_product_attention(q[None], keys[None], values[None])
        mlp: Tensor = self.down(F.gelu(self.up(self.norm_mlp(x))))
        return x + mlp + self.out(seen.reshape(1, -1))


class Transformer:
    """The transformer, a `GpuRunner` without prefill."""

    name = "transformer fp16"
    reads_prompts = False

    def __init__(self, sizes: TransformerSizes, contexts: Sequence[int], gpu: Gpu, dtype: torch.dtype = torch.float16) -> None:
        """Make the weights; a context whose KV cache does not fit the GPU is skipped and reported.

        Raises:
            MachineError: none of the contexts fits.
        """
        kind: dict[str, Any] = {"device": gpu.device, "dtype": dtype}
        self._sizes, self._gpu, self._kind = sizes, gpu, kind
        self._embedding = nn.Embedding(sizes.vocab, sizes.d_model, **kind)
        self._blocks = nn.ModuleList(_Block(sizes, **kind) for _ in range(sizes.n_layer))
        self._norm, self._head = nn.LayerNorm(sizes.d_model, **kind), nn.Linear(sizes.d_model, sizes.vocab, bias=False, **kind)
        free = gpu.free_bytes()
        fitting = [c for c in contexts if free is None or sizes.cache_bytes(c) + _WORKING_BYTES <= free]
        if not fitting:
            raise MachineError(
                f"{self.name}: the GPU has {(free or 0) / 1e9:.1f} GB free and the KV cache of {min(contexts)} tokens "
                f"needs {sizes.cache_bytes(min(contexts)) / 1e9:.1f} GB; omit --peer transformer"
            )
        self.contexts = tuple(fitting)
        self._left_out = [c for c in contexts if c not in fitting]
        modules = (self._blocks, self._norm, self._head)
        self.weights_bytes = sum(p.nbytes for module in modules for p in module.parameters())
        # Only one context's cache is allocated at a time.
        self._cache: tuple[int, Callable[[], object]] | None = None

    def facts(self) -> RunnerFacts:
        """See `Runner.facts`."""
        sizes = self._sizes
        what = f"{sizes.n_layer} layers, d_model {sizes.d_model}, {sizes.heads} heads, vocab {sizes.vocab}"
        return RunnerFacts(version=f"torch {torch.__version__}", described=what, contexts_without_memory=tuple(self._left_out))

    def traffic_bytes(self, context: int) -> int:
        """See `GpuRunner.traffic_bytes`: the whole KV cache is read."""
        return self.weights_bytes + self._sizes.cache_bytes(context)

    def prefill(self, tokens: int) -> float:
        """Not timed, see `reads_prompts`."""
        raise NotImplementedError

    def steps(self, count: int, context: int) -> float:
        """See `Runner.steps`; the context does not grow: every new token overwrites the last position."""
        replay = self._step_at(context)
        return self._gpu.seconds(lambda: [replay() for _ in range(count)])

    @torch.inference_mode()
    def _step_at(self, context: int) -> Callable[[], object]:
        if self._cache is not None and self._cache[0] == context:
            return self._cache[1]
        self._cache = None
        sizes, heads = self._sizes, self._sizes.heads
        shape = (sizes.n_layer, 2, heads, context, sizes.d_model // heads)
        cache, token = torch.zeros(shape, **self._kind), torch.zeros(1, dtype=torch.long, device=self._gpu.device)

        @torch.inference_mode()
        def step() -> None:
            x = self._embedding(token)
            for block, (keys, values) in zip(self._blocks, cache, strict=True):
                x = block(x, keys, values)
            token.copy_(self._head(self._norm(x)).argmax(-1))

        replay = captured(step, self._gpu)
        self._cache = (context, replay)
        return replay
