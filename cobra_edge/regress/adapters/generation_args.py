"""Generation arguments of a benchmark harness: stop strings, token limit, sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...decode.sampling import GREEDY, Sampling
from ...errors import InputError
from ...terminal.suggestions import near_matches

DEFAULT_MAX_NEW_TOKENS = 256
# Synonyms; the first that is given counts.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "seed")
# Unsupported arguments, and the values at which each has no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "repetition_penalty": (None, 1.0),
    "length_penalty": (None, 1.0),
    "use_cache": (None, True, False),
}


@dataclass(frozen=True)
class GenerationArgs:
    """How to generate an answer.

    Attributes:
        stops: strings before the first of which the answer ends.
        max_new_tokens: token limit.
        sampling: how the next token is chosen.
    """

    stops: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling

    @classmethod
    def of(cls, options: Mapping[str, Any], number: int = 0) -> GenerationArgs:
        """Parse the generation options of a task.

        Args:
            options: as the harnesses pass them: `until`, a limit, `do_sample`, `temperature`, `top_k`, `top_p`, `seed`.
            number: of the request; added to the seed, so that repeated requests are sampled independently.

        Raises:
            InputError: an unknown or unsupported option, or an invalid value.
        """
        for name, value in options.items():
            if name in _NEUTRAL and value not in _NEUTRAL[name]:
                raise InputError(f"generation option {name}={value!r} is not supported; remove it from the task")
            if name not in {"until", *_LIMITS, *_SAMPLING, *_NEUTRAL}:
                known = ("until", *_LIMITS, *_SAMPLING)
                raise InputError(f"unknown generation option {name!r}{near_matches(name, known)}; remove it from the task")
        until = options.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(stop, str) for stop in stops):
            raise InputError(f"generation option until is {until!r}, expected a string or a list of strings")
        limit = next((options[name] for name in _LIMITS if options.get(name) is not None), DEFAULT_MAX_NEW_TOKENS)
        if not isinstance(limit, int) or limit < 1:
            raise InputError(f"the token limit is {limit!r}, expected an integer of 1 or more")
        return cls(tuple(stop for stop in stops if stop), limit, _sampling(options, number))

    def cut(self, text: str) -> str | None:
        """Return the text before the first stop string; None if there is none in it."""
        found = [at for at in map(text.find, self.stops) if at >= 0]
        return text[: min(found)] if found else None


def _sampling(options: Mapping[str, Any], number: int) -> Sampling:
    """Return greedy decoding unless sampling is requested; as in transformers, the default temperature of do_sample is 1."""
    temperature, wanted = options.get("temperature"), options.get("do_sample")
    sampled = bool(temperature) if wanted is None else bool(wanted)
    if not sampled or temperature == 0:
        return GREEDY
    try:
        return Sampling(
            temperature=1.0 if temperature is None else float(temperature),
            top_k=int(options.get("top_k") or 0),
            top_p=float(options.get("top_p") or 1.0),
            seed=int(options.get("seed") or 0) + number,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"a generation option is not a number ({error}); fix it in the task") from error
