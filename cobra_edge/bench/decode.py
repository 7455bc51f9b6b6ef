"""Decode: tokens a second of the decoder and of a peer in turns, beside what this machine allows.

A decoding step reads every weight once and does little with each, so the time of a token cannot fall below the bytes of the
decoder over the read bandwidth. A prompt's tokens share what is read, so its time cannot fall below the products over what the
registers take. Both bounds are measured in the same run. In a round each contestant has its turn, bandwidth first, in an order
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
from .prefix_reuse import measure_follow_up
from .rounds import Figures, Round, described, in_turns, limits_of, prompt_figures, ratios, step_figures
from .runners import Contestant, Native, readings_of
from .startup import measure_residence

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
        threads: of every contestant; None for one a physical core.
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


def measure_bundle(
    bundle: Bundle, plan: Plan, peer: AbstractContextManager[Contestant | None], bar: Progress
) -> dict[str, Any]:
    """Check the native decoder, then time opening, a follow-up question, prefill and decoding.

    Args:
        bundle: whose decoder.
        plan: what is timed.
        peer: opened when its turn comes nearer, ended with the last round.
        bar: for progress.

    Returns:
        One row of the result: limits, contestants with their figures, ratios to the peer.

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
    residence = measure_residence(bundle, options[forms[0]], plan.kernels, bar)
    decoders = {form: CpuDecoder(bundle, options[form], plan.kernels) for form in forms}
    follow_up = measure_follow_up(bundle, decoders[forms[0]], bar)
    readings = readings_of(decoders[forms[0]], plan.contexts, bar)  # what is in a state changes no speed
    contestants: list[Contestant] = [Native(bundle, d, form, plan.team, readings) for form, d in decoders.items()]
    with peer as opened:
        contestants += [opened] if opened is not None else []
        rounds = _rounds(bundle, plan, contestants, bar)
        rows = [described(c, rounds) for c in contestants]
    peer_name = contestants[-1].name if len(contestants) > len(forms) else None
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
        "contestants": rows,
        "peer": peer_name,
        "ratios": {} if peer_name is None else ratios(rounds, [c.name for c in contestants[:-1]], peer_name),
        "residence": residence,
        "follow_up": follow_up | {"activations": forms[0]},
    }


def _rounds(bundle: Bundle, plan: Plan, contestants: Sequence[Contestant], bar: Progress) -> list[Round]:
    from ..decode import _cpu

    model, team = bundle.manifest.model, plan.team
    best = _cpu.kernel_names()[0]  # what a peer that does not say would take
    kernels = {c.name: c.facts().get("kernels", best) for c in contestants}
    int8 = {c.name: c.facts().get("activations") == "int8" for c in contestants}
    memory = Memory(team)
    for contestant in contestants:  # pages are mapped and threads are started
        contestant.prefill(_WARM_TOKENS)
        contestant.steps(1, contestant.contexts[0])
    task = bar.add_task("rounds", total=plan.rounds * len(contestants))

    def one(index: int) -> Round:
        time.sleep(_SETTLE_SECONDS)
        peaks, reads = {name: peak_products(name, team) for name in sorted(set(kernels.values()))}, []

        def timed(contestant: Contestant) -> Figures:
            time.sleep(_SETTLE_SECONDS)
            bandwidth = memory.read_bandwidth()
            reads.append(bandwidth)
            traffic = contestant.weights_bytes + 2 * state_bytes(model)  # the state is read and written
            peak = peaks[kernels[contestant.name]] if int8[contestant.name] else None
            found = step_figures(contestant, plan.new_tokens, lambda _context: traffic / bandwidth)
            for n in plan.prompt_tokens:
                found |= prompt_figures(n, contestant.prefill(n), prefill_products(model.mamba, n), peak)
            bar.advance(task)
            return found

        figures = in_turns(contestants, index, timed)
        return Round(tuple(reads), peaks, figures)

    return [one(index) for index in range(plan.rounds)]
