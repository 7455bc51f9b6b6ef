"""`bench decode`: its options; measured on a CPU by `decode_on_cpu`, on a GPU by `decode_on_gpu`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import click

from ..decode.decoder import ACTIVATIONS
from ..inference.session_options import threads_option
from ..terminal.option_groups import Command, option
from ..terminal.output import debug_option, print_json
from .decode_request import DEFAULT_SHAPE, DEFAULTS, GPU_PEER_NAMES, DecodeRequest
from .decode_result import DecodeResult
from .llamacpp_runner import PEERS
from .results import check_name
from .tables import print_result

_CPU, _CUDA = DEFAULTS["cpu"], DEFAULTS["cuda"]


def _words(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


@click.command(cls=Command, epilog="Example: cobra-edge bench decode --shape cobra-mini --scheme w4a16-g128 --rounds 3")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@option("--shape", group="input", help=f"Published shape with random weights, instead of BUNDLE.  [default: {DEFAULT_SHAPE}]")
@option(
    "--scheme",
    "schemes",
    group="input",
    multiple=True,
    help=f"Scheme of the random weights; repeatable.  [default: {_words(_CPU.schemes)}; on cuda: {_words(_CUDA.schemes)}]",
)
@option(
    "--device",
    group="measurement",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Device to measure; auto is cpu.",
)
@option(
    "--prompt-tokens",
    group="measurement",
    multiple=True,
    type=click.IntRange(1),
    help=f"Prompt length to prefill; repeatable.  [default: {_words(_CPU.prompt_tokens)}; on cuda: "
    f"{_words(_CUDA.prompt_tokens)}]",
)
@option(
    "--context",
    "contexts",
    group="measurement",
    multiple=True,
    type=click.IntRange(1),
    help=f"Context length at which decoding is timed; repeatable.  [default: {_words(_CPU.contexts)}; on cuda: "
    f"{_words(_CUDA.contexts)}]",
)
@option(
    "--new-tokens",
    group="measurement",
    type=click.IntRange(1),
    help=f"Tokens decoded per measurement.  [default: {_CPU.new_tokens}; on cuda: {_CUDA.new_tokens}]",
)
@option("--rounds", group="measurement", type=click.IntRange(1), default=5, help="Repetitions of each measurement.")
@option(
    "--activations",
    group="measurement",
    multiple=True,
    type=click.Choice(ACTIVATIONS),
    help="Data type of the matmuls' inputs on a CPU; repeatable.  [default: int8, float32]",
)
@option(
    "--peer",
    "peers",
    group="measurement",
    multiple=True,
    type=click.Choice([*PEERS, *GPU_PEER_NAMES]),
    help=f"Other runtime to measure in the same rounds, on random weights: {_words(PEERS)} on a CPU, the others on cuda "
    "(repeatable there).",
)
@option("--name", group="output", help="Name of the file in bench/results.  [default: DEVICE-decode, or DEVICE-decode-MODEL]")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of tables.")
@option(
    "--kernels",
    group="advanced",
    default="auto",
    help="Instruction set of the native decoder; on cuda the decoder backend.",
)
@option(
    "--peer-python",
    group="advanced",
    default=sys.executable,
    show_default=False,
    help="Python interpreter with the peer's library.  [default: this one]",
)
@threads_option
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
    """Measure prefill and decoding speed, and the limits of the machine.

    The decoder of BUNDLE is measured, or one with random weights in a published shape. It is compared with a reference
    implementation first; if they differ, nothing is reported.
    """
    if name is not None:
        check_name(name)
    once = dict.fromkeys
    request = DecodeRequest(
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
    result: DecodeResult
    if device == "cuda":
        from .decode_on_gpu import run_on_gpu

        result, file, tables = run_on_gpu(request, threads, activations)
    else:
        from .decode_on_cpu import run_on_cpu

        result, file, tables = run_on_cpu(request, threads, tuple(once(activations)), peer_python)
    if as_json:
        print_json(result)
    else:
        print_result(tables, file)
