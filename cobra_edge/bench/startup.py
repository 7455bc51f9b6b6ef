"""How soon a decoder can run and how much memory it takes: opened in a process of its own, which then reads and answers.

python -m cobra_edge.bench.startup BUNDLE
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.progress import Progress

from ..bundle.reader import DECODER, Bundle
from ..decode.cpu import CpuDecoder
from ..decode.decoder import ACTIVATIONS, DecoderOptions
from ..errors import MachineError
from ..inference.session_options import threads_option
from ..terminal.output import debug_option, main_of, print_json

_PROMPT_TOKENS, _STEPS = 768, 8
_LIMIT_FACTOR, _LIMIT_BYTES = 1.2, 200_000_000  # of the decoder's file, and beside it


@click.command(epilog="Example: python -m cobra_edge.bench.startup bundles/bench-cobra-mini-w4a16-g128")
@click.argument("bundle", type=click.Path(path_type=Path))
@threads_option
@click.option("--activations", type=click.Choice(ACTIVATIONS), default="int8", show_default=True, help="What enters a product.")
@click.option("--kernels", default="auto", show_default=True, help="An instruction set.")
@debug_option
def command(bundle: Path, threads: int | None, activations: str, kernels: str) -> None:
    """Open BUNDLE and its decoder, print the seconds as JSON; then read a prompt and take some steps."""
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
    print_json({"bundle_seconds": checked - began, "decoder_seconds": ready - checked})


def measure_startup(bundle: Bundle, options: DecoderOptions, kernels: str, bar: Progress) -> dict[str, Any]:
    """Open the bundle twice, each time in a new process, and let it run.

    The first opening has never seen the files and checks every hash; the second finds what the first one remembered.

    Args:
        bundle: whose decoder.
        options: threads and activations.
        kernels: an instruction set by name, or "auto".
        bar: for progress.

    Returns:
        Seconds of bundle and decoder together, first and again; the larger peak of resident memory, mapped files included,
        and the limit it should keep, in bytes.

    Raises:
        MachineError: a child failed.
    """
    from .machine import measure

    activations = options.activations_of(bundle.manifest.recipe)
    arguments = [str(bundle.directory), "--activations", activations, "--kernels", kernels]
    if options.threads is not None:
        arguments += ["--threads", str(options.threads)]
    task, seconds, peaks = bar.add_task("opening, twice", total=2), [], []
    with tempfile.TemporaryDirectory() as memory:
        for _ in range(2):
            done = measure(["cobra_edge.bench.startup", *arguments], {"XDG_CACHE_HOME": memory})
            if done.exit_code:
                raise MachineError(f"opening {bundle.directory} ended with exit code {done.exit_code}; see its messages above")
            taken = json.loads(done.stdout)
            seconds.append(taken["bundle_seconds"] + taken["decoder_seconds"])
            peaks.append(done.peak_bytes)
            bar.advance(task)
    return {
        "activations": activations,
        "prompt_tokens": _PROMPT_TOKENS,
        "first_open_seconds": seconds[0],
        "open_seconds": seconds[1],
        "peak_bytes": max(peaks),
        "limit_bytes": int(_LIMIT_FACTOR * bundle.manifest.files[DECODER].bytes) + _LIMIT_BYTES,
    }


main = main_of(command)

if __name__ == "__main__":
    main()
