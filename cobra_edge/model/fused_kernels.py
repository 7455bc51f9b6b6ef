"""The fused scan of mamba-ssm and convolution of causal-conv1d behind the contracts of `model.mamba`, where they are installed.

mamba-ssm's scan for Mamba-1 starts from zero. A state h that is carried in is put there by d_state positions in front: position
k has B = e_k, C = 0, Δ = 2^-40 and u = h[:, k] · 2^40. Then Δ·u is h to the bit (below 2^87), and exp(Δ·A) is 1 in float32
where |A| is below 2^15: position k adds column k and changes no other.
Source: Gu and Dao 2023, algorithm 2; github.com/state-spaces/mamba and github.com/Dao-AILab/causal-conv1d for the interfaces.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mamba import REFERENCE, Operations

log = logging.getLogger(__name__)

EXACT_STEP = 2.0**-40


@cache
def fused_operations(device: torch.device, d_inner: int, d_conv: int) -> Operations:
    """Return the sequential operations of a mixer for a device: the fused kernels that are installed, the reference elsewhere.

    Which ones, and why not the others, is logged once.

    Args:
        device: where the model is.
        d_inner, d_conv: channels and taps of the convolution.
    """
    reasons = {"mamba-ssm's scan": why_no_mamba_ssm, "causal-conv1d": lambda: why_no_causal_conv1d(d_inner, d_conv)}
    missing = {}
    for name, why in reasons.items():
        reason = why() if device.type == "cuda" else f"does not run on {device.type}"
        if reason is not None:
            missing[name] = reason
        log.info("%s: %s", name, "used" if reason is None else f"not used ({reason})")
    return Operations(
        conv=REFERENCE.conv if "causal-conv1d" in missing else causal_conv,
        scan=REFERENCE.scan if "mamba-ssm's scan" in missing else selective_scan,
    )


def why_no_mamba_ssm() -> str | None:
    """Return why mamba-ssm's scan is not used, or None."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return "not installed"
    if importlib.util.find_spec("selective_scan_cuda") is None:
        return (
            "mamba-ssm imports without its CUDA scan: the extension selective_scan_cuda is missing; "
            "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation --force-reinstall mamba-ssm builds it"
        )
    return _why_not(
        "mamba_ssm", "selective_scan_fn", ("u", "delta", "A", "B", "C", "D", "z", "delta_softplus", "return_last_state")
    )


def why_no_causal_conv1d(d_inner: int, d_conv: int) -> str | None:
    """Return why causal-conv1d is not used for so many channels and taps, or None."""
    if importlib.util.find_spec("causal_conv1d") is None:
        return "not installed"
    if importlib.util.find_spec("causal_conv1d_cuda") is None:
        return "causal-conv1d is installed without its CUDA part: the extension causal_conv1d_cuda is missing"
    if d_inner % 8 or not 2 <= d_conv <= 4:
        return f"{d_inner} channels with {d_conv} taps; it takes multiples of 8 channels, and 2 to 4 taps"
    return _why_not("causal_conv1d", "causal_conv1d_fn", ("x", "weight", "bias", "initial_states", "activation"))


def _why_not(module: str, name: str, parameters: tuple[str, ...]) -> str | None:
    """Return why a function is not to be had from a module that is installed, or why it cannot be called as ours are."""
    try:
        function = getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError) as error:  # built for another torch, or something that it needs is missing
        return f"{module} cannot be imported ({error})"
    if function is None:
        return f"{module} has no {name}; another version of it is needed"
    missing = [p for p in parameters if p not in inspect.signature(function).parameters]
    if missing:
        return f"{module}.{name} takes no {', '.join(missing)}; another version of it is needed"
    return None


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Do what `model.mamba.selective_scan` does, by mamba-ssm; float32, without a gradient to h."""
    d_state = A.shape[1]
    delta = F.softplus(dt.float() + dt_bias.float())
    values, steps, into = (_behind(d_state, t) for t in (u, delta, B))
    values[:, :, :d_state] = h / EXACT_STEP
    steps[:, :, :d_state] = EXACT_STEP
    into[:, :, :d_state] = torch.eye(d_state, device=B.device)
    others = {"D": D.float(), "z": _behind(d_state, z), "delta_softplus": False, "return_last_state": True}
    function = fused_function("mamba_ssm", "selective_scan_fn")
    y, last = function(values, steps, A.float(), into, _behind(d_state, C), **others)
    return y[:, :, d_state:].transpose(1, 2), last


def _behind(front: int, rows: Tensor) -> Tensor:
    """Return rows (batch, seq, width) as (batch, width, front + seq) float32, zeros in front."""
    batch, seq, width = rows.shape
    wide = rows.new_zeros((batch, width, front + seq), dtype=torch.float32)
    wide[:, :, front:] = rows.transpose(1, 2)
    return wide


def causal_conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Do what `model.mamba.causal_conv` does, by causal-conv1d; it reads the state in x's dtype."""
    # Channels lie next to each other, as it asks for; rows of x may lie apart.
    before = state[:, :, 1:].transpose(1, 2).to(x.dtype).contiguous().transpose(1, 2)
    function = fused_function("causal_conv1d", "causal_conv1d_fn")
    y: Tensor = function(x.transpose(1, 2), weight.contiguous(), bias, initial_states=before, activation="silu")
    return y.transpose(1, 2)


def fused_function(module: str, name: str) -> Callable[..., Any]:
    """Return a function of one of the two packages, imported on demand."""
    return getattr(importlib.import_module(module), name)
