"""Table of the decoder backends, with the reasons for refusing a bundle."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

from ..bundle.memory_plan import memory_for
from ..bundle.reader import Bundle
from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from ..formats.bitsandbytes_codes import why_no_bitsandbytes
from ..formats.hadamard import LARGEST_WRITTEN_OUT
from ..formats.scheme import SCHEMES
from ..model.torch_device import why_no_torch_gpu, why_no_torch_kernels
from ..terminal.suggestions import near_matches
from .cuda.device import why_no_gpu
from .decoder import DEFAULT_OPTIONS, Decoder, DecoderOptions, Weights

log = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Backend:
    """One row: its device, why it refuses a bundle, and how to open it."""

    name: str
    device: str
    refuses: Callable[[Bundle], str | None]
    open: Callable[[Bundle, DecoderOptions], Decoder]


def _cuda(bundle: Bundle, options: DecoderOptions) -> Decoder:
    from .cuda.decoder import CudaDecoder

    return CudaDecoder(bundle, options)


def _cuda_refuses(bundle: Bundle) -> str | None:
    return _foreign_codes(bundle) or why_no_gpu()


def _bitsandbytes_on_gpu(bundle: Bundle, _options: DecoderOptions) -> Decoder:
    import torch

    from .bitsandbytes_backend import BitsAndBytesDecoder

    return BitsAndBytesDecoder(bundle, torch.device("cuda", 0))


def _bitsandbytes_refuses_gpu(bundle: Bundle) -> str | None:
    return _bitsandbytes_refuses(bundle) or why_no_torch_gpu()


def _torch_on_gpu(bundle: Bundle, _options: DecoderOptions) -> Decoder:
    import torch

    from .torch_reference import TorchDecoder

    return TorchDecoder(bundle, torch.device("cuda", 0))


def _torch_refuses_gpu(bundle: Bundle) -> str | None:
    return _too_wide_to_write_out(bundle) or why_no_torch_gpu() or why_no_torch_kernels()


def _too_wide_to_write_out(bundle: Bundle) -> str | None:
    """Return why torch refuses: it materializes rotation matrices, and one would be too large. None if it does not refuse."""
    recipe, config = bundle.manifest.recipe, bundle.manifest.model.mamba
    widths = [config.d_model] * recipe.rotates_residual + [config.d_inner] * recipe.rotates_out_proj
    widest = max(widths, default=0)
    if widest <= LARGEST_WRITTEN_OUT:
        return None
    return f"it materializes rotations, and one of {widest} channels is too large for that (at most {LARGEST_WRITTEN_OUT})"


def _native(bundle: Bundle, options: DecoderOptions) -> Decoder:
    from .cpu import CpuDecoder

    return CpuDecoder(bundle, options)


def _native_refuses(bundle: Bundle) -> str | None:
    from .native.library import why_not

    return _foreign_codes(bundle) or why_not()


def _foreign_codes(bundle: Bundle) -> str | None:
    """Return a reason if some of a bundle's codes are in another library's format, else None."""
    for storage in dict.fromkeys(bundle.manifest.recipe.tensors.values()):
        code_format = SCHEMES[storage].code_format if storage in SCHEMES else "int"
        if code_format != "int":
            return f"codes in bitsandbytes' format {code_format} need the backend bitsandbytes"
    return None


def _bitsandbytes(bundle: Bundle, _options: DecoderOptions) -> Decoder:
    from .bitsandbytes_backend import BitsAndBytesDecoder

    return BitsAndBytesDecoder(bundle)


def _bitsandbytes_refuses(bundle: Bundle) -> str | None:
    if _foreign_codes(bundle) is None:
        return "the recipe has no tensors in bitsandbytes' formats"
    return _too_wide_to_write_out(bundle) or why_no_bitsandbytes()


def _numpy(bundle: Bundle, options: DecoderOptions) -> Decoder:
    from .numpy_reference import NumpyDecoder

    return NumpyDecoder(bundle, options)


def _torch(bundle: Bundle, _options: DecoderOptions) -> Decoder:
    from .torch_reference import TorchDecoder

    return TorchDecoder(bundle)


def _torch_refuses(bundle: Bundle) -> str | None:
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed ({install_hint('export')})"
    return _too_wide_to_write_out(bundle)


# In order of preference. bitsandbytes runs bundles in its own formats. numpy precedes torch, because it starts at once and has
# no dependencies. torch on a GPU reads every weight several times per token, so the native decoder precedes it.
BACKENDS = (
    Backend("cuda", "cuda", _cuda_refuses, _cuda),
    Backend("bitsandbytes", "cuda", _bitsandbytes_refuses_gpu, _bitsandbytes_on_gpu),
    Backend("native", "cpu", _native_refuses, _native),
    Backend("bitsandbytes", "cpu", _bitsandbytes_refuses, _bitsandbytes),
    Backend("torch", "cuda", _torch_refuses_gpu, _torch_on_gpu),
    Backend("numpy", "cpu", lambda bundle: None, _numpy),
    Backend("torch", "cpu", _torch_refuses, _torch),
)
KERNELS = ("auto", *dict.fromkeys(b.name for b in BACKENDS))


def checked_kernels(name: str) -> str:
    """Return a name of `KERNELS`. Raises InputError for another; of one that was removed with what to take instead."""
    if name in KERNELS:
        return name
    if name == "triton":
        raise InputError("the decoder kernels 'triton' were removed; take 'cuda', which runs the same bundles")
    raise InputError(f"unknown decoder kernels {name!r}{near_matches(name, KERNELS)}")


def open_decoder(
    bundle: Bundle, device: str = "auto", kernels: str = "auto", options: DecoderOptions = DEFAULT_OPTIONS
) -> Decoder:
    """Open the bundle's decoder on the first backend that does not refuse.

    Args:
        bundle: an open bundle.
        device: "auto", "cpu" or "cuda".
        kernels: "auto" or a backend's name.
        options: threads and activations.

    Raises:
        InputError: an unknown device or backend.
        MachineError: every requested backend refuses, and the message has each reason; or too little memory.
    """
    if device not in DEVICES:
        raise InputError(f"unknown device {device!r}{near_matches(device, DEVICES)}")
    checked_kernels(kernels)
    reasons: list[str] = []
    elsewhere: list[str] = []  # of other devices than the requested one: told where there is nothing else to tell
    for backend in BACKENDS:
        if kernels not in ("auto", backend.name):
            continue
        if device not in ("auto", backend.device):
            elsewhere.append(f"{backend.name} on {backend.device}: {device} was requested")
            continue
        reason = backend.refuses(bundle)
        if reason is None:
            for refused in reasons:
                log.info("decoder: not %s", refused)
            log.info("decoder: %s on %s", backend.name, backend.device)
            if (kernels, backend.name) == ("auto", "numpy"):
                log.warning(
                    "the numpy decoder is used, which takes many times as long as the native one: %s", _native_refuses(bundle)
                )
            with memory_for(f"opening the decoder of {bundle.directory}", bundle.manifest):
                return backend.open(bundle, options)
        reasons.append(f"{backend.name} on {backend.device}: {reason}")
    raise MachineError(f"no decoder backend runs this bundle on {device!r} ({'; '.join(reasons or elsewhere)})")


def open_weights(weights: Weights, options: DecoderOptions = DEFAULT_OPTIONS) -> Decoder:
    """Open a decoder over weights in memory in our own formats: the native one, or numpy's if that is missing."""
    from .cpu import CpuDecoder
    from .native.library import why_not
    from .numpy_reference import NumpyDecoder

    return NumpyDecoder(weights, options) if why_not() else CpuDecoder(weights, options)
