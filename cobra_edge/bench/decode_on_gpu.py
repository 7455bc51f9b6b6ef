"""`bench decode --device cuda`: every scheme and peer in one run; what is missing is said before gigabytes are written."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from ..bundle.reader import Bundle
from ..decode.backends import KERNELS
from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from ..formats.scheme import scheme_named
from ..terminal.output import progress
from ..terminal.suggestions import near_matches
from .decode_request import BUNDLES, DEFAULT_SHAPE, DEFAULTS, GPU_PEER_NAMES, DecodeRequest
from .gpu_tables import gpu_tables
from .machine import machine
from .random_bundle import random_bundle
from .shapes import shape_named


def measured_on_gpu(
    asked: DecodeRequest, threads: int | None, activations: tuple[str, ...]
) -> tuple[dict[str, Any], Path, Iterator[Table]]:
    """Measure on this machine's GPU.

    Args:
        asked: what was given.
        threads, activations: what was given, which is a CPU's.

    Returns:
        The result, the file it was kept in, and its tables.

    Raises:
        InputError, MachineError: something that was asked for is not there, or a decoder is not what it should be.
    """
    for option, value in (("--threads", threads), ("--activations", activations)):
        if value:
            raise InputError(f"{option} is of the native decoder on a CPU; leave it out with --device cuda")
    for peer in asked.peers:
        if peer not in GPU_PEER_NAMES:
            raise InputError(f"--peer {peer} runs on a CPU; give --device cpu, or one of: {', '.join(GPU_PEER_NAMES)}")
    if asked.kernels not in KERNELS:
        raise InputError(f"unknown decoder kernels {asked.kernels!r}{near_matches(asked.kernels, KERNELS)}")
    if asked.bundle:
        asked.check_bundle()
    else:
        shape_named(asked.shape or DEFAULT_SHAPE)
        for scheme in asked.schemes:
            scheme_named(scheme)
    if importlib.util.find_spec("torch") is None:
        raise MachineError(f"a GPU is measured with torch, which is not installed; {install_hint('cuda')}")
    from .gpu import gpu_here, short_name
    from .gpu_decode import GpuPlan, measure_on_gpu
    from .gpu_peers import check_peers

    gpu = gpu_here()
    check_peers(asked.peers)
    usual = DEFAULTS["cuda"]
    plan = GpuPlan(
        asked.prompt_tokens or usual.prompt_tokens,
        asked.contexts or usual.contexts,
        asked.new_tokens or usual.new_tokens,
        asked.rounds,
        asked.kernels,
        asked.peers,
    )
    with progress() as bar:
        row = measure_on_gpu(_bundles(asked, bar), plan, gpu, bar)
    model = asked.shape or DEFAULT_SHAPE if asked.bundle is None else Bundle.open(asked.bundle).manifest.model.model_id
    result = {
        "bench": "decode",
        "model": model,
        "weights": asked.weights,
        "device": "cuda",
        "gpu": gpu.facts(),
        "rows": [row],
        "machine": machine(),
    }
    usual_name = f"gpu-decode-{short_name(gpu.name)}" + (f"-{model}" if asked.bundle else "")
    file = save_result(asked.name or usual_name, result)
    return result, file, gpu_tables(result)


def _bundles(asked: DecodeRequest, bar: Progress) -> Iterator[Bundle]:
    """Yield the bundle that was named, or one of random weights for each scheme."""
    if asked.bundle is not None:
        yield Bundle.open(asked.bundle)
        return
    shape = asked.shape or DEFAULT_SHAPE
    for scheme in asked.schemes or DEFAULTS["cuda"].schemes:
        yield random_bundle(shape_named(shape).mamba, scheme, BUNDLES / f"bench-{shape}-{scheme}", bar)
