"""A whole answer about an image, timed as the published Cobra was: its tokens over all of the time, encoding included."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from rich.progress import Progress

from ..decode.sampling import GREEDY
from ..errors import InputError
from ..formats.package_data import MINI
from ..inference.generate import generate
from ..inference.session import Session
from ..inputs.image import load_image
from .spread import spread

IMAGE = MINI / "demo.png"
QUESTION = "Describe the image in detail."
_NO_END = -1  # no token has this id: every answer has the full length


def measure_end_to_end(session: Session, new_tokens: int, rounds: int, bar: Progress) -> dict[str, Any]:
    """Time answers of one length about one image.

    Args:
        session: with eyes.
        new_tokens: of each answer.
        rounds: how often; one more goes before, which is not counted.
        bar: for progress.

    Returns:
        What was read and written, and seconds and rates over the rounds.

    Raises:
        InputError: a text-only bundle.
    """
    if session.vision is None:
        raise InputError(f"{session.config.model_id} is a text-only model; give a bundle with a vision graph")
    image, decoder = load_image(IMAGE), session.decoder
    prompt = session.codec.encode(session.template.first_turn(QUESTION))
    figures: dict[str, list[float]] = {"encode_seconds": [], "first_token_seconds": [], "tok_s": []}
    task = bar.add_task(f"answers of {new_tokens} tokens", total=rounds + 1)
    for index in range(rounds + 1):
        began = time.perf_counter()
        seen = session.visual_embeddings(image)
        encoded = time.perf_counter()
        state = decoder.new_state()
        logits = decoder.prefill(np.concatenate([seen, decoder.embed(prompt)]), state)
        first = began
        for number, _token in enumerate(generate(decoder, logits, state, _NO_END, new_tokens, GREEDY)):
            first = time.perf_counter() if number == 0 else first
        ended = time.perf_counter()
        bar.advance(task)
        if index:  # the first one compiles, captures and maps
            for name, value in zip(figures, (encoded - began, first - began, new_tokens / (ended - began)), strict=True):
                figures[name].append(value)
    return {
        "visual_tokens": len(seen),
        "prompt_tokens": len(prompt),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "figures": {name: spread(values) for name, values in figures.items()},
    }
