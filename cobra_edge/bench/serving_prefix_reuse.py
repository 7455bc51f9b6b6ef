"""Prefix reuse by the server: time to first token of a second question about an image, compared with the first one.

Both questions have the same number of tokens. The answers are compared with those of a server without a prefix cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import MachineError
from .serving_client import Question, Reply, ask, client
from .serving_process import Server, served
from .serving_result import Clock, ServedPrefixReuse
from .spread import spread

FIRST, SECOND = "Is there a red circle?", "Is there a blue circle?"

Step = Callable[[str, int, int], None]


class Pair(NamedTuple):
    """Both answers about one image, and the time of a request to /healthz in milliseconds."""

    first: Reply
    second: Reply
    http_ms: float = 0.0


def measure_prefix_reuse(
    bundle: Path, image: Callable[[int], str], rounds: int, checked: int, max_tokens: int, on_step: Step
) -> ServedPrefixReuse:
    """Time first and second questions about new images.

    Args:
        bundle: to serve.
        image: makes a new image from a number, as a data URL.
        rounds: images, after one for warming up.
        checked: how many of these images are also asked about without the prefix cache.
        max_tokens: of each answer.
        on_step: called with the stage, how much of it is done, and the total.

    Returns:
        Times to first token and speedups.

    Raises:
        MachineError: an answer is missing or differs without the cache, or the cache was not used as expected.
    """
    with served(bundle) as server:
        pairs = asyncio.run(_asked(server, image, rounds + 1, max_tokens, lambda n: on_step("second questions", n, rounds + 1)))
    with served(bundle, "--state-cache-mib", "0") as server:
        plain = asyncio.run(
            _asked(server, image, checked, max_tokens, lambda n: on_step("without the prefix cache", n, checked))
        )
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
    """Raise MachineError unless all answers are complete, only second questions used the cache, and it changed no answer."""
    for number, pair in enumerate([*pairs, *plain]):
        caching = number < len(pairs)
        for reply, remembered in zip(pair[:2], ("nothing", "image" if caching else "nothing"), strict=True):
            if not reply.answered:
                raise MachineError(
                    f"a question about an image got {reply.status} ({reply.failure or reply.text}), expected 200"
                )
            if reply.remembered != remembered:
                raise MachineError(f"the server reused {reply.remembered!r}, expected {remembered!r}; no speed is reported")
        if pair.first.prompt_tokens != pair.second.prompt_tokens:
            counts = f"{pair.first.prompt_tokens} and {pair.second.prompt_tokens}"
            raise MachineError(f"the two questions have {counts} tokens, expected the same number; run the tests")
    for pair, other in zip(pairs, plain, strict=False):
        for reply, without in zip(pair[:2], other[:2], strict=True):
            if reply.text != without.text:
                raise MachineError(
                    f"the prefix cache changes an answer from {without.text!r} to {reply.text!r}; no speed is "
                    "reported; run the tests"
                )


def summary(pairs: Sequence[Pair], checked: int) -> ServedPrefixReuse:
    """Return the times of all rounds."""

    def clock(read: Callable[[Reply], float | None]) -> Clock:
        both = [(read(pair.first), read(pair.second)) for pair in pairs]
        timed = [(first, second) for first, second in both if first is not None and second is not None]
        if len(timed) < len(both):
            raise MachineError("an answer has no time to first token; is the server of this version?")
        return Clock(
            spread([first for first, _ in timed]),
            spread([second for _, second in timed]),
            spread([first / second for first, second in timed]),
        )

    return ServedPrefixReuse(
        rounds=len(pairs),
        images_checked=checked,
        prompt_tokens=pairs[0].first.prompt_tokens,
        questions=(FIRST, SECOND),
        client=clock(lambda reply: reply.ttft_ms),
        server=clock(lambda reply: reply.server_ttft_ms),
        http_ms=spread([pair.http_ms for pair in pairs]),
    )
