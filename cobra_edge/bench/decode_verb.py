"""`bench decode`: what is asked for is checked before gigabytes are written for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.progress import Progress

from ..bundle import Bundle
from ..decode.cpu import why_not
from ..decode.decoder import ACTIVATIONS
from ..errors import InputError, MachineError, near_matches
from ..scheme import scheme_named
from ..terminal import debug_option, print_json, progress, results
from .peers import PEERS, SCRIPT, LlamaCppFiles
from .results import check_name, keep
from .shapes import shape_named

if TYPE_CHECKING:
    from .contestants import Contestant
    from .decode import Plan

_BUNDLES = Path("bundles")
_DEFAULT_SHAPE, _DEFAULT_SCHEME = "cobra-3b", "w4a16-g128"

Opponent = AbstractContextManager["Contestant | None"]


@click.command(epilog="Example: python -m cobra_edge.bench decode --shape cobra-3b --scheme w4a16-g128 --peer llama.cpp")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--shape", help=f"Random weights of a published shape; without BUNDLE.  [default: {_DEFAULT_SHAPE}]")
@click.option(
    "--scheme", "schemes", multiple=True, help=f"Of the random weights; may be given again.  [default: {_DEFAULT_SCHEME}]"
)
@click.option("--device", type=click.Choice(["cpu"]), default="cpu", show_default=True, help="Where to run.")
@click.option(
    "--prompt-tokens", multiple=True, type=click.IntRange(1), default=(256, 768), show_default=True, help="To prefill."
)
@click.option("--new-tokens", type=click.IntRange(1), default=16, show_default=True, help="Steps timed together.")
@click.option(
    "--context",
    "contexts",
    multiple=True,
    type=click.IntRange(1),
    default=(64, 16384),
    show_default=True,
    help="Read before steps; a peer takes the first.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Each figure is taken so often.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Default: one a physical core.")
@click.option(
    "--activations",
    multiple=True,
    type=click.Choice(ACTIVATIONS),
    default=("int8", "float32"),
    show_default=True,
    help="What enters a product; may be given again.",
)
@click.option("--kernels", default="auto", show_default=True, help="An instruction set of the native decoder.")
@click.option("--peer", type=click.Choice(PEERS), help="Another runtime to take turns with; with --shape.")
@click.option("--peer-python", default=sys.executable, help="An interpreter that has the peer's library. Default: this one.")
@click.option("--name", help="Of the file in bench/results. Default: DEVICE-decode, with BUNDLE DEVICE-decode-MODEL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def decode(
    bundle: Path | None,
    shape: str | None,
    schemes: tuple[str, ...],
    device: str,
    prompt_tokens: tuple[int, ...],
    new_tokens: int,
    contexts: tuple[int, ...],
    rounds: int,
    threads: int | None,
    activations: tuple[str, ...],
    kernels: str,
    peer: str | None,
    peer_python: str,
    name: str | None,
    as_json: bool,
) -> None:
    """Time prefill and decoding of BUNDLE, or of random weights in a published shape, beside what the machine allows.

    Before anything is timed the native decoder is compared with the numpy one; where they differ no figure is printed.
    """
    from .decode import Plan, measure_bundle
    from .decode_tables import decode_tables
    from .machine import machine

    _check_kernels(kernels)
    if name is not None:
        check_name(name)
    unique = dict.fromkeys
    plan = Plan(
        tuple(unique(prompt_tokens)), tuple(unique(contexts)), new_tokens, rounds, threads, tuple(unique(activations)), kernels
    )
    with progress() as bar:
        if bundle is None:
            pairs = _of_shape(shape or _DEFAULT_SHAPE, schemes or (_DEFAULT_SCHEME,), plan, peer, peer_python, bar)
        else:
            pairs = _of_bundle(bundle, shape, schemes, peer)
        rows, model = [], shape or _DEFAULT_SHAPE
        for opened, opponent in pairs:
            rows.append(measure_bundle(opened, plan, opponent, bar))
            model = opened.manifest.model.model_id if bundle is not None else model
    result = {
        "bench": "decode",
        "model": model,
        "weights": "random" if bundle is None else "its own",
        "device": device,
        "rows": rows,
        "machine": machine(),
    }
    file = keep(name or (f"{device}-decode" if bundle is None else f"{device}-decode-{model}"), result)
    if as_json:
        print_json(result)
        return
    for table in decode_tables(result):
        results.print(table)
    results.print(f"kept: {file}", highlight=False)


def _check_kernels(kernels: str) -> None:
    """Raise MachineError without the native decoder, InputError for an instruction set it cannot run here."""
    reason = why_not()
    if reason is not None:
        raise MachineError(f"bench decode measures the native decoder, but {reason}")
    from ..decode import _cpu

    known = ["auto", *_cpu.kernel_names()]
    if kernels not in known:
        raise InputError(f"no kernels {kernels!r} on this processor{near_matches(kernels, known)}")


def _of_bundle(
    bundle: Path, shape: str | None, schemes: tuple[str, ...], peer: str | None
) -> Iterator[tuple[Bundle, Opponent]]:
    """Yield the one bundle. Raises InputError for options that are of random weights."""
    for option, value in (("--shape", shape), ("--scheme", schemes)):
        if value:
            raise InputError(f"{option} is of random weights and BUNDLE has its own; give one of them")
    if peer is not None:
        raise InputError(f"--peer {peer} is timed on random weights of a shape; give --shape instead of BUNDLE")
    yield Bundle.open(bundle), nullcontext()


def _of_shape(
    shape: str, schemes: tuple[str, ...], plan: Plan, peer: str | None, peer_python: str, bar: Progress
) -> Iterator[tuple[Bundle, Opponent]]:
    """Yield a random bundle and its opponent for each scheme; all names are checked before the first."""
    from .random_bundle import random_bundle

    mamba = shape_named(shape).mamba
    bits = {scheme: scheme_named(scheme).weight_bits for scheme in schemes}
    files = None if peer is None else LlamaCppFiles(shape, mamba, _BUNDLES, (peer_python, str(SCRIPT)))
    if files is not None:
        files.check(bits.values())
    for scheme in bits:
        opened = random_bundle(mamba, scheme, _BUNDLES / f"bench-{shape}-{scheme}", bar)
        opponent: Opponent = nullcontext()
        if files is not None:
            file, file_type = files.file(bits[scheme], bar)
            opponent = files.opened(file, file_type, plan.team, plan.contexts[0])
        yield opened, opponent
