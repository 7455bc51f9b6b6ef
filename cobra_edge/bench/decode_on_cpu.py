"""`bench decode` on a CPU: the native decoder, and llama.cpp if requested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.progress import Progress

from ..bundle.reader import Bundle
from ..decode.native.library import why_not
from ..errors import InputError, MachineError
from ..formats.scheme import scheme_named
from ..terminal.output import progress
from ..terminal.suggestions import near_matches
from .decode import Plan, measure_bundle
from .decode_request import BUNDLES, DEFAULT_SHAPE, DEFAULTS, DecodeRequest
from .decode_result import CpuDecodeResult, cpu_tables
from .llamacpp_runner import PEERS, SCRIPT, LlamaCppFiles
from .machine import machine
from .random_bundle import random_bundle
from .results import save_result
from .runners import Runner
from .shapes import shape_named
from .tables import Table

PeerContext = AbstractContextManager["Runner | None"]


def run_on_cpu(
    request: DecodeRequest, threads: int | None, activations: tuple[str, ...], peer_python: str
) -> tuple[CpuDecodeResult, Path, Iterator[Table]]:
    """Measure the native decoder and save the result.

    Args:
        request: the arguments.
        threads: of every runner; None for one per physical core.
        activations: data types to measure; empty for all.
        peer_python: Python interpreter that has the peer's library.

    Returns:
        The result, its file, and its tables.

    Raises:
        InputError: an argument is invalid. MachineError: something is missing, or the decoder is not correct.
    """
    default = DEFAULTS["cpu"]
    _check_kernels(request.kernels)
    peer = _peer(request.peers)
    plan = Plan(
        request.prompt_tokens or default.prompt_tokens,
        request.contexts or default.contexts,
        request.new_tokens or default.new_tokens,
        request.rounds,
        threads,
        activations or ("int8", "float32"),
        request.kernels,
    )
    rows, model = [], request.shape or DEFAULT_SHAPE
    with progress() as bar:
        for bundle, context in _of_bundle(request) if request.bundle else _of_shape(request, plan, peer, peer_python, bar):
            rows.append(measure_bundle(bundle, plan, context, bar))
            model = bundle.manifest.model.model_id if request.bundle else model
    result = CpuDecodeResult(model=model, weights=request.weights, device="cpu", rows=tuple(rows), machine=machine())
    file = save_result(request.name or (f"cpu-decode-{model}" if request.bundle else "cpu-decode"), result)
    return result, file, cpu_tables(result)


def _check_kernels(kernels: str) -> None:
    """Raise MachineError without the native decoder, InputError for an instruction set that this processor lacks."""
    reason = why_not()
    if reason is not None:
        raise MachineError(f"bench decode measures the native decoder, but {reason}")
    from ..decode.native.library import kernel_names

    known = ["auto", *kernel_names()]
    if kernels not in known:
        raise InputError(f"no kernels {kernels!r} on this processor{near_matches(kernels, known)}")


def _peer(peers: tuple[str, ...]) -> str | None:
    """Return the peer, or None. Raises InputError for one that needs a GPU."""
    for peer in peers:
        if peer not in PEERS:
            raise InputError(f"--peer {peer} runs on a GPU; give --device cuda, or one of: {', '.join(PEERS)}")
    return peers[0] if peers else None


def _of_bundle(request: DecodeRequest) -> Iterator[tuple[Bundle, PeerContext]]:
    """Yield the bundle. Raises InputError for options that apply to random weights."""
    request.check_bundle()
    assert request.bundle is not None
    yield Bundle.open(request.bundle), nullcontext()


def _of_shape(
    request: DecodeRequest, plan: Plan, peer: str | None, peer_python: str, bar: Progress
) -> Iterator[tuple[Bundle, PeerContext]]:
    """Yield a random bundle and its peer for each scheme; all names are checked before the first."""
    shape = request.shape or DEFAULT_SHAPE
    mamba = shape_named(shape).mamba
    bits = {scheme: scheme_named(scheme).weight_bits for scheme in request.schemes or DEFAULTS["cpu"].schemes}
    files = None if peer is None else LlamaCppFiles(shape, mamba, BUNDLES, (peer_python, str(SCRIPT)))
    if files is not None:
        files.check(bits.values())
    for scheme in bits:
        bundle = random_bundle(mamba, scheme, BUNDLES / f"bench-{shape}-{scheme}", bar)
        context: PeerContext = nullcontext()
        if files is not None:
            file, file_type = files.file(bits[scheme], bar)
            context = files.opened(file, file_type, plan.team, plan.contexts[0])
        yield bundle, context
