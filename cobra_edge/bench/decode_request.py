"""The arguments of `bench decode`, and their defaults by device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

BUNDLES = Path("bundles")
DEFAULT_SHAPE = "cobra-3b"
GPU_PEER_NAMES = ("mamba-ssm", "bitsandbytes", "transformer")


@dataclass(frozen=True)
class Defaults:
    """Default values of arguments, see `DecodeRequest`."""

    schemes: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int


DEFAULTS = {
    "cpu": Defaults(("w4a16-g128",), (256, 768), (64, 16384), 16),
    "cuda": Defaults(("fp16", "w8a16-g128", "w4a16-g128"), (16, 256, 768), (64, 1024, 4096, 16384, 65536), 128),
}


@dataclass(frozen=True)
class DecodeRequest:
    """The arguments as given on the command line; empty or None if not given.

    Attributes:
        bundle: to measure, or None for random weights.
        shape: of the random weights.
        schemes: of the random weights.
        prompt_tokens: lengths to prefill.
        contexts: context lengths at which decoding is timed.
        new_tokens: tokens decoded per measurement.
        rounds: repetitions of each measurement.
        kernels: an instruction set of the CPU decoder, a decoder backend on a GPU, or "auto".
        peers: other runtimes to measure in the same rounds.
        name: of the result.
    """

    bundle: Path | None
    shape: str | None
    schemes: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int | None
    rounds: int
    kernels: str
    peers: tuple[str, ...]
    name: str | None

    def check_bundle(self) -> None:
        """Raise InputError for options that apply to random weights, if there is a bundle."""
        for option, value in (("--shape", self.shape), ("--scheme", self.schemes)):
            if value:
                raise InputError(f"{option} applies to random weights, and BUNDLE has its own; give only one of them")
        for peer in self.peers:
            raise InputError(f"--peer {peer} is compared on random weights; give --shape instead of BUNDLE")

    @property
    def weights(self) -> str:
        """Kind of weights: "random" or "trained"."""
        return "random" if self.bundle is None else "trained"
