"""What `bench decode` was asked for, and what it takes where nothing was said: a row a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

BUNDLES = Path("bundles")
DEFAULT_SHAPE = "cobra-3b"
GPU_PEER_NAMES = ("mamba-ssm", "bitsandbytes", "transformer")


@dataclass(frozen=True)
class Defaults:
    """What is measured unless something else is asked for; see `DecodeRequest`."""

    schemes: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    new_tokens: int


DEFAULTS = {
    "cpu": Defaults(("w4a16-g128",), (256, 768), (64, 16384), 16),
    "cuda": Defaults(("fp16", "w8a16-g128", "w4a16-g128", "bnb-nf4"), (16, 256, 768), (1024, 4096, 16384, 65536), 128),
}


@dataclass(frozen=True)
class DecodeRequest:
    """What was given on the command line; empty where nothing was.

    Attributes:
        bundle: to measure, or None for random weights.
        shape: of random weights.
        schemes: of random weights.
        prompt_tokens: lengths to prefill.
        contexts: tokens read before steps are timed.
        new_tokens: steps that are timed together.
        rounds: how often each figure is taken.
        kernels: an instruction set of the CPU's decoder or a GPU's backend, or "auto".
        peers: to take turns with.
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
        """Raise InputError for options that are of random weights, beside a bundle that has its own."""
        for option, value in (("--shape", self.shape), ("--scheme", self.schemes)):
            if value:
                raise InputError(f"{option} is of random weights and BUNDLE has its own; give one of them")
        for peer in self.peers:
            raise InputError(f"--peer {peer} is timed on random weights of a shape; give --shape instead of BUNDLE")

    @property
    def weights(self) -> str:
        """Whose weights they are, as a result says it."""
        return "random" if self.bundle is None else "trained"
