"""A server put together from its parts."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ..session_options import Opening
from .admission import Admission, AdmissionDoor
from .answering import answer_in_slices
from .app import make_app
from .chat_route import ChatRoute
from .doors import ResponseHeaders, allowed_hosts, guarded
from .fetching import Fetcher
from .limits import Limits
from .metrics import Metrics
from .picture_source import PictureSource
from .scheduler import Scheduler
from .served_model import ServedModel
from .server import Address, run_server, url_of
from .state_cache import StateCache
from .state_files import StateFiles


@dataclass(frozen=True)
class Remembering:
    """Where states are kept.

    Attributes:
        memory_bytes: at most so much in memory; 0 keeps nothing there.
        directory: for those that shall survive a restart, or None.
        directory_bytes: at most so much in it.
    """

    memory_bytes: int
    directory: Path | None = None
    directory_bytes: int = 0


def serve(
    opening: Opening,
    host: str,
    port: int,
    model_name: str | None,
    key: str | None,
    hosts: Collection[str],
    image_hosts: Collection[str],
    remembering: Remembering,
    limits: Limits,
    grace_seconds: float,
    ready: Callable[[str], None],
) -> None:
    """Open a bundle and serve it until a signal comes.

    Args:
        opening: the bundle, and what runs it.
        host, port: where to listen.
        model_name: what clients call it; None for its own name.
        key: that clients have to show, or None.
        hosts: further names of this server.
        image_hosts: where pictures may be fetched from.
        remembering: what was seen.
        limits: of what clients may ask.
        grace_seconds: for answers under way when the signal comes.
        ready: told the address when clients are accepted.

    Raises:
        BundleError, InputError, MachineError: a part cannot be opened.
    """
    warnings.filterwarnings("ignore", module="PIL")  # of what is odd in a picture: any client could fill the log with it
    listening = Address(host, port).bind()  # before the bundle is opened: a taken port is told at once
    with listening:
        pictures = PictureSource(limits, Fetcher(image_hosts, limits) if image_hosts else None)
        names = allowed_hosts(host, hosts, has_key=key is not None)
        model = ServedModel.of(opening.load(), model_name)
        files = None
        if remembering.directory is not None:
            config = model.session.config.mamba
            files = StateFiles(remembering.directory, remembering.directory_bytes, config, model.fingerprint)
        cache = StateCache(remembering.memory_bytes, files)
        scheduler = Scheduler(functools.partial(answer_in_slices, model.session, cache), limits.active)
        metrics = Metrics.of(cache, lambda: scheduler.waiting, lambda: scheduler.active)
        app = guarded(make_app(ChatRoute(model, pictures, scheduler, metrics, limits)), limits, key, names)
        admission = Admission(limits.active + limits.waiting, metrics.requests.labels("429").inc)
        doors = ResponseHeaders(AdmissionDoor(app, admission))
        run_server(doors, scheduler, listening, limits, grace_seconds, lambda: ready(url_of(listening)))
