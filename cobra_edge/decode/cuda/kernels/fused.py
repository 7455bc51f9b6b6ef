"""The fused scan of mamba-ssm and convolution of causal-conv1d behind the contracts of ours, where they are installed.

How a state is carried into a scan that takes none: `model.fused_kernels`.
Source: Gu and Dao 2023, algorithm 2; github.com/state-spaces/mamba and github.com/Dao-AILab/causal-conv1d for the interfaces.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ....model.fused_kernels import EXACT_STEP, fused_function, why_no_causal_conv1d, why_no_mamba_ssm
from .convolution import convolve_many
from .elementwise import stored_reference
from .scan import scan_many

log = logging.getLogger(__name__)


class Chosen(NamedTuple):
    """A function with the contract of `scan_many` or `convolve_many`, and whose it is."""

    name: str
    run: Callable[..., None]


@cache
def choose_scan(device: torch.device) -> Chosen:
    """Return the scan for a device, mamba-ssm's or ours; says which, and why, once."""
    reason = why_no_mamba_ssm() if device.type == "cuda" else f"mamba-ssm does not run on {device.type}"
    return _chosen("scan", Chosen("mamba-ssm", scan_with_mamba_ssm), Chosen("triton", scan_many), reason)


@cache
def choose_convolution(device: torch.device, d_inner: int, d_conv: int) -> Chosen:
    """Return the convolution for a device and a shape, causal-conv1d's or ours; says which, and why, once."""
    reason = why_no_causal_conv1d(d_inner, d_conv) if device.type == "cuda" else f"causal-conv1d does not run on {device.type}"
    fused = Chosen("causal-conv1d", convolve_with_causal_conv1d)
    return _chosen("convolution", fused, Chosen("triton", convolve_many), reason)


def _chosen(what: str, fused: Chosen, ours: Chosen, reason: str | None) -> Chosen:
    if reason is None:
        log.info("%s: %s", what, fused.name)
        return fused
    log.info("%s: %s (%s: %s)", what, ours.name, fused.name, reason)
    return ours


def scan_with_mamba_ssm(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    dt_bias: torch.Tensor,
    h: torch.Tensor,
    out: torch.Tensor,
    *,
    fresh: bool = False,
) -> None:
    """Do what `scan_many` does; nothing is put in front where h is said to be fresh, all zeros."""
    d_state = A.shape[1]
    front = 0 if fresh else d_state
    values, delta = _behind(front, u), _behind(front, F.softplus(dt + dt_bias))
    into = _behind(front, B)
    if front:
        values[0, :, :front] = h / EXACT_STEP
        delta[0, :, :front] = EXACT_STEP
        into[0, :, :front] = torch.eye(d_state, device=B.device)
    function = fused_function("mamba_ssm", "selective_scan_fn")
    others = {"D": D, "z": _behind(front, z), "delta_softplus": False, "return_last_state": True}
    y, last = function(values, delta, A, into, _behind(front, C), **others)
    h.copy_(last[0])
    out.copy_(stored_reference(y[0, :, front:].T, out.dtype))


def _behind(front: int, rows: torch.Tensor) -> torch.Tensor:
    """Return rows (T, width) as (1, width, front + T) float32, zeros in front."""
    wide = rows.new_zeros((1, rows.shape[1], front + len(rows)), dtype=torch.float32)
    wide[0, :, front:] = rows.T
    return wide


def convolve_with_causal_conv1d(
    x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor
) -> None:
    """Do what `convolve_many` does; it reads the state in x's dtype."""
    d_conv = weight.shape[1]
    before = stored_reference(state[:, 1:].T, x.dtype).contiguous().T  # channels next to each other, as it asks for
    function = fused_function("causal_conv1d", "causal_conv1d_fn")
    y = function(x.T[None], weight, bias, initial_states=before[None], activation="silu")
    state.copy_(torch.cat([state, x[-d_conv:].T.float()], dim=1)[:, -d_conv:])
    out.copy_(stored_reference(y[0].T, out.dtype))
