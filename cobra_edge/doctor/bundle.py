"""Checks of a bundle: whether it runs on this machine, on what, and how fast."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Set

import msgspec

from ..bench.roofline import token_bytes
from ..bundle.reader import Bundle
from ..decode.backends import BACKENDS, open_decoder
from ..decode.decoder import Decoder
from ..decode.sampling import GREEDY
from ..environment.available_memory import available_bytes
from ..inference.generate import generate
from ..vision.runtimes import RUNTIMES
from .check import Check

_PROMPT_TOKENS = 64
_SECONDS = 2.0  # of decoding, about
_MOST_TOKENS = 256
_NO_END = -1  # no token has this id


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder backend or a vision runtime.

    Attributes:
        name: as given to an option.
        devices: "cpu", "cuda".
        refuses: why it cannot run the bundle here; None if it can.
    """

    name: str
    devices: tuple[str, ...]
    refuses: str | None

    @property
    def title(self) -> str:
        """The name, with the device if there is one alone."""
        return f"{self.name} on {self.devices[0]}" if len(self.devices) == 1 else self.name


class ChoiceCheck(Check, frozen=True, kw_only=True):
    """What could run a part of the bundle, in order of preference."""

    choices: tuple[Choice, ...]


class BundleMemoryCheck(Check, frozen=True, kw_only=True):
    """Memory that the bundle takes, without what its target's own system takes.

    Attributes:
        needed_bytes: by the memory plan of the bundle.
        available_bytes: None if the system does not report it.
    """

    needed_bytes: int
    available_bytes: int | None


class SpeedCheck(Check, frozen=True, kw_only=True):
    """Speed of the decoder that runs by default.

    Attributes:
        decoder: its name.
        token_bytes: memory traffic of a token: weights and state.
        predicted_tok_s: what the measured memory bandwidth allows; None without it. Weights that fit in a cache are faster.
        decode_tok_s: measured, greedy.
        prefill_tok_s: measured with a short prompt.
    """

    decoder: str
    token_bytes: int
    predicted_tok_s: float | None
    decode_tok_s: float
    prefill_tok_s: float


class BundleReport(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle on this machine.

    Attributes:
        directory: of the bundle.
        model, target, scheme: from its manifest.
        decoder, vision: what runs its parts; vision is None of a text-only model.
        memory: what it takes.
        speed: None if nothing can open the decoder.
    """

    directory: str
    model: str
    target: str
    scheme: str
    decoder: ChoiceCheck
    vision: ChoiceCheck | None
    memory: BundleMemoryCheck
    speed: SpeedCheck | None


def check_bundle(bundle: Bundle, bandwidths: dict[str, float | None], told: Set[str]) -> BundleReport:
    """Check a bundle.

    Args:
        bundle: an open bundle.
        bandwidths: measured bytes per second, by device "cpu" and "cuda".
        told: what the checks of the machine say; reasons among them are not repeated in texts.

    Raises:
        MachineError: the decoder failed to open or to run.
    """
    manifest = bundle.manifest
    decoder = _choice([Choice(name=b.name, devices=(b.device,), refuses=b.refuses(bundle)) for b in BACKENDS], told)
    vision = None
    if manifest.model.vision is not None:
        vision = _choice([Choice(name=r.name, devices=r.devices, refuses=r.refuses(bundle)) for r in RUNTIMES], told)
    memory = _memory(bundle)
    return BundleReport(
        directory=str(bundle.directory),
        model=manifest.model.model_id,
        target=manifest.target,
        scheme=manifest.recipe.scheme,
        decoder=decoder,
        vision=vision,
        memory=memory,
        speed=_speed(bundle, decoder, bandwidths) if "missing" not in (decoder.verdict, memory.verdict) else None,
    )


def _choice(choices: list[Choice], told: Set[str]) -> ChoiceCheck:
    """Tell the first choice that does not refuse, and why those before it do."""
    first = next((c for c in choices if c.refuses is None), None)
    before = choices if first is None else choices[: choices.index(first)]
    refused = [f"not {c.title}: {c.refuses}" for c in before if c.refuses not in told]
    text = "; ".join(["nothing runs it here" if first is None else first.title, *refused])
    return ChoiceCheck(verdict="missing" if first is None else "ok", text=text, choices=tuple(choices))


def _memory(bundle: Bundle) -> BundleMemoryCheck:
    plan = bundle.manifest.memory_plan
    needed, available = plan.total_bytes - plan.reserved_bytes, available_bytes()
    text = f"takes {needed / 1e9:.2f} GB"
    if available is None:
        return BundleMemoryCheck(text=text, needed_bytes=needed, available_bytes=None)
    text = f"{text}, {available / 1e9:.2f} are available"
    short = needed > available
    return BundleMemoryCheck(
        verdict="missing" if short else "ok",
        text=f"{text}; close other programs, or export it with fewer bits" if short else text,
        needed_bytes=needed,
        available_bytes=available,
    )


def _speed(bundle: Bundle, checked: ChoiceCheck, bandwidths: dict[str, float | None]) -> SpeedCheck:
    """Measure the decoder that runs by default. Raises MachineError if it cannot be opened."""
    decoder, manifest = open_decoder(bundle), bundle.manifest
    (device,) = next(c.devices for c in checked.choices if c.refuses is None)
    moved, bandwidth = token_bytes(manifest.model, manifest.recipe), bandwidths.get(device)
    predicted = None if bandwidth is None else bandwidth / moved
    prefill, decode = _rates(decoder)
    text = f"{decode:,.1f} tokens/s, {prefill:,.0f} of a prompt"
    if predicted is not None:
        text += f"; memory bandwidth allows {predicted:,.1f} ({moved / 1e6:,.1f} MB a token), more where weights fit in a cache"
    return SpeedCheck(
        text=text,
        decoder=decoder.name,
        token_bytes=moved,
        predicted_tok_s=predicted,
        decode_tok_s=decode,
        prefill_tok_s=prefill,
    )


def _rates(decoder: Decoder) -> tuple[float, float]:
    """Return the tokens per second of a short prompt, and of greedy decoding for about two seconds."""
    prompt = [i % decoder.config.vocab for i in range(_PROMPT_TOKENS)]
    decoder.prefill(decoder.embed(prompt), decoder.new_state())  # maps weights, starts threads
    state = decoder.new_state()
    began = time.perf_counter()
    logits = decoder.prefill(decoder.embed(prompt), state)
    prefill = time.perf_counter() - began

    def seconds(count: int) -> float:
        """Time steps; the last token of an answer is not fed back, so one more is generated."""
        began = time.perf_counter()
        deque(generate(decoder, logits, state.copy(), _NO_END, count + 1, GREEDY), maxlen=0)
        return time.perf_counter() - began

    count = min(_MOST_TOKENS, max(1, int(_SECONDS / seconds(1))))
    return _PROMPT_TOKENS / prefill, count / seconds(count)
