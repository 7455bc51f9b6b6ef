"""`bench decode --device cuda`: all schemes and peers in one run; arguments and libraries are checked before any work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.progress import Progress

from ..bundle.reader import Bundle
from ..decode.backends import checked_kernels
from ..errors import InputError
from ..formats.scheme import scheme_named
from ..terminal.output import progress
from .decode_request import BUNDLES, DEFAULT_SHAPE, DEFAULTS, GPU_PEER_NAMES, DecodeRequest
from .decode_result import GpuDecodeResult, GpuFacts, gpu_tables
from .machine import machine
from .random_bundle import random_bundle
from .results import save_result
from .shapes import shape_named
from .tables import Table


def run_on_gpu(
    request: DecodeRequest, threads: int | None, activations: tuple[str, ...]
) -> tuple[GpuDecodeResult, Path, Iterator[Table]]:
    """Measure on this machine's GPU and save the result.

    Args:
        request: the arguments.
        threads, activations: arguments that apply to a CPU only.

    Returns:
        The result, its file, and its tables.

    Raises:
        InputError: an argument is invalid. MachineError: something is missing, or a decoder is not correct.
    """
    _check(request, threads, activations)
    from .gpu import gpu_here, short_name
    from .gpu_decode import GpuPlan, measure_on_gpu

    gpu = gpu_here()
    if request.peers:
        from .gpu_peers import check_peers  # needs torch

        check_peers(request.peers)
    default = DEFAULTS["cuda"]
    plan = GpuPlan(
        request.prompt_tokens or default.prompt_tokens,
        request.contexts or default.contexts,
        request.new_tokens or default.new_tokens,
        request.rounds,
        request.kernels,
        request.peers,
    )
    with progress() as bar:
        row = measure_on_gpu(_bundles(request, bar), plan, gpu, bar)
    model = request.shape or DEFAULT_SHAPE if request.bundle is None else Bundle.open(request.bundle).manifest.model.model_id
    result = GpuDecodeResult(
        model=model,
        weights=request.weights,
        device="cuda",
        gpu=msgspec.convert(gpu.facts(), GpuFacts),
        rows=(row,),
        machine=machine(),
    )
    name = f"gpu-decode-{short_name(gpu.name)}" + (f"-{model}" if request.bundle else "")
    return result, save_result(request.name or name, result), gpu_tables(result)


def _check(request: DecodeRequest, threads: int | None, activations: tuple[str, ...]) -> None:
    """Raise InputError for an argument that is invalid on a GPU."""
    for option, value in (("--threads", threads), ("--activations", activations)):
        if value:
            raise InputError(f"{option} applies to the native decoder on a CPU; omit it with --device cuda")
    for peer in request.peers:
        if peer not in GPU_PEER_NAMES:
            raise InputError(f"--peer {peer} runs on a CPU; give --device cpu, or one of: {', '.join(GPU_PEER_NAMES)}")
    checked_kernels(request.kernels)
    if request.bundle:
        request.check_bundle()
    else:
        shape_named(request.shape or DEFAULT_SHAPE)
        for scheme in request.schemes:
            scheme_named(scheme)


def _bundles(request: DecodeRequest, bar: Progress) -> Iterator[Bundle]:
    """Yield the given bundle, or one of random weights for each scheme."""
    if request.bundle is not None:
        yield Bundle.open(request.bundle)
        return
    shape = request.shape or DEFAULT_SHAPE
    for scheme in request.schemes or DEFAULTS["cuda"].schemes:
        yield random_bundle(shape_named(shape).mamba, scheme, BUNDLES / f"bench-{shape}-{scheme}", bar)
