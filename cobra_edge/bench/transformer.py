"""A transformer of the same size, for one question: how decoding slows down as the context grows, beside a state of fixed size.

Pythia-2.8B's sizes (Biderman et al. 2023, table 1) with random float16 weights in plain torch: pre-norm blocks whose attention
and MLP read the same input, scaled_dot_product_attention over a cache of keys and values that is as long as the context, no
rotary embedding (a few instructions, which are not to its disadvantage). A step is captured in a CUDA graph at each context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MachineError
from .gpu import Gpu, captured

_HALF = 2  # bytes of a float16
_WORKING_BYTES = 1 << 30  # beside a cache, something must be left to compute in


@dataclass(frozen=True)
class TransformerSizes:
    """Sizes of a decoder-only transformer."""

    d_model: int = 2560
    n_layer: int = 32
    heads: int = 32
    vocab: int = 50304

    def cache_bytes(self, context: int) -> int:
        """Return the bytes of keys and values of that many tokens."""
        return 2 * self.n_layer * context * self.d_model * _HALF


PYTHIA_2_8B = TransformerSizes()


class _Block(nn.Module):
    """Attention and MLP side by side."""

    def __init__(self, sizes: TransformerSizes, **kind: Any) -> None:
        super().__init__()
        d = sizes.d_model
        self.heads = sizes.heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(d, **kind), nn.LayerNorm(d, **kind)
        self.qkv, self.out = nn.Linear(d, 3 * d, **kind), nn.Linear(d, d, **kind)
        self.up, self.down = nn.Linear(d, 4 * d, **kind), nn.Linear(4 * d, d, **kind)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Read x (1, d_model), whose key and value go to the last place of (heads, context, d_head); returns (1, d_model)."""
        q, k, v = self.qkv(self.norm_attention(x)).view(3, self.heads, 1, -1).unbind(0)
        keys[:, -1:], values[:, -1:] = k, v
        seen = F.scaled_dot_product_attention(q[None], keys[None], values[None])
        mlp: Tensor = self.down(F.gelu(self.up(self.norm_mlp(x))))
        return x + mlp + self.out(seen.reshape(1, -1))


class Transformer:
    """The transformer, a `GpuRunner` that only decodes."""

    name = "transformer fp16"
    reads_prompts = False

    def __init__(self, sizes: TransformerSizes, contexts: Sequence[int], gpu: Gpu, dtype: torch.dtype = torch.float16) -> None:
        """Make the weights; a context whose cache the GPU does not hold is left out, and said to be.

        Raises:
            MachineError: the GPU holds none of them.
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
                f"{self.name}: the GPU has {(free or 0) / 1e9:.1f} GB left and the keys and values of {min(contexts)} tokens "
                f"take {sizes.cache_bytes(min(contexts)) / 1e9:.1f}; leave --peer transformer out"
            )
        self.contexts = tuple(fitting)
        self._left_out = [c for c in contexts if c not in fitting]
        modules = (self._blocks, self._norm, self._head)
        self.weights_bytes = sum(p.nbytes for module in modules for p in module.parameters())
        # One context's cache at a time: together they would not fit where each does.
        self._cache: tuple[int, Callable[[], object]] | None = None

    def facts(self) -> dict[str, Any]:
        """See `Runner.facts`."""
        sizes = self._sizes
        what = f"{sizes.n_layer} layers, d_model {sizes.d_model}, {sizes.heads} heads, vocab {sizes.vocab}"
        return {"version": f"torch {torch.__version__}", "described": what, "contexts_without_memory": self._left_out}

    def traffic_bytes(self, context: int) -> int:
        """See `GpuRunner.traffic_bytes`: keys and values of all tokens are read."""
        return self.weights_bytes + self._sizes.cache_bytes(context)

    def prefill(self, tokens: int) -> float:
        """Not timed: `reads_prompts` says so."""
        raise NotImplementedError

    def steps(self, count: int, context: int) -> float:
        """See `Runner.steps`; the context does not grow meanwhile: the newest token takes the last place of all of them."""
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
