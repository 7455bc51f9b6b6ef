"""Prefix reuse: a second question about an image, answered from the saved decoder state and from scratch.

Only the decoder is timed. From scratch, the vision encoder would come on top.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.progress import Progress

from ..bundle.reader import Bundle
from ..decode.decoder import Decoder, DecoderState
from ..errors import MachineError
from ..formats.model_config import MambaConfig
from .decode_result import PrefixReuse
from .spread import spread

VISUAL_TOKENS = 729  # of the published model, for a text-only bundle
_QUESTION_TOKENS = 24
_ROUNDS = 3

# Takes a state, a directory and the decoder config; returns a function that restores the state, and the bytes stored on disk.
StateStore = Callable[[DecoderState, Path, MambaConfig], tuple[Callable[[], DecoderState], int]]


def save_state(seen: DecoderState, folder: Path, config: MambaConfig) -> tuple[Callable[[], DecoderState], int]:
    """Save a state to a file, which is read and validated for every question."""
    file = folder / "image.safetensors"
    seen.save(file)
    return lambda: DecoderState.load(file, config), file.stat().st_size


def copy_state(seen: DecoderState, _folder: Path, _config: MambaConfig) -> tuple[Callable[[], DecoderState], int]:
    """Leave a state in memory and copy it for every question."""
    return seen.copy, 0


def measure_prefix_reuse(
    bundle: Bundle, decoder: Decoder, bar: Progress, store: StateStore = save_state, image_tokens: int = VISUAL_TOKENS
) -> PrefixReuse:
    """Time the first token of an answer both ways, in alternation.

    Args:
        bundle: the bundle of the decoder.
        decoder: to time.
        bar: for progress.
        store: how the state after the image is stored until the question arrives.
        image_tokens: length of the image, for a text-only bundle.

    Returns:
        Seconds of both ways and the speedup.

    Raises:
        MachineError: the two ways disagree about the token.
    """
    visual_tokens = bundle.manifest.model.n_visual_tokens or image_tokens
    random = np.random.default_rng(3)
    image = 0.02 * random.standard_normal((visual_tokens, decoder.config.d_model), np.float32)
    question = random.integers(0, decoder.config.vocab, _QUESTION_TOKENS).tolist()
    state = decoder.new_state()
    decoder.prefill(image, state)
    with tempfile.TemporaryDirectory() as folder:
        restored, stored_bytes = store(state, Path(folder), decoder.config)

        def scratch() -> int:
            rows = np.concatenate([image, decoder.embed(question)])
            return int(decoder.prefill(rows, decoder.new_state()).argmax())

        def reuse() -> int:
            return int(decoder.prefill(decoder.embed(question), restored()).argmax())

        seconds = _alternate({"scratch": scratch, "reuse": reuse}, bar)
    return PrefixReuse(
        visual_tokens=visual_tokens,
        question_tokens=_QUESTION_TOKENS,
        rounds=_ROUNDS,
        state_file_bytes=stored_bytes,
        part="decoder; without the vision encoder, which only the first question needs",
        scratch_seconds=spread(seconds["scratch"]),
        reuse_seconds=spread(seconds["reuse"]),
        speedup=spread([a / b for a, b in zip(seconds["scratch"], seconds["reuse"], strict=True)]),
    )


def _alternate(ways: dict[str, Callable[[], int]], bar: Progress) -> dict[str, list[float]]:
    """Return the seconds of each way per round; every other round runs them in reverse order."""
    task = bar.add_task("prefix reuse", total=_ROUNDS)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for index in range(_ROUNDS):
        tokens = set()
        for way in list(ways) if index % 2 == 0 else list(reversed(ways)):
            began = time.perf_counter()
            tokens.add(ways[way]())
            seconds[way].append(time.perf_counter() - began)
        if len(tokens) > 1:
            raise MachineError(f"prefix reuse changes the first token: {sorted(tokens)}, expected one; run the tests")
        bar.advance(task)
    return seconds
