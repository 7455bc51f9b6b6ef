"""Serve: answer OpenAI's clients, and a page, with a bundle.

python -m cobra_edge.serve bundles/cobra-mini-jetson-orin-nano-w4a16-g128
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import click

from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from ..inference.session_options import Opening, session_options
from ..terminal.output import debug_option, main_of, say, tell
from ..version import __version__
from .address_policy import is_loopback
from .limits import MIN_CONNECTIONS, MIN_REQUESTS, Limits

KEY_VARIABLE = "COBRA_EDGE_API_KEY"
_DEFAULTS = Limits()
_LONGEST_SECONDS = 7 * 24 * 3600.0


class _Seconds(click.FloatRange):
    """A number of seconds; "nan", which no comparison finds out of range, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See click."""
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return seconds


@click.command(epilog="Example: python -m cobra_edge.serve BUNDLE --port 8000")
@session_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 for any that is free.")
@click.option("--model-name", help="What clients call the model; its own name by default.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"A file whose one line clients have to show as their key. Or ${KEY_VARIABLE}.",
)
@click.option("--allowed-host", "allowed", multiple=True, help="A further name clients may call this server by.")
@click.option("--allow-image-host", "image_hosts", multiple=True, help="A host images may be fetched from; none by default.")
@click.option("--state-cache-mib", type=click.IntRange(0), default=512, show_default=True, help="Memory for what was seen.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Keep what was seen here too, for the next start.")
@click.option("--state-dir-mib", type=click.IntRange(1), default=4096, show_default=True, help="How much of it.")
@click.option(
    "--active", type=click.IntRange(1, 64), default=_DEFAULTS.active, show_default=True, help="Answers decoded in turns."
)
@click.option(
    "--waiting",
    type=click.IntRange(0, 4096),
    default=_DEFAULTS.waiting,
    show_default=True,
    help="Requests that may wait; more get 429.",
)
@click.option(
    "--deadline",
    type=_Seconds(0.1, _LONGEST_SECONDS),
    default=_DEFAULTS.deadline_seconds,
    show_default=True,
    help="Seconds an answer may take.",
)
@click.option(
    "--grace",
    type=_Seconds(0, _LONGEST_SECONDS),
    default=30.0,
    show_default=True,
    help="Seconds to finish answers when told to stop.",
)
@click.option("--max-new-tokens", type=click.IntRange(1), help="Of an answer, whatever clients ask for.")
@click.option(
    "--max-prompt-tokens", type=click.IntRange(1), help="Of a conversation with its image; default: the model's limit."
)
@click.option(
    "--max-body-mib",
    type=click.IntRange(1, 1024),
    default=_DEFAULTS.body_bytes >> 20,
    show_default=True,
    help="Of a request.",
)
@click.option(
    "--max-image-megapixels",
    type=click.IntRange(1, 64),
    default=_DEFAULTS.image_pixels // 10**6,
    show_default=True,
    help="Of an image.",
)
@click.option(
    "--requests-per-address",
    type=click.IntRange(MIN_REQUESTS),
    help="Requests of one address that may be inside; default: three quarters of --active + --waiting.",
)
@click.option(
    "--connections-per-address",
    type=click.IntRange(MIN_CONNECTIONS, _DEFAULTS.connections),
    default=_DEFAULTS.connections_per_address,
    show_default=True,
    help="Connections of one address.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the start, every request and the end, each as a JSON object a line."
)
@debug_option
def command(
    opening: Opening,
    host: str,
    port: int,
    model_name: str | None,
    api_key_file: Path | None,
    allowed: tuple[str, ...],
    image_hosts: tuple[str, ...],
    state_cache_mib: int,
    state_dir: Path | None,
    state_dir_mib: int,
    active: int,
    waiting: int,
    deadline: float,
    grace: float,
    max_new_tokens: int | None,
    max_prompt_tokens: int | None,
    max_body_mib: int,
    max_image_megapixels: int,
    requests_per_address: int | None,
    connections_per_address: int,
    as_json: bool,
) -> None:
    """Serve BUNDLE to OpenAI's clients and to browsers, until SIGTERM or Ctrl-C.

    Only this machine can reach it unless --host says otherwise. A second question about an image starts from what was
    remembered of it.
    """
    try:
        from .access_log import EventLines
        from .build import Access, CacheOptions, serve
    except ImportError as error:
        raise MachineError(f"serve needs {error.name}; install it with: {install_hint('serve')}") from error
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
    key = _read_key(api_key_file)
    if key is None and not is_loopback(host):
        tell(f"anyone who reaches {host} can ask this server; give it a key with --api-key-file")
    cache_options = CacheOptions(state_cache_mib << 20, state_dir, state_dir_mib << 20)
    access = Access(host, port, key, allowed, image_hosts)
    if not as_json:
        serve(opening, model_name, access, cache_options, limits, grace, lambda url, _model: say(f"listening on {url}"))
        return
    lines = EventLines(sys.stdout)

    def ready(url: str, model: str) -> None:
        lines.tell("listening", url=url, model=model, version=__version__)

    serve(opening, model_name, access, cache_options, limits, grace, ready, lines)
    lines.close()


def _read_key(file: Path | None) -> str | None:
    """Return the key that clients have to show, or None. Raises InputError for a file, or a variable, without one."""
    if file is None:
        said, where = os.environ.get(KEY_VARIABLE, ""), f"${KEY_VARIABLE}"
        if not said:
            return None
    else:
        where = str(file)
        try:
            said = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read ({error}); give a file with one line, the key") from error
    key = said.strip()
    if not key or not key.isprintable() or not key.isascii() or " " in key:
        raise InputError(f"{where}: expected one line of printable ASCII without spaces, the key")
    return key


main = main_of(command)
