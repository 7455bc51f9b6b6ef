"""Decode on a GPU: every scheme and every peer in turns, in one run, beside what the GPU's memory and tensor cores give.

What a token costs is taken from the generation that a user's answer comes from, on the GPU and in a CUDA graph where the
decoder has one; nothing else is timed as decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.progress import Progress

from ..bundle.memory_plan import state_bytes
from ..bundle.reader import Bundle
from ..decode.backends import open_decoder
from ..decode.decoder import Decoder
from ..formats.model_config import CobraConfig
from ..formats.scheme import SCHEMES
from .gpu import Gpu, GpuLimits
from .gpu_gate import check_on_gpu, plain_decoder
from .gpu_peers import GPU_PEERS
from .gpu_runners import GpuRunner, Ours, enough_memory, with_memory
from .limits import prefill_products
from .prefix_reuse import copy_state, measure_prefix_reuse
from .roofline import launches_per_token, weights_read_bytes
from .rounds import Figures, Round, described, in_turns, limits_of, prompt_figures, ratios, step_figures
from .runners import predictions_of

_PEAK = "float16"
_FLOAT_SCHEME = "fp16"


@dataclass(frozen=True)
class GpuPlan:
    """What is timed on a GPU.

    Attributes:
        prompt_tokens: lengths to prefill.
        contexts: how many tokens have been read before steps are timed.
        new_tokens: steps that are timed together.
        rounds: how often each is timed.
        kernels: a backend's name, or "auto".
        peers: names of `GPU_PEERS`.
    """

    prompt_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    rounds: int
    kernels: str
    peers: tuple[str, ...]


@dataclass(frozen=True)
class _Opened:
    """A runner, what was found of it before its turns, and whether it is one of our own decoders of our own codes."""

    runner: GpuRunner
    facts: dict[str, Any]
    own: bool


def measure_on_gpu(bundles: Iterator[Bundle], plan: GpuPlan, gpu: Gpu, bar: Progress) -> dict[str, Any]:
    """Check each decoder, then time all of them and the peers in turns.

    Args:
        bundles: of one model, a scheme each; opened as their turn comes, before the first round.
        plan: what is timed.
        gpu: where.
        bar: for progress.

    Returns:
        The result's row: limits, runners with figures and memory, ratios within rounds by the runner they are taken of.

    Raises:
        MachineError: a decoder is not what it should be, memory is lacking, or no backend opens a bundle.
    """
    entered = []
    model: CobraConfig | None = None
    for bundle in bundles:
        model = bundle.manifest.model
        entered.append(_ours(bundle, plan, gpu, bar))
    assert model is not None, "no bundle"
    for name, peer in GPU_PEERS.items():  # in the table's order: what takes the memory that is left comes last
        if name in plan.peers:
            bar.add_task(f"opening {name}", total=1)
            made, memory = with_memory(gpu, name, partial(peer.open, model, plan.contexts, gpu), plan.prompt_tokens[-1])
            entered.append(_Opened(made, memory, own=False))
    runners = [e.runner for e in entered]
    with enough_memory("what the limits are measured with"):
        rounds = _rounds(model, plan, runners, gpu, bar)
    own = [e.runner.name for e in entered if e.own]
    against = [e.runner.name for e in entered if not e.own or e.facts["scheme"] == _FLOAT_SCHEME]
    return {
        "batch": 1,
        "rounds": plan.rounds,
        "prompt_tokens": list(plan.prompt_tokens),
        "contexts": list(plan.contexts),
        "new_tokens": plan.new_tokens,
        "state_bytes": state_bytes(model),
        "limits": limits_of(rounds),
        "runners": [described(e.runner, rounds) | e.facts for e in entered],
        "ratios": {other: ratios(rounds, [name for name in own if name != other], other) for other in against},
    }


def backend_for(scheme: str, kernels: str) -> str:
    """Return the backend that measures a scheme: bitsandbytes runs its own codes, our kernels ours."""
    if kernels != "auto":
        return kernels
    return "triton" if scheme not in SCHEMES or SCHEMES[scheme].code_format == "int" else "bitsandbytes"


def _ours(bundle: Bundle, plan: GpuPlan, gpu: Gpu, bar: Progress) -> _Opened:
    recipe, model = bundle.manifest.recipe, bundle.manifest.model
    backend = backend_for(recipe.scheme, plan.kernels)
    own = backend != "bitsandbytes"
    # Where nothing is captured a long context takes minutes to read; the state has one size, so one length tells all.
    contexts = plan.contexts if own else plan.contexts[:1]
    moved = weights_read_bytes(model.mamba, recipe), 2 * state_bytes(model)
    opened: list[Decoder] = []

    def enter() -> GpuRunner:
        opened.append(open_decoder(bundle, gpu.device.type, backend))
        return Ours(f"cobra_edge {recipe.scheme}", opened[0], gpu, predictions_of(opened[0], contexts, bar), moved)

    task = bar.add_task(f"opening {recipe.scheme}", total=2)
    runner, memory = with_memory(gpu, recipe.scheme, enter, plan.prompt_tokens[-1])
    bar.advance(task)
    distances = check_on_gpu(opened[0], plain_decoder(bundle), half_steps=not own)
    bar.advance(task)
    prefix_reuse = measure_prefix_reuse(bundle, opened[0], bar, copy_state) if own else None
    facts = {
        "scheme": recipe.scheme,
        "relative_rms_from_numpy": distances,
        "launches_per_token": launches_per_token(model.mamba, recipe) if own else None,
        "prefix_reuse": prefix_reuse,
    }
    return _Opened(runner, memory | facts, own)


def _rounds(model: CobraConfig, plan: GpuPlan, runners: Sequence[GpuRunner], gpu: Gpu, bar: Progress) -> list[Round]:
    limits = GpuLimits(gpu)
    task = bar.add_task("rounds", total=plan.rounds * len(runners))

    def one(index: int) -> Round:
        peak, reads = limits.peak_products(), []

        def timed(runner: GpuRunner) -> Figures:
            bandwidth = limits.read_bandwidth()
            reads.append(bandwidth)
            found = step_figures(runner, plan.new_tokens, lambda context: runner.traffic_bytes(context) / bandwidth)
            for n in plan.prompt_tokens if runner.reads_prompts else ():
                found |= prompt_figures(n, runner.prefill(n), prefill_products(model.mamba, n), peak)
            bar.advance(task)
            return found

        figures = in_turns(runners, index, timed)
        return Round(tuple(reads), {_PEAK: peak}, figures)

    return [one(index) for index in range(plan.rounds)]
