"""The options of `serve` for its limits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import click

from ..terminal.option_groups import option
from .limits import MIN_CONNECTIONS, MIN_REQUESTS, Limits

MAX_SECONDS = 7 * 24 * 3600.0
_DEFAULTS = Limits()
Command = Callable[..., Any]


class Seconds(click.FloatRange):
    """A number of seconds. NaN, which passes every comparison with a bound, is an error."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See click."""
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return seconds


def _limit(
    name: str, kind: click.IntRange | click.FloatRange, help_text: str, default: float | None = None
) -> Callable[[Command], Command]:
    return option(name, group="limit", type=kind, default=default, help=help_text)


_OPTIONS = (
    _limit("--active", click.IntRange(1, 64), "Requests decoded concurrently, in time slices.", _DEFAULTS.active),
    _limit("--waiting", click.IntRange(0, 4096), "Further requests that wait; beyond, requests get 429.", _DEFAULTS.waiting),
    _limit("--deadline", Seconds(0.1, MAX_SECONDS), "Time limit of an answer, in seconds.", _DEFAULTS.deadline_seconds),
    _limit("--max-new-tokens", click.IntRange(1), "Maximum length of an answer. Default: the model's limit."),
    _limit(
        "--max-prompt-tokens",
        click.IntRange(1),
        "Maximum length of a prompt, visual tokens included. Default: the model's limit.",
    ),
    _limit("--max-body-mib", click.IntRange(1, 1024), "Maximum size of a request's body, in MiB.", _DEFAULTS.body_bytes >> 20),
    _limit(
        "--max-image-megapixels",
        click.IntRange(1, 64),
        "Maximum size of an image, in megapixels.",
        _DEFAULTS.image_pixels // 10**6,
    ),
    _limit(
        "--requests-per-address",
        click.IntRange(MIN_REQUESTS),
        "Running and waiting requests of one address. Default: three quarters of --active + --waiting.",
    ),
    _limit(
        "--connections-per-address",
        click.IntRange(MIN_CONNECTIONS, _DEFAULTS.connections),
        "Open connections of one address.",
        _DEFAULTS.connections_per_address,
    ),
)


def limit_options(command: Command) -> Command:
    """Give a command the options of the limits; it gets them as `limits`, a `Limits`."""

    @functools.wraps(command)
    def limited(
        *arguments: Any,
        active: int,
        waiting: int,
        deadline: float,
        max_new_tokens: int | None,
        max_prompt_tokens: int | None,
        max_body_mib: int,
        max_image_megapixels: int,
        requests_per_address: int | None,
        connections_per_address: int,
        **others: Any,
    ) -> Any:
        limits = Limits(
            body_bytes=max_body_mib << 20,
            image_bytes=(max_body_mib << 20) * 5 // 8,
            image_pixels=max_image_megapixels * 10**6,
            prompt_tokens=max_prompt_tokens,
            new_tokens=max_new_tokens,
            active=active,
            waiting=waiting,
            deadline_seconds=deadline,
            connections_per_address=connections_per_address,
            requests_per_address=requests_per_address,
        )
        return command(*arguments, limits=limits, **others)

    wrapped: Command = limited
    for add in reversed(_OPTIONS):
        wrapped = add(wrapped)
    return wrapped
