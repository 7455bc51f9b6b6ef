"""Options shared by the commands that run a bundle: device, runtimes, threads, sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..decode.backends import DEVICES, KERNELS, checked_kernels
from ..decode.decoder import ACTIVATIONS, DecoderOptions
from ..decode.sampling import Sampling
from ..environment.threads import use_threads
from ..terminal.option_groups import option
from ..vision.runtimes import RUNTIME_NAMES
from .session import Session, load

Command = Callable[..., Any]


@dataclass(frozen=True)
class Opening:
    """A bundle to open, and its runtimes."""

    bundle: Path
    device: str
    kernels: str
    vision_runtime: str
    options: DecoderOptions

    def load(self) -> Session:
        """Open the bundle. Raises BundleError where it is incomplete, MachineError where nothing here runs it."""
        return load(
            self.bundle, device=self.device, kernels=self.kernels, options=self.options, vision_runtime=self.vision_runtime
        )


def _use(_context: click.Context, _parameter: click.Parameter, threads: int | None) -> int | None:
    use_threads(threads)
    return threads


# For every command that computes. The callback runs before torch is imported.
threads_option = option(
    "--threads",
    group="advanced",
    type=click.IntRange(1, 1024),
    callback=_use,
    help="Threads on a processor; default: OMP_NUM_THREADS, or one per physical core that this process may use.",
)


def kernels_option(name: str) -> Callable[[Command], Command]:
    """Return an option that takes a decoder backend; an unknown one is an InputError."""
    return option(
        name,
        group="model",
        default="auto",
        metavar=f"[{'|'.join(KERNELS)}]",
        callback=lambda _context, _parameter, given: checked_kernels(given),
        shell_complete=lambda _context, _parameter, begun: [kernels for kernels in KERNELS if kernels.startswith(begun)],
        help="Decoder backend.",
    )


def session_options(command: Command) -> Command:
    """Give a command the argument BUNDLE and the model options; it gets them as `opening`, an `Opening`."""

    @click.argument("bundle", type=click.Path(path_type=Path))
    @option("--device", group="model", type=click.Choice(DEVICES), default="auto", help="Device that runs the model.")
    @kernels_option("--decoder-kernels")
    @option("--vision-runtime", group="model", type=click.Choice(RUNTIME_NAMES), default="auto", help="Vision runtime.")
    @option(
        "--activations",
        group="model",
        type=click.Choice(ACTIVATIONS),
        help="Precision of the activations in quantized matrix products; int8 is faster. Default: that of the bundle's recipe.",
    )
    @threads_option
    @functools.wraps(command)
    def opened(
        *arguments: Any,
        bundle: Path,
        device: str,
        decoder_kernels: str,
        vision_runtime: str,
        threads: int | None,
        activations: str | None,
        **others: Any,
    ) -> Any:
        opening = Opening(bundle, device, decoder_kernels, vision_runtime, DecoderOptions(threads, activations))
        return command(*arguments, opening=opening, **others)

    return opened


def sampling_options(command: Command) -> Command:
    """Give a command the sampling options; it gets them as `sampling`, a `Sampling`. Raises InputError for invalid ones."""

    @option("--temperature", group="generation", type=float, default=0.0, help="Sampling temperature; 0 is greedy decoding.")
    @option("--top-k", group="generation", type=int, default=0, help="Sample from the k most probable tokens; 0 disables it.")
    @option(
        "--top-p",
        group="generation",
        type=float,
        default=1.0,
        help="Sample from the smallest set of tokens with this total probability.",
    )
    @option("--seed", group="generation", type=int, default=0, help="Seed of the sampler.")
    @functools.wraps(command)
    def sampled(*arguments: Any, temperature: float, top_k: int, top_p: float, seed: int, **others: Any) -> Any:
        return command(*arguments, sampling=Sampling(temperature, top_k, top_p, seed), **others)

    return sampled
