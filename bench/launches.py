"""What a decoder launches on a GPU, recorded: no GPU is needed for it, nor weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from cobra_edge.decode.cuda.kernels.choice import choose_token
from cobra_edge.decode.cuda.kernels.convolution import convolve_many
from cobra_edge.decode.cuda.kernels.fused import Chosen
from cobra_edge.decode.cuda.kernels.launch import Launch, recording
from cobra_edge.decode.cuda.kernels.scan import scan_many
from cobra_edge.decode.cuda.prefill import Sequential, run_layers
from cobra_edge.decode.cuda.state import GpuState
from cobra_edge.decode.cuda.step import Step
from cobra_edge.decode.cuda.weights import GpuWeights
from cobra_edge.decode.sampling import GREEDY

STEP = "step"
PROMPT_TOKENS = (768, 16)  # an image with a short question; a short question alone


def recorded(weights: GpuWeights, state: GpuState, prompt_tokens: Iterable[int] = PROMPT_TOKENS) -> dict[str, list[Launch]]:
    """Return the launches of prompts of so many tokens, "prefill 768" and so on, and of one "step" with its greedy choice.

    Args:
        weights: on torch's "meta" device, or on a GPU, where what is launched on the same stream afterwards works on them.
        state: on the same device. It has to live as long as the launches are used: they know its address alone.
        prompt_tokens: lengths.
    """
    device, config = weights.device, weights.config
    sequential = Sequential(Chosen("triton", convolve_many), Chosen("triton", scan_many))  # also where others are installed
    step = Step(weights)
    step.point_at(state)
    found = {}
    for tokens in prompt_tokens:
        residual = torch.zeros(tokens, config.d_model, dtype=torch.float32, device=device)
        with torch.inference_mode(), recording() as launches:
            run_layers(weights, sequential, residual, state)
            step.head(residual[-1:])
        found[f"prefill {tokens}"] = launches
    with torch.inference_mode(), recording() as launches:
        step.run()
        uniform, not_finite = (torch.zeros(1, dtype=t, device=device) for t in (torch.float64, torch.int32))
        choose_token(step.logits, GREEDY, uniform, step.token, not_finite)
    found[STEP] = launches
    return found


def launch_counts(launches: Iterable[Launch]) -> dict[str, int]:
    """Return how often each kernel is launched, by name."""
    return dict(Counter(launch.kernel.__name__ for launch in launches))
