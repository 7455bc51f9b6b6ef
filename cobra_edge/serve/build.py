"""A server put together from its parts."""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp

from ..inference.session_options import Opening
from .access_log import AccessLogMiddleware, EventLines
from .app import make_app
from .chat_completions import ChatRoute
from .generation import answer_in_slices
from .image_decoding import ImageDecoder
from .image_fetcher import Fetcher
from .image_input import ImageInput
from .limits import Limits
from .metrics import Metrics
from .middleware.admission import Admission
from .middleware.host import allowed_hosts, with_middleware
from .middleware.metrics import MetricsMiddleware
from .prefix_cache import PrefixCache
from .prefix_cache_disk import PrefixCacheDisk
from .scheduler import Scheduler
from .served_model import ServedModel
from .server import Address, run_server, url_of


@dataclass(frozen=True)
class CacheOptions:
    """Where states are kept.

    Attributes:
        memory_bytes: at most so much in memory; 0 keeps nothing there.
        directory: for those that shall survive a restart, or None.
        directory_bytes: at most so much in it.
    """

    memory_bytes: int
    directory: Path | None = None
    directory_bytes: int = 0


@dataclass(frozen=True)
class Access:
    """Where a server is reached, and by whom.

    Attributes:
        host, port: where it listens.
        key: that clients have to show, or None.
        names: further ones that it may be called by.
        image_hosts: where images may be fetched from.
    """

    host: str
    port: int
    key: str | None = None
    names: Collection[str] = ()
    image_hosts: Collection[str] = ()


def serve(
    opening: Opening,
    model_name: str | None,
    access: Access,
    cache_options: CacheOptions,
    limits: Limits,
    grace_seconds: float,
    ready: Callable[[str, str], None],
    lines: EventLines | None = None,
) -> None:
    """Open a bundle and serve it until a signal comes.

    Args:
        opening: the bundle, and what runs it.
        model_name: what clients call it; None for its own name.
        access: to the server.
        cache_options: what was seen.
        limits: of what clients may ask.
        grace_seconds: for answers under way when the signal comes.
        ready: told the address and the model's name when clients are accepted.
        lines: told of each request, or None.

    Raises:
        BundleError, InputError, MachineError: a part cannot be opened.
    """
    warnings.filterwarnings("ignore", module="PIL")  # of what is odd in an image: any client could fill the log with it
    listening = Address(access.host, access.port).bind()  # before the bundle is opened: a taken port is told at once
    with listening:
        image_input = ImageInput(limits, Fetcher(access.image_hosts, limits) if access.image_hosts else None)
        names = allowed_hosts(access.host, access.names, has_key=access.key is not None)
        model = ServedModel.of(opening.load(), model_name)
        files = None
        if cache_options.directory is not None:
            config = model.session.config
            files = PrefixCacheDisk(
                cache_options.directory, cache_options.directory_bytes, config.mamba, model.fingerprint, config.max_length
            )
        cache = PrefixCache(cache_options.memory_bytes, files)
        scheduler = Scheduler(functools.partial(answer_in_slices, model.session, cache), limits.active)
        metrics = Metrics.of(cache, lambda: scheduler.waiting, lambda: scheduler.active)
        admission = Admission(limits.slots, limits.slots_per_address)
        image_decoder = None if model.session.vision is None else ImageDecoder(model.session.bundle.image(), limits)
        app = make_app(ChatRoute(model, image_input, image_decoder, cache, scheduler, metrics, limits))
        doors: ASGIApp = MetricsMiddleware(with_middleware(app, limits, access.key, names, admission), metrics.ended)
        if lines is not None:
            doors = AccessLogMiddleware(doors, lines)

        async def run() -> None:
            def told() -> None:
                ready(url_of(listening), model.name)

            if image_decoder is None:
                await run_server(doors, scheduler, listening, limits, grace_seconds, told)
                return
            await image_decoder.start()
            try:
                await run_server(doors, scheduler, listening, limits, grace_seconds, told, image_decoder.refuse)
            finally:
                await image_decoder.close()

        asyncio.run(run())
