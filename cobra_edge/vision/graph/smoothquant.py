"""SmoothQuant: move outlier channels from activations into weights before a vision tower is quantized to int8.

One scale serves a whole activation, so a channel thirty times larger than the rest costs these five bits. If the input of a
linear layer comes from a linear map, its channel j can be divided by s_j there and column j of the weight multiplied by s_j;
only rounding changes. In a ViT block this holds for norm1 → qkv, norm2 → fc1 and the values' part of qkv → proj (attention
mixes tokens, not channels). It does not hold for fc2 and the projector's later layers, which follow a GELU, nor for the
projector's first layer, which reads the residual stream.

Source: SmoothQuant (Xiao et al. 2022), equation 4: s_j = max|x_j|^a / max|w_j|^(1 - a).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import InputError
from ...model.cobra import VisionModel
from .matmuls import ROWS, relative_error, sampled_rows

STRENGTHS = (0.25, 0.5, 0.75)
PAYS_BELOW = 0.95  # of the error without SmoothQuant: layers that gain less are left unchanged


@dataclass(frozen=True, eq=False)
class _SmoothedLinear:
    """A linear layer whose input can be scaled: `feeds` are the (out, …) parameters that produce it, from row `first` on."""

    name: str
    linear: nn.Linear
    feeds: tuple[nn.Parameter, ...]
    first: int = 0

    def scale(self, factors: Tensor) -> None:
        """Divide channel j of the input by factors[j] and multiply column j of the weight by it; factors (in,)."""
        for parameter in self.feeds:
            part = parameter.data[self.first :]
            part /= factors.reshape(-1, *[1] * (part.ndim - 1))
        self.linear.weight.data *= factors


@torch.no_grad()
def apply_smoothquant(
    model: VisionModel, pixels: Sequence[np.ndarray], run: Callable[[np.ndarray], object] | None = None
) -> None:
    """Reduce the outlier channels of a model in place; its output changes only by rounding.

    Each linear layer gets the strength of STRENGTHS with the smallest int8 error, or none if the gain is small.

    Args:
        model: tower and projector.
        pixels: calibration images, each (1, 3·n_encoders, size, size) float32, normalized.
        run: runs the model, not yet changed, on one image, for callers that want its outputs; None only calls the model.

    Raises:
        InputError: no images, or activations that are not finite.
    """
    sites = list(_sites(model))
    highest, rows = _inputs(run or (lambda image: model(torch.from_numpy(image))), sites, pixels)
    for site in sites:
        weight, top, seen = site.linear.weight.data, highest[site.name], rows[site.name]
        if not top.isfinite().all():
            raise InputError(f"{site.name}: its input contains NaN or infinity; the vision weights are damaged or overflow")
        found = [(relative_error(seen, weight.T, float(top.max())) * PAYS_BELOW, torch.ones_like(top))]
        for strength in STRENGTHS:
            factors = smoothquant_scales(top, weight, strength)
            found.append((relative_error(seen / factors, (weight * factors).T, float((top / factors).max())), factors))
        site.scale(min(found, key=lambda pair: pair[0])[1])


def smoothquant_scales(highest: Tensor, weight: Tensor, strength: float) -> Tensor:
    """Return s (in,) from an input's largest magnitudes (in,) and a weight (out, in), all float32; 1 where one is all zero."""
    columns = weight.abs().amax(0)
    factors = highest**strength / columns ** (1 - strength)
    return torch.where((highest > 0) & (columns > 0), factors, torch.ones_like(factors))


def _sites(model: VisionModel) -> Iterator[_SmoothedLinear]:
    for name, block in model.named_modules():
        if not hasattr(block, "norm1"):
            continue
        part: Any = block
        attention, width = part.attn, part.attn.proj.in_features
        yield _SmoothedLinear(f"{name}.attn.qkv", attention.qkv, (part.norm1.weight, part.norm1.bias))
        values = tuple(p for p in (attention.qkv.weight, attention.qkv.bias) if p is not None)
        if isinstance(getattr(attention, "norm", None), nn.Identity | None):  # not every version of timm has one
            yield _SmoothedLinear(f"{name}.attn.proj", attention.proj, values, 2 * width)
        yield _SmoothedLinear(f"{name}.mlp.fc1", part.mlp.fc1, (part.norm2.weight, part.norm2.bias))


def _inputs(
    run: Callable[[np.ndarray], object], sites: Sequence[_SmoothedLinear], pixels: Sequence[np.ndarray]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return, by layer name, the largest magnitude of each input channel (in,), and sampled rows (about ROWS, in)."""
    if not pixels:
        raise InputError("SmoothQuant needs calibration images, got none; give at least one")
    highest: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    number = 0

    def watch(site: _SmoothedLinear) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            top = x.abs().amax(0)
            highest[site.name] = torch.maximum(highest[site.name], top) if number else top
            rows[site.name].append(x[sampled_rows(len(x), number, len(pixels))].clone())

        return site.linear.register_forward_pre_hook(hook)

    hooks = [watch(site) for site in sites]
    try:
        for number, image in enumerate(pixels):  # noqa: B007
            run(image)
    finally:
        for hook in hooks:
            hook.remove()
    return highest, {name: torch.cat(parts)[: 2 * ROWS] for name, parts in rows.items()}
