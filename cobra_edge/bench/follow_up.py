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

from ..bundle import Bundle
from ..decode.cpu import CpuDecoder
from ..decode.decoder import DecoderState
from ..errors import MachineError
from .spread import spread

_VISUAL_TOKENS = 729  # of the published model, where the bundle has no vision
_QUESTION_TOKENS = 24
_ROUNDS = 3


def measure_follow_up(bundle: Bundle, decoder: CpuDecoder, bar: Progress) -> dict[str, Any]:
    """Time the first token of an answer both ways, taking turns.

    Args:
        bundle: the decoder's.
        decoder: what answers.
        bar: for progress.

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
    seconds: dict[str, list[float]] = {"scratch": [], "follow_up": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.safetensors"
        seen.save(file)

        def scratch() -> int:
            rows = np.concatenate([image, decoder.embed(question)])
            return int(decoder.prefill(rows, decoder.new_state()).argmax())

        def follow_up() -> int:
            state = DecoderState.load(file, decoder.config)
            return int(decoder.prefill(decoder.embed(question), state).argmax())

        ways: dict[str, Callable[[], int]] = {"scratch": scratch, "follow_up": follow_up}
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
        state_bytes = file.stat().st_size
    return {
        "visual_tokens": visual_tokens,
        "question_tokens": _QUESTION_TOKENS,
        "rounds": _ROUNDS,
        "state_file_bytes": state_bytes,
        "part": "decoder; the vision tower's time comes on top of scratch only",
        "scratch_seconds": spread(seconds["scratch"]),
        "follow_up_seconds": spread(seconds["follow_up"]),
        "times_faster": spread([a / b for a, b in zip(seconds["scratch"], seconds["follow_up"], strict=True)]),
    }
