"""The correctness gate of every speed measurement on a CPU."""

from __future__ import annotations

import numpy as np
from rich.progress import Progress

from ..bundle.reader import Bundle
from ..decode.cpu import CpuDecoder
from ..decode.decoder import DecoderOptions
from ..decode.numpy_reference import NumpyDecoder
from ..errors import MachineError

_TOKENS = 6
# By data type of the activations. A value halfway between two integers may round either way, and 64 layers amplify that.
_RELATIVE_RMS = {"float32": 1e-3, "int8": 0.1}


def check(bundle: Bundle, options: DecoderOptions, kernels: str, bar: Progress) -> float:
    """Compare the logits of the native decoder with those of the numpy reference, on a few tokens.

    Args:
        bundle: to measure.
        options: threads and activations to measure.
        kernels: an instruction set, or "auto".
        bar: for progress; the reference is slow at full size.

    Returns:
        The relative RMS distance.

    Raises:
        MachineError: the distance exceeds the limit.
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
            f"the native decoder ({decoder.kernels}, {form} activations) differs from the numpy one by "
            f"{distance:.2e} relative RMS, allowed is {_RELATIVE_RMS[form]:.0e}: no speed is reported; run the tests"
        )
    bar.advance(task)
    return distance
