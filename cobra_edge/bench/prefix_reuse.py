"""A second question about the same image: from the saved state of the image, against reading everything again.

The decoder's part alone. The time of the vision tower comes on top of asking from scratch, never of a follow-up.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from ..bundle.reader import Bundle
from ..decode.decoder import Decoder, DecoderState
from ..errors import MachineError
from ..formats.model_config import MambaConfig
from .spread import spread

_VISUAL_TOKENS = 729  # of the published model, where the bundle has no vision
_QUESTION_TOKENS = 24
_ROUNDS = 3


# Takes a state, a directory and the model's sizes; returns what gives the state back, and the bytes it is kept in.
StateStore = Callable[[DecoderState, Path, MambaConfig], tuple[Callable[[], DecoderState], int]]


def save_state(seen: DecoderState, folder: Path, config: MambaConfig) -> tuple[Callable[[], DecoderState], int]:
    """Keep a state as a file, which is read and checked for every question."""
    file = folder / "image.safetensors"
    seen.save(file)
    return lambda: DecoderState.load(file, config), file.stat().st_size


def copy_state(seen: DecoderState, _folder: Path, _config: MambaConfig) -> tuple[Callable[[], DecoderState], int]:
    """Keep a state where it is, and copy it for every question."""
    return seen.copy, 0


def measure_prefix_reuse(bundle: Bundle, decoder: Decoder, bar: Progress, keep: StateStore = save_state) -> dict[str, Any]:
    """Time the first token of an answer both ways, taking turns.

    Args:
        bundle: the decoder's.
        decoder: what answers.
        bar: for progress.
        keep: how the image's state waits for the question.

    Returns:
        Seconds of each way and how many times the follow-up is faster, medians and extremes of the rounds.

    Raises:
        MachineError: the two ways do not agree on the token.
    """
    visual_tokens = bundle.manifest.model.n_visual_tokens or _VISUAL_TOKENS
    random = np.random.default_rng(3)
    image = 0.02 * random.standard_normal((visual_tokens, decoder.config.d_model), np.float32)
    question = random.integers(0, decoder.config.vocab, _QUESTION_TOKENS).tolist()
    seen = decoder.new_state()
    decoder.prefill(image, seen)
    task = bar.add_task("follow-up questions", total=_ROUNDS)
    seconds: dict[str, list[float]] = {"scratch": [], "prefix_reuse": []}
    with tempfile.TemporaryDirectory() as folder:
        restored, kept_bytes = keep(seen, Path(folder), decoder.config)

        def scratch() -> int:
            rows = np.concatenate([image, decoder.embed(question)])
            return int(decoder.prefill(rows, decoder.new_state()).argmax())

        def prefix_reuse() -> int:
            return int(decoder.prefill(decoder.embed(question), restored()).argmax())

        ways: dict[str, Callable[[], int]] = {"scratch": scratch, "prefix_reuse": prefix_reuse}
        for index in range(_ROUNDS):
            tokens = set()
            for way in list(ways) if index % 2 == 0 else list(reversed(ways)):
                began = time.perf_counter()
                tokens.add(ways[way]())
                seconds[way].append(time.perf_counter() - began)
            if len(tokens) > 1:
                raise MachineError(
                    f"a follow-up answers {sorted(tokens)} where scratch and saved state should agree; run the tests"
                )
            bar.advance(task)
    return {
        "visual_tokens": visual_tokens,
        "question_tokens": _QUESTION_TOKENS,
        "rounds": _ROUNDS,
        "state_file_bytes": kept_bytes,
        "part": "decoder; the vision tower's time comes on top of scratch only",
        "scratch_seconds": spread(seconds["scratch"]),
        "reuse_seconds": spread(seconds["prefix_reuse"]),
        "speedup": spread([a / b for a, b in zip(seconds["scratch"], seconds["prefix_reuse"], strict=True)]),
    }
