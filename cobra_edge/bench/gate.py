"""The gate before every measurement of speed: a decoder that computes something else has no speed worth knowing."""

from __future__ import annotations

import numpy as np
from rich.progress import Progress

from ..bundle.reader import Bundle
from ..decode.cpu import CpuDecoder
from ..decode.decoder import DecoderOptions
from ..decode.numpy_reference import NumpyDecoder
from ..errors import MachineError

_TOKENS = 6
# By activations. A value that lies between two integers may be rounded either way, and 64 layers carry that on.
_RELATIVE_RMS = {"float32": 1e-3, "int8": 0.1}


def check(bundle: Bundle, options: DecoderOptions, kernels: str, bar: Progress) -> float:
    """Compare the native decoder with its numpy reference of the same activations, logits at each of a few tokens.

    Args:
        bundle: whose decoder.
        options: threads and activations that are to be measured.
        kernels: an instruction set by name, or "auto".
        bar: for progress; at full size the reference takes its time.

    Returns:
        The relative RMS distance of the logits.

    Raises:
        MachineError: it is beyond the limit; no figure of this decoder would mean anything.
    """
    form = options.activations_of(bundle.manifest.recipe)
    task = bar.add_task(f"checking against numpy, {form}", total=1)
    tokens = list(range(5, 5 + _TOKENS))
    reference = NumpyDecoder(bundle, options)
    expected = reference.forward(reference.embed(tokens), reference.new_state())
    decoder = CpuDecoder(bundle, options, kernels)
    got = decoder.forward(decoder.embed(tokens), decoder.new_state())
    distance = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    if not distance <= _RELATIVE_RMS[form]:  # a NaN is refused too
        raise MachineError(
            f"the native decoder ({decoder.kernels}, {form} activations) is {distance:.2e} away from the numpy one, at most "
            f"{_RELATIVE_RMS[form]:.0e} is allowed: no speed is reported; run the tests"
        )
    bar.advance(task)
    return distance
