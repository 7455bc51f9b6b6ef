"""Decode: tokens a second of the decoder and of a peer in turns, beside what this machine allows.

A decoding step reads every weight once and does little with each, so the time of a token cannot fall below the bytes of the
decoder over the read bandwidth. A prompt's tokens share what is read, so its time cannot fall below the products over what the
registers take. Both bounds are measured in the same run. In a round each runner has its turn, bandwidth first, in an order
that turns round every time. Ratios are taken within a round, where the machine was the same for both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress

from ..bundle.memory_plan import state_bytes
from ..bundle.reader import DECODER, Bundle
from ..decode.cpu import CpuDecoder
from ..decode.decoder import DecoderOptions
from ..environment.threads import default_threads
from ..formats.recipe import matrix_names, quantized_scheme
from .gate import check
from .limits import Memory, peak_products, prefill_products
from .prefix_reuse import measure_prefix_reuse
from .rounds import Figures, Round, described, in_turns, limits_of, prompt_figures, ratios, step_figures
from .runners import Native, Runner, predictions_of
from .startup import measure_startup

_SETTLE_SECONDS = 0.05  # threads of the one before spin for a while before they sleep
_WARM_TOKENS = 16


@dataclass(frozen=True)
class Plan:
    """What is timed.

    Attributes:
        prompt_tokens: lengths to prefill.
        contexts: how many tokens have been read before steps are timed; the state has one size, so it should not matter.
        new_tokens: steps that are timed together.
        rounds: how often each is timed.
        threads: of every runner; None for one a physical core.
        activations: forms of the native decoder.
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


def measure_bundle(bundle: Bundle, plan: Plan, peer: AbstractContextManager[Runner | None], bar: Progress) -> dict[str, Any]:
    """Check the native decoder, then time opening, a follow-up question, prefill and decoding.

    Args:
        bundle: whose decoder.
        plan: what is timed.
        peer: opened when its turn comes nearer, ended with the last round.
        bar: for progress.

    Returns:
        One row of the result: limits, runners with their figures, ratios to the peer.

    Raises:
        MachineError: the native decoder is not what it should be, or the peer fails. InputError: kernels this processor lacks.
    """
    scheme = bundle.manifest.recipe.scheme
    config = bundle.manifest.model.mamba
    # Where nothing is quantized, activations have one form.
    quantized = any(quantized_scheme(bundle.manifest.recipe, name) for name in matrix_names(config))
    forms = plan.activations if quantized else ("float32",)
    options = {form: DecoderOptions(plan.threads, form) for form in forms}
    distances = {form: check(bundle, options[form], plan.kernels, bar) for form in forms}
    startup = measure_startup(bundle, options[forms[0]], plan.kernels, bar)
    decoders = {form: CpuDecoder(bundle, options[form], plan.kernels) for form in forms}
    prefix_reuse = measure_prefix_reuse(bundle, decoders[forms[0]], bar)
    predictions = predictions_of(decoders[forms[0]], plan.contexts, bar)  # what is in a state changes no speed
    runners: list[Runner] = [Native(bundle, d, form, plan.team, predictions) for form, d in decoders.items()]
    with peer as opened:
        runners += [opened] if opened is not None else []
        rounds = _rounds(bundle, plan, runners, bar)
        rows = [described(c, rounds) for c in runners]
    peer_name = runners[-1].name if len(runners) > len(forms) else None
    return {
        "scheme": scheme,
        "batch": 1,
        "threads": plan.team,
        "rounds": plan.rounds,
        "prompt_tokens": list(plan.prompt_tokens),
        "contexts": list(plan.contexts),
        "new_tokens": plan.new_tokens,
        "decoder_bytes": bundle.manifest.files[DECODER].bytes,
        "relative_rms_from_numpy": distances,
        "limits": limits_of(rounds),
        "runners": rows,
        "peer": peer_name,
        "ratios": {} if peer_name is None else ratios(rounds, [c.name for c in runners[:-1]], peer_name),
        "startup": startup,
        "prefix_reuse": prefix_reuse | {"activations": forms[0]},
    }


def _rounds(bundle: Bundle, plan: Plan, runners: Sequence[Runner], bar: Progress) -> list[Round]:
    from ..decode import _cpu

    model, team = bundle.manifest.model, plan.team
    best = _cpu.kernel_names()[0]  # what a peer that does not say would take
    kernels = {c.name: c.facts().get("kernels", best) for c in runners}
    int8 = {c.name: c.facts().get("activations") == "int8" for c in runners}
    memory = Memory(team)
    for runner in runners:  # pages are mapped and threads are started
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
