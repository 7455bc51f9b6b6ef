"""Builds the server from its parts and runs it."""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from anyio import CapacityLimiter
from starlette.types import ASGIApp

from ..inference.session_options import Opening
from .access_log import AccessLogMiddleware, EventLines
from .app import make_app
from .chat_completions import ChatRoute
from .generation import answer_in_slices
from .image_decoding import ImageDecoder
from .image_fetcher import Fetcher
from .image_input import ImageInput
from .limits import ImagePolicy, Limits
from .metrics import Metrics
from .middleware.admission import Admission
from .middleware.host import allowed_hosts
from .middleware.metrics import MetricsMiddleware
from .middleware.stack import with_middleware
from .prefix_cache import PrefixCache
from .prefix_cache_disk import PrefixCacheDisk
from .scheduler import Scheduler
from .served_model import ServedModel
from .server import Address, run_server, url_of
from .watch_route import MOST_WATCHERS, WatchRoute
from .watch_sources import watch_sources


@dataclass(frozen=True)
class CacheOptions:
    """Options of the prefix cache.

    Attributes:
        memory_bytes: limit in memory; 0 keeps nothing there.
        directory: for states that survive a restart, or None.
        directory_bytes: limit of the directory.
    """

    memory_bytes: int
    directory: Path | None = None
    directory_bytes: int = 0


@dataclass(frozen=True)
class Access:
    """Network address and access control.

    Attributes:
        host, port: to listen on.
        key: API key of clients, or None.
        names: further names accepted in the Host header.
        image_hosts: hosts that images may be fetched from.
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
    policy: ImagePolicy,
    watched: Sequence[str],
    grace_seconds: float,
    on_ready: Callable[[str, str], None],
    lines: EventLines | None = None,
) -> None:
    """Open a bundle and serve it until a signal comes.

    Args:
        opening: the bundle and its runtimes.
        model_name: model name in requests; None for the model's own.
        access: network address and access control.
        cache_options: of the prefix cache.
        limits: of clients.
        policy: for conversations with several images.
        watched: cameras and directories that clients may watch, see `watch_sources`.
        grace_seconds: for running requests after the signal.
        on_ready: called with URL and model name when connections are accepted.
        lines: access log, or None.

    Raises:
        BundleError, InputError, MachineError: a part cannot be opened.
    """
    warnings.filterwarnings("ignore", module="PIL")  # about odd images: a client could fill the log with them
    sources = watch_sources(watched)
    listener = Address(access.host, access.port).bind()  # before the bundle is opened: a port in use is reported at once
    with listener:
        image_input = ImageInput(limits, Fetcher(access.image_hosts, limits) if access.image_hosts else None)
        names = allowed_hosts(access.host, access.names, has_key=access.key is not None)
        model = ServedModel.of(opening.load(), model_name)
        cache = _prefix_cache(cache_options, model)
        scheduler = Scheduler(functools.partial(answer_in_slices, model.session, cache), limits.active)
        metrics = Metrics.of(cache, lambda: scheduler.waiting, lambda: scheduler.active)
        image_decoder = None if model.session.vision is None else ImageDecoder(model.session.bundle.image(), limits)
        chat = ChatRoute(model, image_input, image_decoder, cache, scheduler, metrics, limits, policy)
        watch = WatchRoute(model, sources, scheduler, metrics, limits, CapacityLimiter(MOST_WATCHERS))
        admission = Admission(limits.slots, limits.slots_per_address)
        stack = with_middleware(make_app(chat, watch), limits, access.key, names, admission)
        app: ASGIApp = MetricsMiddleware(stack, metrics.ended)
        if lines is not None:
            app = AccessLogMiddleware(app, lines)
        run = functools.partial(run_server, app, scheduler, listener, limits, grace_seconds)
        asyncio.run(_run(run, lambda: on_ready(url_of(listener), model.name), image_decoder))


def _prefix_cache(options: CacheOptions, model: ServedModel) -> PrefixCache:
    files = None
    if options.directory is not None:
        config = model.session.config
        files = PrefixCacheDisk(options.directory, options.directory_bytes, config.mamba, model.fingerprint, config.max_length)
    return PrefixCache(options.memory_bytes, files)


async def _run(run: Callable[..., Awaitable[None]], on_ready: Callable[[], None], image_decoder: ImageDecoder | None) -> None:
    """Run the server together with the image decoder's processes, if there are any."""
    if image_decoder is None:
        await run(on_ready)
        return
    await image_decoder.start()
    try:
        await run(on_ready, image_decoder.reject_all)
    finally:
        await image_decoder.close()
