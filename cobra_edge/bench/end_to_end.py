"""A complete answer about an image, timed as in the paper: its tokens over the total time, encoding included."""

from __future__ import annotations

import time

import msgspec
import numpy as np
from rich.progress import Progress

from ..decode.sampling import GREEDY
from ..errors import InputError
from ..formats.package_data import MINI
from ..inference.generate import generate
from ..inference.session import Session
from ..inputs.image import load_image
from .machine import Machine
from .spread import Spread, spread
from .tables import Table

IMAGE = MINI / "demo.png"
QUESTION = "Describe the image in detail."
# Cobra-3.5B on an A100 80GB, one image, 256 tokens, encoding included: arXiv 2403.14520.
PUBLISHED_TOK_S = 166.5
_NO_END = -1  # no token has this id: every answer has the full length


class EndToEndFigures(msgspec.Struct, frozen=True):
    """Time to encode the image, time to first token, and tokens per second of the complete answer."""

    encode_seconds: Spread
    first_token_seconds: Spread
    tok_s: Spread


class EndToEnd(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths of prompt and answer, and the figures over all rounds."""

    visual_tokens: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    figures: EndToEndFigures


class EndToEndResult(EndToEnd, frozen=True, kw_only=True):
    """`bench end-to-end`; `machine_name` is the GPU or the processor."""

    bench: str = "end-to-end"
    model: str
    weights: str
    scheme: str
    decoder: str
    vision_runtime: str | None
    machine_name: str
    published_tok_s: float
    machine: Machine


def measure_end_to_end(session: Session, new_tokens: int, rounds: int, bar: Progress) -> EndToEnd:
    """Time answers of a fixed length about one image.

    Args:
        session: with a vision encoder.
        new_tokens: length of each answer.
        rounds: answers, after one for warming up.
        bar: for progress.

    Returns:
        Lengths and figures.

    Raises:
        InputError: a text-only bundle.
    """
    if session.vision is None:
        raise InputError(f"{session.config.model_id} is a text-only model; give a bundle with a vision graph")
    image, decoder = load_image(IMAGE), session.decoder
    prompt = session.codec.encode(session.template.first_turn(QUESTION))
    timed: list[tuple[float, float, float]] = []
    task = bar.add_task(f"answers of {new_tokens} tokens", total=rounds + 1)
    for index in range(rounds + 1):
        began = time.perf_counter()
        embeddings = session.visual_embeddings(image)
        encoded = time.perf_counter()
        state = decoder.new_state()
        logits = decoder.prefill(np.concatenate([embeddings, decoder.embed(prompt)]), state)
        first = began
        for number, _token in enumerate(generate(decoder, logits, state, _NO_END, new_tokens, GREEDY)):
            first = time.perf_counter() if number == 0 else first
        ended = time.perf_counter()
        bar.advance(task)
        if index:  # the first one compiles, captures and maps
            timed.append((encoded - began, first - began, new_tokens / (ended - began)))
    return EndToEnd(
        visual_tokens=len(embeddings),
        prompt_tokens=len(prompt),
        new_tokens=new_tokens,
        rounds=rounds,
        figures=EndToEndFigures(*(spread(values) for values in zip(*timed, strict=True))),
    )


def end_to_end_table(result: EndToEndResult) -> Table:
    """Return the figures, and the published one."""
    figures = result.figures
    title = f"{result.model} as {result.scheme} on {result.machine_name}, {result.new_tokens} tokens, "
    title += f"median (low–high) of {result.rounds} rounds"
    rows = [
        ["image encoding, s", figures.encode_seconds.cell(".4g")],
        ["time to first token, s", figures.first_token_seconds.cell(".4g")],
        ["tok/s, encoding included", figures.tok_s.cell(".4g")],
        ["tok/s of Cobra-3.5B on an A100 (published, not measured here)", f"{result.published_tok_s}"],
    ]
    return Table(["measure", "value"], rows, title)
