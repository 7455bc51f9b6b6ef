"""The gate before every measurement on a GPU: both ways of reading tokens against the reference, and the choice of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..bundle.reader import Bundle
from ..decode.decoder import Decoder, DecoderOptions
from ..decode.numpy_reference import NumpyDecoder
from ..decode.sampling import GREEDY
from ..errors import MachineError
from ..inference.generate import generate

_TOKENS = 6
_ANSWER = 4
# Relative RMS of the logits. Tokens read together: what enters a product is rounded to float16, 3e-4 of it, and 64 layers add
# to each other what that does. One token: float32 throughout, where sums are only taken in another order.
TOGETHER, ONE_BY_ONE = 2e-2, 2e-3


def plain_decoder(bundle: Bundle) -> Decoder:
    """Return what a GPU's decoder is compared with: numpy's, activations left float as a GPU leaves them, layer by layer."""
    return NumpyDecoder(bundle, DecoderOptions(activations="float32"))


def check_on_gpu(decoder: Decoder, reference: Decoder, half_steps: bool) -> dict[str, float]:
    """Compare a GPU's decoder with the reference at each of a few tokens, read together and one by one.

    Args:
        decoder: what is to be measured.
        reference: the same bundle's, computed plainly.
        half_steps: whether single tokens too are multiplied in float16, as bitsandbytes does.

    Returns:
        Relative RMS distances of the logits, by way.

    Raises:
        MachineError: one is beyond its limit, or its generation chooses other tokens than its steps do; no figure of this
            decoder would mean anything.
    """
    tokens = list(range(5, 5 + _TOKENS))
    expected = reference.forward(reference.embed(tokens), reference.new_state())
    together = decoder.forward(decoder.embed(tokens), decoder.new_state())
    state = decoder.new_state()
    one_by_one = np.stack([np.array(decoder.step(t, state)) for t in tokens])
    limits = {"together": TOGETHER, "one by one": TOGETHER if half_steps else ONE_BY_ONE}
    distances = {}
    for way, got in (("together", together), ("one by one", one_by_one)):
        distances[way] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        if not distances[way] <= limits[way]:  # a NaN is refused too
            raise MachineError(
                f"the {decoder.name} decoder is {distances[way]:.2e} away from the {reference.name} one where tokens are read "
                f"{way}, at most {limits[way]:.0e} is allowed: no speed is reported; run the tests"
            )
    _check_answer(decoder, one_by_one[-1], state)
    return distances


def _check_answer(decoder: Decoder, logits: np.ndarray, state: Any) -> None:
    """Raise MachineError when an answer generated on the GPU is not what its steps give."""
    answer = list(generate(decoder, logits, state.copy(), -1, _ANSWER, GREEDY))
    expected: list[int] = []
    step: Callable[[int, Any], np.ndarray] = decoder.step
    for _ in range(_ANSWER):
        expected.append(int(np.argmax(logits)))
        logits = step(expected[-1], state)
    if answer != expected:
        raise MachineError(
            f"the {decoder.name} decoder generates {answer} where its steps give {expected}: no speed is reported; run the "
            "tests"
        )
