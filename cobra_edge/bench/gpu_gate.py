"""The correctness gate of every speed measurement on a GPU: prefill, single steps, and greedy generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..bundle.reader import Bundle
from ..decode.cpu import CpuDecoder
from ..decode.decoder import Decoder, DecoderOptions
from ..decode.native.library import why_not
from ..decode.numpy_reference import NumpyDecoder
from ..decode.sampling import GREEDY
from ..errors import MachineError
from ..formats.scheme import SCHEMES
from ..inference.generate import generate

_TOKENS = 6
_ANSWER = 4
# Relative RMS of the logits. Prefill rounds the inputs of matmuls to float16 (3e-4 relative), and errors add up over 64 layers.
# Single steps round them to 16-bit integers, with a scale for 128 of them (1e-4 relative at worst).
TOGETHER, ONE_BY_ONE = 2e-2, 2e-3


def reference_decoder(bundle: Bundle) -> Decoder:
    """Return the reference of a GPU decoder, with float32 activations: the native decoder, numpy where that cannot run it.

    At full size numpy takes minutes; tests compare the two.
    """
    options = DecoderOptions(activations="float32")
    if bundle.manifest.recipe.scheme in SCHEMES and SCHEMES[bundle.manifest.recipe.scheme].code_format != "int":
        return NumpyDecoder(bundle, options)
    return NumpyDecoder(bundle, options) if why_not() is not None else CpuDecoder(bundle, options)


def check_on_gpu(decoder: Decoder, reference: Decoder, half_steps: bool) -> dict[str, float]:
    """Compare the logits of a GPU decoder with the reference on a few tokens, read together and one by one.

    Args:
        decoder: to measure.
        reference: of the same bundle, see `reference_decoder`.
        half_steps: whether single steps use float16 too, as those of bitsandbytes do.

    Returns:
        Relative RMS distances, by way ("together", "one by one").

    Raises:
        MachineError: a distance exceeds its limit, or generation and single steps choose different tokens.
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
                f"the {decoder.name} decoder differs from the {reference.name} one by {distances[way]:.2e} relative RMS, "
                f"tokens read {way}, allowed is {limits[way]:.0e}: no speed is reported; run the tests"
            )
    _check_answer(decoder, one_by_one[-1], state)
    return distances


def _check_answer(decoder: Decoder, logits: np.ndarray, state: Any) -> None:
    """Raise MachineError if generation on the GPU and single steps choose different tokens."""
    answer = list(generate(decoder, logits, state.copy(), -1, _ANSWER, GREEDY))
    expected: list[int] = []
    step: Callable[[int, Any], np.ndarray] = decoder.step
    for _ in range(_ANSWER):
        expected.append(int(np.argmax(logits)))
        logits = step(expected[-1], state)
    if answer != expected:
        raise MachineError(
            f"the {decoder.name} decoder generates {answer}, and its single steps give {expected}: no speed is "
            "reported; run the tests"
        )
