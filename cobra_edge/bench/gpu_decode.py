"""Decoding and prefill speed on a GPU: schemes and peers alternate in one run, compared with the limits of the GPU.

Decoding is timed by the same generation that answers a user, in a CUDA graph if the decoder has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from rich.progress import Progress

from ..bundle.memory_plan import state_bytes
from ..bundle.reader import Bundle
from ..decode.backends import open_decoder
from ..formats.model_config import CobraConfig
from ..formats.scheme import SCHEMES
from .decode_result import GpuDecodeRow, RunnerResult
from .gpu import Gpu, GpuLimits
from .gpu_gate import check_on_gpu, reference_decoder
from .gpu_runners import GpuRunner, Ours, enough_memory, open_ours, opened_peer
from .prefix_reuse import VISUAL_TOKENS, copy_state, measure_prefix_reuse
from .roofline import launches_per_token, prefill_products, weights_read_bytes
from .rounds import Figures, Round, described, in_turns, limits_of, prompt_figures, ratios, step_figures
from .runners import predictions_of

_PEAK = "float16"
_FLOAT_SCHEME = "fp16"


@dataclass(frozen=True)
class GpuPlan:
    """What is timed on a GPU.

    Attributes:
        prompt_tokens: lengths to prefill.
        contexts: context lengths at which decoding is timed.
        new_tokens: tokens decoded per measurement.
        rounds: repetitions of each measurement.
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
    """A runner, with what was measured of it before the rounds.

    Attributes:
        runner: to time.
        measures: fields of `RunnerResult`.
        own: whether it is one of our decoders with our own quantized weights.
    """

    runner: GpuRunner
    measures: dict[str, Any]
    own: bool

    @property
    def is_float(self) -> bool:
        """Whether its weights are float16."""
        return self.measures.get("scheme") == _FLOAT_SCHEME

    def result(self, rounds: Sequence[Round]) -> RunnerResult:
        """Return its row of the result."""
        return msgspec.structs.replace(described(self.runner, rounds), **self.measures)


def measure_on_gpu(bundles: Iterator[Bundle], plan: GpuPlan, gpu: Gpu, bar: Progress) -> GpuDecodeRow:
    """Verify each decoder, then time all of them and the peers in alternation.

    Args:
        bundles: of one model, one per scheme; opened one by one before the first round.
        plan: what is timed.
        gpu: to measure.
        bar: for progress.

    Returns:
        The row of the result.

    Raises:
        MachineError: a decoder is not correct, out of memory, or no backend opens a bundle.
    """
    entered = []
    model: CobraConfig | None = None
    for bundle in bundles:
        model = bundle.manifest.model
        entered.append(_ours(bundle, plan, gpu, bar))
    assert model is not None, "no bundle"
    entered += _peers(model, plan, gpu, bar)
    runners = [e.runner for e in entered]
    with enough_memory("measuring the limits"):
        rounds = _rounds(model, plan, runners, gpu, bar)
    own = [e.runner.name for e in entered if e.own]
    against = [e.runner.name for e in entered if not e.own or e.is_float]
    return GpuDecodeRow(
        batch=1,
        rounds=plan.rounds,
        prompt_tokens=plan.prompt_tokens,
        contexts=plan.contexts,
        new_tokens=plan.new_tokens,
        state_bytes=state_bytes(model),
        limits=limits_of(rounds),
        runners=tuple(e.result(rounds) for e in entered),
        ratios={other: ratios(rounds, [name for name in own if name != other], other) for other in against},
    )


def backend_for(scheme: str, kernels: str) -> str:
    """Return the backend for a scheme: bitsandbytes for its own formats, our kernels for ours."""
    if kernels != "auto":
        return kernels
    return "cuda" if scheme not in SCHEMES or SCHEMES[scheme].code_format == "int" else "bitsandbytes"


def _ours(bundle: Bundle, plan: GpuPlan, gpu: Gpu, bar: Progress) -> _Opened:
    recipe, model = bundle.manifest.recipe, bundle.manifest.model
    backend = backend_for(recipe.scheme, plan.kernels)
    own = backend != "bitsandbytes"
    # Without a CUDA graph a long context takes minutes; the state has a fixed size, so one length is enough.
    contexts = plan.contexts if own else plan.contexts[:1]
    moved = weights_read_bytes(model.mamba, recipe), 2 * state_bytes(model)
    task = bar.add_task(f"opening {recipe.scheme}", total=2)
    with enough_memory(recipe.scheme):
        decoder, peak_bytes = open_ours(gpu, lambda: open_decoder(bundle, "cuda", backend), plan.prompt_tokens[-1])
    bar.advance(task)
    reference = reference_decoder(bundle)
    distances = check_on_gpu(decoder, reference, half_steps=not own)
    bar.advance(task)
    image = min(VISUAL_TOKENS, plan.prompt_tokens[-1])
    prefix_reuse = measure_prefix_reuse(bundle, decoder, bar, copy_state, image) if own else None
    runner = Ours(f"cobra_edge {recipe.scheme}", decoder, gpu, predictions_of(decoder, contexts, bar), moved)
    measures = {
        "peak_bytes": peak_bytes,
        "scheme": recipe.scheme,
        "reference": reference.name,
        "relative_rms_from_reference": distances,
        "launches_per_token": launches_per_token(model.mamba, recipe) if own else None,
        "prefix_reuse": prefix_reuse,
    }
    return _Opened(runner, measures, own)


def _peers(model: CobraConfig, plan: GpuPlan, gpu: Gpu, bar: Progress) -> Iterator[_Opened]:
    if not plan.peers:
        return
    from .gpu_peers import GPU_PEERS  # needs torch

    for name, peer in GPU_PEERS.items():  # in the order of the table: the one that takes all memory left comes last
        if name in plan.peers:
            bar.add_task(f"opening {name}", total=1)
            made, peak_bytes = opened_peer(gpu, name, partial(peer.open, model, plan.contexts, gpu), plan.prompt_tokens[-1])
            yield _Opened(made, {"peak_bytes": peak_bytes}, own=False)


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
        return Round(tuple(reads), {} if peak is None else {_PEAK: peak}, figures)

    return [one(index) for index in range(plan.rounds)]
