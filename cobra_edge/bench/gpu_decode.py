"""Decode on a card: every scheme and every peer in turns, in one run, beside what the card's memory and tensor cores give.

What a token costs is taken from the generation that a user's answer comes from, on the card and in a CUDA graph where the
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
from .gpu import Card, CardLimits
from .gpu_gate import check_on_card, plain_decoder
from .gpu_peers import CARD_PEERS
from .gpu_runners import CardContestant, Ours, enough_memory, with_memory
from .limits import prefill_products
from .prefix_reuse import kept_as_copy, measure_follow_up
from .roofline import launches_per_token, weights_read_bytes
from .rounds import Figures, Round, described, in_turns, limits_of, prompt_figures, ratios, step_figures
from .runners import readings_of

_PEAK = "float16"
_FLOAT_SCHEME = "fp16"


@dataclass(frozen=True)
class CardPlan:
    """What is timed on a card.

    Attributes:
        prompt_tokens: lengths to prefill.
        contexts: how many tokens have been read before steps are timed.
        new_tokens: steps that are timed together.
        rounds: how often each is timed.
        kernels: a backend's name, or "auto".
        peers: names of `CARD_PEERS`.
    """

    prompt_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    rounds: int
    kernels: str
    peers: tuple[str, ...]


@dataclass(frozen=True)
class _Opened:
    """A contestant, what was found of it before its turns, and whether it is one of our own decoders of our own codes."""

    contestant: CardContestant
    facts: dict[str, Any]
    own: bool


def measure_on_card(bundles: Iterator[Bundle], plan: CardPlan, card: Card, bar: Progress) -> dict[str, Any]:
    """Check each decoder, then time all of them and the peers in turns.

    Args:
        bundles: of one model, a scheme each; opened as their turn comes, before the first round.
        plan: what is timed.
        card: where.
        bar: for progress.

    Returns:
        The result's row: limits, contestants with figures and memory, ratios within rounds by the contestant they are taken of.

    Raises:
        MachineError: a decoder is not what it should be, memory is lacking, or no backend opens a bundle.
    """
    entered = []
    model: CobraConfig | None = None
    for bundle in bundles:
        model = bundle.manifest.model
        entered.append(_ours(bundle, plan, card, bar))
    assert model is not None, "no bundle"
    for name, peer in CARD_PEERS.items():  # in the table's order: what takes the memory that is left comes last
        if name in plan.peers:
            bar.add_task(f"opening {name}", total=1)
            made, memory = with_memory(card, name, partial(peer.open, model, plan.contexts, card), plan.prompt_tokens[-1])
            entered.append(_Opened(made, memory, own=False))
    contestants = [e.contestant for e in entered]
    with enough_memory("what the limits are measured with"):
        rounds = _rounds(model, plan, contestants, card, bar)
    own = [e.contestant.name for e in entered if e.own]
    against = [e.contestant.name for e in entered if not e.own or e.facts["scheme"] == _FLOAT_SCHEME]
    return {
        "batch": 1,
        "rounds": plan.rounds,
        "prompt_tokens": list(plan.prompt_tokens),
        "contexts": list(plan.contexts),
        "new_tokens": plan.new_tokens,
        "state_bytes": state_bytes(model),
        "limits": limits_of(rounds),
        "contestants": [described(e.contestant, rounds) | e.facts for e in entered],
        "ratios": {other: ratios(rounds, [name for name in own if name != other], other) for other in against},
    }


def backend_for(scheme: str, kernels: str) -> str:
    """Return the backend that measures a scheme: bitsandbytes runs its own codes, our kernels ours."""
    if kernels != "auto":
        return kernels
    return "triton" if scheme not in SCHEMES or SCHEMES[scheme].code_format == "int" else "bitsandbytes"


def _ours(bundle: Bundle, plan: CardPlan, card: Card, bar: Progress) -> _Opened:
    recipe, model = bundle.manifest.recipe, bundle.manifest.model
    backend = backend_for(recipe.scheme, plan.kernels)
    own = backend != "bitsandbytes"
    # Where nothing is captured a long context takes minutes to read; the state has one size, so one length tells all.
    contexts = plan.contexts if own else plan.contexts[:1]
    moved = weights_read_bytes(model.mamba, recipe), 2 * state_bytes(model)
    opened: list[Decoder] = []

    def enter() -> CardContestant:
        opened.append(open_decoder(bundle, card.device.type, backend))
        return Ours(f"cobra_edge {recipe.scheme}", opened[0], card, readings_of(opened[0], contexts, bar), moved)

    task = bar.add_task(f"opening {recipe.scheme}", total=2)
    contestant, memory = with_memory(card, recipe.scheme, enter, plan.prompt_tokens[-1])
    bar.advance(task)
    distances = check_on_card(opened[0], plain_decoder(bundle), half_steps=not own)
    bar.advance(task)
    follow_up = measure_follow_up(bundle, opened[0], bar, kept_as_copy) if own else None
    facts = {
        "scheme": recipe.scheme,
        "relative_rms_from_numpy": distances,
        "launches_per_token": launches_per_token(model.mamba, recipe) if own else None,
        "follow_up": follow_up,
    }
    return _Opened(contestant, memory | facts, own)


def _rounds(
    model: CobraConfig, plan: CardPlan, contestants: Sequence[CardContestant], card: Card, bar: Progress
) -> list[Round]:
    limits = CardLimits(card)
    task = bar.add_task("rounds", total=plan.rounds * len(contestants))

    def one(index: int) -> Round:
        peak, reads = limits.peak_products(), []

        def timed(contestant: CardContestant) -> Figures:
            bandwidth = limits.read_bandwidth()
            reads.append(bandwidth)
            found = step_figures(contestant, plan.new_tokens, lambda context: contestant.traffic_bytes(context) / bandwidth)
            for n in plan.prompt_tokens if contestant.reads_prompts else ():
                found |= prompt_figures(n, contestant.prefill(n), prefill_products(model.mamba, n), peak)
            bar.advance(task)
            return found

        figures = in_turns(contestants, index, timed)
        return Round(tuple(reads), {_PEAK: peak}, figures)

    return [one(index) for index in range(plan.rounds)]
