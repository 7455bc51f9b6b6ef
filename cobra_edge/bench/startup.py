"""Startup time and peak memory of a decoder, measured in a child process that opens the bundle, prefills and decodes.

python -m cobra_edge.bench.startup BUNDLE
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import msgspec
import numpy as np
from rich.progress import Progress

from ..bundle.reader import DECODER, Bundle
from ..decode.cpu import CpuDecoder
from ..decode.decoder import ACTIVATIONS, DecoderOptions
from ..errors import MachineError
from ..inference.session_options import threads_option
from ..terminal.option_groups import Command, option
from ..terminal.output import debug_option, main_of, print_json
from .decode_result import Startup

_PROMPT_TOKENS, _STEPS = 768, 8
_LIMIT_FACTOR, _LIMIT_BYTES = 1.2, 200_000_000  # times the size of the decoder file, plus


class _Seconds(msgspec.Struct, frozen=True):
    """Time to open the bundle, and its decoder."""

    bundle_seconds: float
    decoder_seconds: float


@click.command(cls=Command, epilog="Example: python -m cobra_edge.bench.startup bundles/bench-cobra-mini-w4a16-g128")
@click.argument("bundle", type=click.Path(path_type=Path))
@option(
    "--activations", group="model", type=click.Choice(ACTIVATIONS), default="int8", help="Data type of the matmuls' inputs."
)
@option("--kernels", group="advanced", default="auto", help="Instruction set.")
@threads_option
@debug_option
def command(bundle: Path, threads: int | None, activations: str, kernels: str) -> None:
    """Open BUNDLE and its decoder, prefill a prompt and decode; print the startup times as JSON."""
    began = time.perf_counter()
    opened = Bundle.open(bundle)
    checked = time.perf_counter()
    decoder = CpuDecoder(opened, DecoderOptions(threads, activations), kernels)
    ready = time.perf_counter()
    state = decoder.new_state()
    tokens = np.random.default_rng(0).integers(0, decoder.config.vocab, _PROMPT_TOKENS).tolist()
    logits = decoder.prefill(decoder.embed(tokens), state)
    for _ in range(_STEPS):
        logits = decoder.step(int(logits.argmax()), state)
    print_json(_Seconds(checked - began, ready - checked))


def measure_startup(bundle: Bundle, options: DecoderOptions, kernels: str, bar: Progress) -> Startup:
    """Open the bundle twice, each time in a new process.

    The first opening hashes every file; the second one uses the hash cache.

    Args:
        bundle: to open.
        options: threads and activations.
        kernels: an instruction set, or "auto".
        bar: for progress.

    Returns:
        Seconds of bundle and decoder together, and the larger peak of the two processes.

    Raises:
        MachineError: a child failed.
    """
    from .machine import measure

    activations = options.activations_of(bundle.manifest.recipe)
    arguments = [str(bundle.directory), "--activations", activations, "--kernels", kernels]
    if options.threads is not None:
        arguments += ["--threads", str(options.threads)]
    task, seconds, peaks = bar.add_task("startup", total=2), [], []
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            done = measure(["cobra_edge.bench.startup", *arguments], {"XDG_CACHE_HOME": cache})
            if done.exit_code:
                raise MachineError(f"opening {bundle.directory} ended with exit code {done.exit_code}; see its messages above")
            taken = msgspec.json.decode(done.stdout, type=_Seconds)
            seconds.append(taken.bundle_seconds + taken.decoder_seconds)
            peaks.append(done.peak_bytes)
            bar.advance(task)
    return Startup(
        activations=activations,
        prompt_tokens=_PROMPT_TOKENS,
        first_open_seconds=seconds[0],
        open_seconds=seconds[1],
        peak_bytes=max(peaks),
        limit_bytes=int(_LIMIT_FACTOR * bundle.manifest.files[DECODER].bytes) + _LIMIT_BYTES,
    )


main = main_of(command)

if __name__ == "__main__":
    main()
