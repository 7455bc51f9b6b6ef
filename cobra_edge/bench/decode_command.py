"""`bench decode`: what is asked for, and on which device."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import click

from ..decode.decoder import ACTIVATIONS
from ..inference.session_options import threads_option
from ..terminal.output import debug_option, print_json, results
from .decode_request import DEFAULT_SHAPE, DEFAULTS, GPU_PEER_NAMES, DecodeRequest
from .llamacpp_runner import PEERS
from .results import check_name

_CPU, _CUDA = DEFAULTS["cpu"], DEFAULTS["cuda"]


def _words(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


@click.command(epilog="Example: python -m cobra_edge.bench decode --shape cobra-3b --scheme w4a16-g128 --peer llama.cpp")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--shape", help=f"Random weights of a published shape; without BUNDLE.  [default: {DEFAULT_SHAPE}]")
@click.option(
    "--scheme",
    "schemes",
    multiple=True,
    help=f"Of the random weights; may be given again.  [default: {_words(_CPU.schemes)}; on cuda {_words(_CUDA.schemes)}]",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run.  [default: cpu]")
@click.option(
    "--prompt-tokens",
    multiple=True,
    type=click.IntRange(1),
    help=f"To prefill.  [default: {_words(_CPU.prompt_tokens)}; on cuda {_words(_CUDA.prompt_tokens)}]",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(1),
    help=f"Steps timed together.  [default: {_CPU.new_tokens}; on cuda {_CUDA.new_tokens}]",
)
@click.option(
    "--context",
    "contexts",
    multiple=True,
    type=click.IntRange(1),
    help="Read before steps; a peer whose state has one size takes the first.  "
    f"[default: {_words(_CPU.contexts)}; on cuda {_words(_CUDA.contexts)}]",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Each figure is taken so often.")
@threads_option
@click.option(
    "--activations",
    multiple=True,
    type=click.Choice(ACTIVATIONS),
    help="What enters a product on a CPU; may be given again.  [default: int8, float32]",
)
@click.option(
    "--kernels",
    default="auto",
    show_default=True,
    help="An instruction set of the native decoder; on cuda a decoder's backend.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice([*PEERS, *GPU_PEER_NAMES]),
    help=f"Another runtime to take turns with; with --shape. {', '.join(PEERS)} on a CPU, the others on cuda, where it may be "
    "given again.",
)
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
    new_tokens: int | None,
    contexts: tuple[int, ...],
    rounds: int,
    threads: int | None,
    activations: tuple[str, ...],
    kernels: str,
    peers: tuple[str, ...],
    peer_python: str,
    name: str | None,
    as_json: bool,
) -> None:
    """Time prefill and decoding of BUNDLE, or of random weights in a published shape, beside what the machine allows.

    Before anything is timed a decoder is compared with a plain one; where they differ no figure is printed.
    """
    if name is not None:
        check_name(name)
    once = dict.fromkeys
    asked = DecodeRequest(
        bundle,
        shape,
        tuple(once(schemes)),
        tuple(once(prompt_tokens)),
        tuple(once(contexts)),
        new_tokens,
        rounds,
        kernels,
        tuple(once(peers)),
        name,
    )
    if device == "cuda":
        from .decode_on_gpu import measured_on_gpu

        result, file, tables = measured_on_gpu(asked, threads, activations)
    else:
        from .decode_on_cpu import measured_on_cpu

        result, file, tables = measured_on_cpu(asked, threads, tuple(once(activations)), peer_python)
    if as_json:
        print_json(result)
        return
    for table in tables:
        results.print(table)
    results.print(f"kept: {file}", highlight=False)
