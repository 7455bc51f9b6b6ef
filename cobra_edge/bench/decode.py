"""Decoding and prefill speed on a CPU, compared with the limits of the machine and with a peer.

Decoding is bound by memory: the time per token is at least the bytes of the decoder over the read bandwidth. Prefill is bound
by arithmetic: its time is at least the multiply-accumulates of its matmuls over the peak rate of the instruction set. Both
limits are measured in the same run. Runners alternate in rounds; ratios are taken within a round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import msgspec
from rich.progress import Progress

from ..bundle.memory_plan import state_bytes
from ..bundle.reader import DECODER, Bundle
from ..decode.cpu import CpuDecoder
from ..decode.decoder import DecoderOptions
from ..environment.threads import default_threads
from ..formats.recipe import matrix_names, quantized_scheme
from .decode_result import CpuDecodeRow
from .gate import check
from .prefix_reuse import measure_prefix_reuse
from .roofline import Memory, peak_products, prefill_products
from .rounds import Figures, Round, described, in_turns, limits_of, prompt_figures, ratios, step_figures
from .runners import Native, Runner, predictions_of
from .startup import measure_startup

_SETTLE_SECONDS = 0.05  # idle threads of the previous runner spin for a while before they sleep
_WARM_TOKENS = 16


@dataclass(frozen=True)
class Plan:
    """What is timed.

    Attributes:
        prompt_tokens: lengths to prefill.
        contexts: context lengths at which decoding is timed; the state has a fixed size, so speed should not depend on them.
        new_tokens: tokens decoded per measurement.
        rounds: repetitions of each measurement.
        threads: of every runner; None for one per physical core.
        activations: data types of the native decoder's activations.
        kernels: its instruction set, or "auto".
    """

    prompt_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    rounds: int
    threads: int | None
    activations: tuple[str, ...]
    kernels: str

    @property
    def team(self) -> int:
        """The number of threads."""
        return self.threads or default_threads()


def measure_bundle(bundle: Bundle, plan: Plan, peer: AbstractContextManager[Runner | None], bar: Progress) -> CpuDecodeRow:
    """Verify the native decoder, then time startup, prefix reuse, prefill and decoding.

    Args:
        bundle: to measure.
        plan: what is timed.
        peer: entered right before the rounds, left after them.
        bar: for progress.

    Returns:
        One row of the result.

    Raises:
        MachineError: the native decoder is not correct, or the peer fails. InputError: kernels that this processor lacks.
    """
    scheme = bundle.manifest.recipe.scheme
    config = bundle.manifest.model.mamba
    # Without quantized matrices, activations are always float32.
    quantized = any(quantized_scheme(bundle.manifest.recipe, name) for name in matrix_names(config))
    forms = plan.activations if quantized else ("float32",)
    options = {form: DecoderOptions(plan.threads, form) for form in forms}
    distances = {form: check(bundle, options[form], plan.kernels, bar) for form in forms}
    startup = measure_startup(bundle, options[forms[0]], plan.kernels, bar)
    decoders = {form: CpuDecoder(bundle, options[form], plan.kernels) for form in forms}
    prefix_reuse = measure_prefix_reuse(bundle, decoders[forms[0]], bar)
    predictions = predictions_of(decoders[forms[0]], plan.contexts, bar)  # speed does not depend on the values in a state
    runners: list[Runner] = [Native(bundle, d, form, plan.team, predictions) for form, d in decoders.items()]
    with peer as opened:
        runners += [opened] if opened is not None else []
        rounds = _rounds(bundle, plan, runners, bar)
        rows = [described(c, rounds) for c in runners]
    peer_name = runners[-1].name if len(runners) > len(forms) else None
    return CpuDecodeRow(
        scheme=scheme,
        batch=1,
        threads=plan.team,
        rounds=plan.rounds,
        prompt_tokens=plan.prompt_tokens,
        contexts=plan.contexts,
        new_tokens=plan.new_tokens,
        decoder_bytes=bundle.manifest.files[DECODER].bytes,
        relative_rms_from_numpy=distances,
        limits=limits_of(rounds),
        runners=tuple(rows),
        peer=peer_name,
        ratios={} if peer_name is None else ratios(rounds, [c.name for c in runners[:-1]], peer_name),
        startup=startup,
        prefix_reuse=msgspec.structs.replace(prefix_reuse, activations=forms[0]),
    )


def _rounds(bundle: Bundle, plan: Plan, runners: Sequence[Runner], bar: Progress) -> list[Round]:
    from ..decode.native.library import kernel_names

    model, team = bundle.manifest.model, plan.team
    best = kernel_names()[0]  # assumed for a peer that does not report it
    kernels = {c.name: c.facts().kernels or best for c in runners}
    int8 = {c.name: c.facts().activations == "int8" for c in runners}
    memory = Memory(team)
    for runner in runners:  # maps pages and starts threads
        runner.prefill(_WARM_TOKENS)
        runner.steps(1, runner.contexts[0])
    task = bar.add_task("rounds", total=plan.rounds * len(runners))

    def one(index: int) -> Round:
        time.sleep(_SETTLE_SECONDS)
        peaks, reads = {name: peak_products(name, team) for name in sorted(set(kernels.values()))}, []

        def timed(runner: Runner) -> Figures:
            time.sleep(_SETTLE_SECONDS)
            bandwidth = memory.read_bandwidth()
            reads.append(bandwidth)
            traffic = runner.weights_bytes + 2 * state_bytes(model)  # the state is read and written
            peak = peaks[kernels[runner.name]] if int8[runner.name] else None
            found = step_figures(runner, plan.new_tokens, lambda _context: traffic / bandwidth)
            for n in plan.prompt_tokens:
                found |= prompt_figures(n, runner.prefill(n), prefill_products(model.mamba, n), peak)
            bar.advance(task)
            return found

        figures = in_turns(runners, index, timed)
        return Round(tuple(reads), peaks, figures)

    return [one(index) for index in range(plan.rounds)]
