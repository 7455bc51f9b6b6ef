"""A second question about an image that the server remembers, against the first one, which has to look at it.

Both questions have the same number of tokens. That the memory changes no answer is shown first, on a server that has none.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import MachineError
from .serving_client import Question, Reply, ask, client
from .serving_process import Server, served
from .spread import spread

FIRST, SECOND = "Is there a red circle?", "Is there a blue circle?"

Step = Callable[[str, int, int], None]


class Pair(NamedTuple):
    """Both answers about one image, and what a request takes that asks nothing."""

    first: Reply
    second: Reply
    http_ms: float = 0.0


def measure_prefix_reuse(
    bundle: Path, image: Callable[[int], str], rounds: int, checked: int, max_tokens: int, on_step: Step
) -> dict[str, Any]:
    """Time first and second questions about new images in turns.

    Args:
        bundle: what is served.
        image: makes a new one, as a data URL, of a number.
        rounds: new images; one more goes before, which is not counted.
        checked: of these images, how many are asked about without the memory too.
        max_tokens: of each answer.
        on_step: told a stage's name, how much of it is done, and of what.

    Returns:
        Milliseconds to the first token of both questions, by the client's clock and the server's, and how many times the second
        is faster, medians and extremes of the rounds; and what a request takes that asks nothing, a part of both.

    Raises:
        MachineError: an answer is missing, the memory changed one, or it was not used as it should.
    """
    with served(bundle) as server:
        pairs = asyncio.run(_asked(server, image, rounds + 1, max_tokens, lambda n: on_step("second questions", n, rounds + 1)))
    with served(bundle, "--state-cache-mib", "0") as server:
        plain = asyncio.run(_asked(server, image, checked, max_tokens, lambda n: on_step("without the memory", n, checked)))
    check(pairs, plain)
    return summary(pairs[1:], checked)


async def _asked(
    server: Server, image: Callable[[int], str], rounds: int, max_tokens: int, on_round: Callable[[int], None]
) -> list[Pair]:
    model = server.model()
    pairs: list[Pair] = []
    async with client(server.url, 1) as connection:
        for number in range(rounds):
            url = image(number)
            first, second = [
                await ask(connection, model, Question(prompt, url, max_tokens=max_tokens)) for prompt in (FIRST, SECOND)
            ]
            began = time.perf_counter()
            await connection.get("/healthz")
            pairs.append(Pair(first, second, (time.perf_counter() - began) * 1e3))
            on_round(number + 1)
    return pairs


def check(pairs: Sequence[Pair], plain: Sequence[Pair]) -> None:
    """Raise MachineError unless all answers are whole, the memory was used by second questions alone, and it changed none."""
    for number, pair in enumerate([*pairs, *plain]):
        remembering = number < len(pairs)
        for reply, remembered in zip(pair[:2], ("nothing", "image" if remembering else "nothing"), strict=True):
            if not reply.answered:
                raise MachineError(f"a question about an image got {reply.status} ({reply.flaw or reply.text}), expected 200")
            if reply.remembered != remembered:
                raise MachineError(f"the server remembered {reply.remembered!r}, expected {remembered!r}; no speed is reported")
        if pair.first.prompt_tokens != pair.second.prompt_tokens:
            counts = f"{pair.first.prompt_tokens} and {pair.second.prompt_tokens}"
            raise MachineError(f"the two questions are {counts} tokens long, which is no comparison; run the tests")
    for pair, other in zip(pairs, plain, strict=False):
        for reply, without in zip(pair[:2], other[:2], strict=True):
            if reply.text != without.text:
                raise MachineError(
                    f"the memory changes an answer from {without.text!r} to {reply.text!r}; no speed is reported; run the tests"
                )


def summary(pairs: Sequence[Pair], checked: int) -> dict[str, Any]:
    """Return what is kept of the rounds."""

    def clock(read: Callable[[Reply], float | None]) -> dict[str, Any]:
        both = [(read(pair.first), read(pair.second)) for pair in pairs]
        timed = [(first, second) for first, second in both if first is not None and second is not None]
        if len(timed) < len(both):
            raise MachineError("an answer came without its time to the first token; is it this version's server?")
        return {
            "first_ms": spread([first for first, _ in timed]),
            "second_ms": spread([second for _, second in timed]),
            "speedup": spread([first / second for first, second in timed]),
        }

    return {
        "rounds": len(pairs),
        "images_checked": checked,
        "prompt_tokens": pairs[0].first.prompt_tokens,
        "questions": [FIRST, SECOND],
        "client": clock(lambda reply: reply.ttft_ms),
        "server": clock(lambda reply: reply.server_ttft_ms),
        "http_ms": spread([pair.http_ms for pair in pairs]),
    }
