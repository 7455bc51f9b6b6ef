"""Choosing the next token on the GPU, by the rule of `decode.sampling`, with nothing that a CUDA graph cannot capture."""

from __future__ import annotations

import torch

from ...sampling import Sampling


def choose_token(
    logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor, token: torch.Tensor, not_finite: torch.Tensor
) -> None:
    """Write the next token's id; its reference is `generate.choose`.

    Args:
        logits: (vocab,) float32.
        sampling: how; a captured graph keeps it.
        uniform: (1,) float64 or float32, a random number in [0, 1); greedy leaves it unread.
        token: (1,) int64, written.
        not_finite: (1,) int32, set to 1 where a logit is not finite, and otherwise left as it is.
    """
    not_finite.bitwise_or_(torch.isfinite(logits).all().logical_not().to(torch.int32))
    if sampling.temperature == 0:
        token.copy_(torch.argmax(logits))
        return
    ordered, order = torch.sort(logits, descending=True, stable=True)
    if sampling.top_k:
        ordered, order = ordered[: sampling.top_k], order[: sampling.top_k]
    ordered = ordered.double()
    p = torch.exp((ordered - ordered[0]) / sampling.temperature)
    p = p / p.sum()
    kept = (torch.cumsum(p, 0) < sampling.top_p).sum() + 1  # counts, where searchsorted would copy its number from the host
    p = torch.where(torch.arange(len(p), device=p.device) < kept, p, 0.0)
    cumulative = torch.cumsum(p / p.sum(), 0)
    cumulative = cumulative / cumulative[-1]
    place = (cumulative <= uniform.double()).sum(0, keepdim=True)
    token.copy_(order.gather(0, place.clamp(max=len(order) - 1)))
