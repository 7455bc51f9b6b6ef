"""The Mamba-1 decoder in plain torch: the reference for every kernel.

Nothing is fused, and only the order of the scan's channels is chosen for speed. The residual stream and the recurrence are
float32 whatever the dtype of the weights. The input is embeddings, not token ids, because visual embeddings precede the text.
Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, sections 3.2-3.4, algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats.model_config import MambaConfig

_SCAN_ELEMENTS = 1 << 16  # of the states that the scan steps at once: several temporaries of them fit a cache of 1 MiB


@dataclass(frozen=True, eq=False)
class MambaState:
    """The decoder's state, of a size independent of the context length. One tensor per layer.

    Attributes:
        conv: per layer (batch, d_inner, d_conv) float32, the last inputs of its causal convolution, newest last.
        ssm: per layer (batch, d_inner, d_state) float32, its recurrent state.
    """

    conv: tuple[Tensor, ...]
    ssm: tuple[Tensor, ...]

    @classmethod
    def zeros(cls, config: MambaConfig, batch: int) -> MambaState:
        """Return the state before the first token."""
        layers = range(config.n_layer)
        return cls(
            tuple(torch.zeros(batch, config.d_inner, config.d_conv) for _ in layers),
            tuple(torch.zeros(batch, config.d_inner, config.d_state) for _ in layers),
        )


def causal_conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve each channel with its last d_conv inputs, add the bias, apply SiLU.

    Args:
        x: (batch, seq, d_inner), any float dtype.
        state: (batch, d_inner, d_conv) float32, the inputs before x, newest last.
        weight: (d_inner, d_conv), with the tap of the newest input last.
        bias: (d_inner,).

    Returns:
        (batch, seq, d_inner) in x's dtype.

    Source: Gu and Dao 2023, section 3.4, figure 3.
    """
    seq, d_conv = x.shape[1], weight.shape[1]
    window = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)
    taps = [window[:, k + 1 : k + 1 + seq] * weight[:, k] for k in range(d_conv)]
    return F.silu(bias + torch.stack(taps).sum(0))


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute h = exp(Δ·A)·h + Δ·B·u, out = (C·h + D·u)·silu(z) with Δ = softplus(dt + dt_bias), token by token, in float32.

    Args:
        u, dt, z: (batch, seq, d_inner).
        A: (d_inner, d_state) float32, negative.
        B, C: (batch, seq, d_state).
        D, dt_bias: (d_inner,).
        h: (batch, d_inner, d_state) float32, the initial state.

    Returns:
        out (batch, seq, d_inner) float32, and the final state h.

    Source: Gu and Dao 2023, equation 2a and algorithm 2; mamba-ssm computes the same from (batch, d_inner, seq).
    """
    u, B, C, z = u.float(), B.float(), C.float(), z.float()
    delta = F.softplus(dt.float() + dt_bias.float())
    channels = max(1, _SCAN_ELEMENTS // (h.shape[0] * h.shape[2]))  # in turn: their states stay in the cache over all tokens
    by_channels = delta.split(channels, 2), (delta * u).split(channels, 2), A.split(channels), h.split(channels, 1)
    parts = [_scan_channels(d, x, a, B, C, states) for d, x, a, states in zip(*by_channels, strict=True)]
    y, h = torch.cat([y for y, _ in parts], 2), torch.cat([states for _, states in parts], 1)
    return (y + D.float() * u) * F.silu(z), h


def _scan_channels(delta: Tensor, inputs: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return C·h after each token, and the final h, of some channels; `inputs` is Δ·u, the others as of `selective_scan`."""
    outs = []
    for t in range(delta.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + inputs[:, t, :, None] * B[:, t, None, :]
        outs.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(outs, dim=1), h


@dataclass(frozen=True)
class Operations:
    """The two sequential operations of a mixer, replaceable by another pair with the same contracts."""

    conv: Callable[..., Tensor] = causal_conv
    scan: Callable[..., tuple[Tensor, Tensor]] = selective_scan


REFERENCE = Operations()


class RMSNorm(nn.Module):
    """RMS norm (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        """Create a norm over the last axis of size `width`."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., width) float32; returns the weight's dtype."""
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * self.weight.float()).to(self.weight.dtype)


class Mixer(nn.Module):
    """The selective state-space mixer; parameter names are those of the published checkpoints."""

    def __init__(self, config: MambaConfig, operations: Operations = REFERENCE) -> None:
        """Create the mixer with torch's default initialization."""
        super().__init__()
        c = config
        self.dt_rank, self.d_state, self.d_conv, self.operations = c.dt_rank, c.d_state, c.d_conv, operations
        self.in_proj = nn.Linear(c.d_model, 2 * c.d_inner, bias=False)
        self.conv1d = nn.Conv1d(c.d_inner, c.d_inner, c.d_conv, groups=c.d_inner)
        self.x_proj = nn.Linear(c.d_inner, c.dt_rank + 2 * c.d_state, bias=False)
        self.dt_proj = nn.Linear(c.dt_rank, c.d_inner)
        # Not from arange: on the meta device it imports all of torch._dynamo, which takes seconds.
        self.A_log = nn.Parameter(torch.tensor([math.log(n) for n in range(1, c.d_state + 1)]).repeat(c.d_inner, 1))
        self.D = nn.Parameter(torch.ones(c.d_inner))
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=False)

    def forward(self, x: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix x along the sequence.

        Args:
            x: (batch, seq, d_model), the dtype of the weights.
            conv: (batch, d_inner, d_conv) float32, the initial convolution state.
            ssm: (batch, d_inner, d_state) float32, the initial recurrent state.

        Returns:
            The output (batch, seq, d_model) and both final states.
        """
        x, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.operations.conv(x, conv, self.conv1d.weight[:, 0], self.conv1d.bias).to(x.dtype)
        low, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.linear(low, self.dt_proj.weight)
        A = -torch.exp(self.A_log.float())
        y, ssm = self.operations.scan(u, dt, A, B, C, self.D, z, self.dt_proj.bias, ssm)
        seen = torch.cat([conv, x[:, -self.d_conv :].transpose(1, 2).float()], dim=2)
        return self.out_proj(y.to(x.dtype)), seen[..., -self.d_conv :], ssm


class Block(nn.Module):
    """Pre-norm residual block around a mixer."""

    def __init__(self, config: MambaConfig, operations: Operations = REFERENCE) -> None:
        """Create norm and mixer."""
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config, operations)

    def forward(self, residual: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual (batch, seq, d_model) float32 after the block, and both final states; arguments as of `Mixer`."""
        out, conv, ssm = self.mixer(self.norm(residual), conv, ssm)
        return residual + out.float(), conv, ssm


class Backbone(nn.Module):
    """Embedding, blocks and final norm, under the names of the published checkpoints."""

    def __init__(self, config: MambaConfig, operations: Operations) -> None:
        """Create all layers."""
        super().__init__()
        self.embedding = nn.Embedding(config.vocab, config.d_model)
        self.layers = nn.ModuleList(Block(config, operations) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)


class Mamba(nn.Module):
    """A Mamba-1 language model over embeddings."""

    def __init__(self, config: MambaConfig, operations: Operations = REFERENCE) -> None:
        """Create the model with torch's default initialization; a tied head shares the embedding's tensor."""
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, operations)
        self.lm_head = nn.Linear(config.d_model, config.vocab, bias=False)
        if config.tied:
            self.lm_head.weight = self.backbone.embedding.weight

    def hidden(self, embeddings: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """Run the blocks over embeddings (batch, seq, d_model), any float dtype.

        Returns the normalized hidden states (batch, seq, d_model) and the state after the last position.
        """
        state = state or MambaState.zeros(self.config, embeddings.shape[0])
        residual = embeddings.float()
        convs, ssms = [], []
        for layer, conv, ssm in zip(self.backbone.layers, state.conv, state.ssm, strict=True):
            residual, conv, ssm = layer(residual, conv, ssm)
            convs.append(conv)
            ssms.append(ssm)
        return self.backbone.norm_f(residual), MambaState(tuple(convs), tuple(ssms))

    def forward(self, embeddings: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """Return float32 logits at every position (batch, seq, vocab) and the state after the last one."""
        hidden, state = self.hidden(embeddings, state)
        return self.lm_head(hidden).float(), state

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up tokens (batch, seq) int64; returns (batch, seq, d_model) in the dtype of the weights."""
        return self.backbone.embedding(tokens)
