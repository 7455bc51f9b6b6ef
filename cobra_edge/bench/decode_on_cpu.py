"""`bench decode` on a CPU: the native decoder, with llama.cpp beside it where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Table

from ..bundle.reader import Bundle
from ..decode.cpu import why_not
from ..errors import InputError, MachineError
from ..formats.scheme import scheme_named
from ..terminal.output import progress
from ..terminal.suggestions import near_matches
from .decode import Plan, measure_bundle
from .decode_request import BUNDLES, DEFAULT_SHAPE, DEFAULTS, DecodeRequest
from .decode_tables import decode_tables
from .llamacpp_runner import PEERS, SCRIPT, LlamaCppFiles
from .machine import machine
from .random_bundle import random_bundle
from .runners import Runner
from .shapes import shape_named

PeerContext = AbstractContextManager["Runner | None"]


def measured_on_cpu(
    asked: DecodeRequest, threads: int | None, activations: tuple[str, ...], peer_python: str
) -> tuple[dict[str, Any], Path, Iterator[Table]]:
    """Measure the native decoder.

    Args:
        asked: what was given.
        threads: of every runner; None for one a physical core.
        activations: forms of the native decoder; none for all.
        peer_python: an interpreter that has the peer's library.

    Returns:
        The result, the file it was kept in, and its tables.

    Raises:
        InputError, MachineError: something that was asked for is not there, or a decoder is not what it should be.
    """
    usual = DEFAULTS["cpu"]
    _check_kernels(asked.kernels)
    peer = _peer(asked.peers)
    plan = Plan(
        asked.prompt_tokens or usual.prompt_tokens,
        asked.contexts or usual.contexts,
        asked.new_tokens or usual.new_tokens,
        asked.rounds,
        threads,
        activations or ("int8", "float32"),
        asked.kernels,
    )
    rows, model = [], asked.shape or DEFAULT_SHAPE
    with progress() as bar:
        for opened, opponent in _of_bundle(asked) if asked.bundle else _of_shape(asked, plan, peer, peer_python, bar):
            rows.append(measure_bundle(opened, plan, opponent, bar))
            model = opened.manifest.model.model_id if asked.bundle else model
    result = {
        "bench": "decode",
        "model": model,
        "weights": asked.weights,
        "device": "cpu",
        "rows": rows,
        "machine": machine(),
    }
    file = save_result(asked.name or (f"cpu-decode-{model}" if asked.bundle else "cpu-decode"), result)
    return result, file, decode_tables(result)


def _check_kernels(kernels: str) -> None:
    """Raise MachineError without the native decoder, InputError for an instruction set it cannot run here."""
    reason = why_not()
    if reason is not None:
        raise MachineError(f"bench decode measures the native decoder, but {reason}")
    from ..decode import _cpu

    known = ["auto", *_cpu.kernel_names()]
    if kernels not in known:
        raise InputError(f"no kernels {kernels!r} on this processor{near_matches(kernels, known)}")


def _peer(peers: tuple[str, ...]) -> str | None:
    """Return the peer, or None. Raises InputError for one that wants a GPU."""
    for peer in peers:
        if peer not in PEERS:
            raise InputError(f"--peer {peer} runs on a GPU; give --device cuda, or one of: {', '.join(PEERS)}")
    return peers[0] if peers else None


def _of_bundle(asked: DecodeRequest) -> Iterator[tuple[Bundle, PeerContext]]:
    """Yield the one bundle. Raises InputError for options that are of random weights."""
    asked.check_bundle()
    assert asked.bundle is not None
    yield Bundle.open(asked.bundle), nullcontext()


def _of_shape(
    asked: DecodeRequest, plan: Plan, peer: str | None, peer_python: str, bar: Progress
) -> Iterator[tuple[Bundle, PeerContext]]:
    """Yield a random bundle and its opponent for each scheme; all names are checked before the first."""
    shape = asked.shape or DEFAULT_SHAPE
    mamba = shape_named(shape).mamba
    bits = {scheme: scheme_named(scheme).weight_bits for scheme in asked.schemes or DEFAULTS["cpu"].schemes}
    files = None if peer is None else LlamaCppFiles(shape, mamba, BUNDLES, (peer_python, str(SCRIPT)))
    if files is not None:
        files.check(bits.values())
    for scheme in bits:
        opened = random_bundle(mamba, scheme, BUNDLES / f"bench-{shape}-{scheme}", bar)
        opponent: PeerContext = nullcontext()
        if files is not None:
            file, file_type = files.file(bits[scheme], bar)
            opponent = files.opened(file, file_type, plan.team, plan.contexts[0])
        yield opened, opponent
