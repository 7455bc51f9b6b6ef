"""Serve: an OpenAI-compatible server for a bundle, with a web page.

python -m cobra_edge.serve bundles/cobra-mini-jetson-orin-nano-best
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from ..inference.session_options import Opening, session_options
from ..terminal.option_groups import Command, option
from ..terminal.output import debug_option, main_of, say, tell
from ..version import __version__
from .address_policy import is_loopback
from .limit_options import MAX_SECONDS, Seconds, limit_options
from .limits import IMAGE_POLICIES, ImagePolicy, Limits

KEY_VARIABLE = "COBRA_EDGE_API_KEY"


@click.command(cls=Command, epilog="Example: cobra-edge serve BUNDLE --port 8000")
@session_options
@option("--host", group="server", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all interfaces.")
@option("--port", group="server", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 for any free port.")
@option("--model-name", group="server", help="Model name in the API. Default: the model's own.")
@option(
    "--api-key-file",
    group="server",
    type=click.Path(path_type=Path),
    help=f"File with the API key that clients must send, on one line. Default: ${KEY_VARIABLE}.",
)
@option("--allowed-host", "allowed", group="server", multiple=True, help="Additional name accepted in the Host header.")
@option(
    "--images",
    "policy",
    group="server",
    type=click.Choice(IMAGE_POLICIES),
    default="newest",
    help="Which of several images a conversation is about: the newest, all (grid, a contact sheet), or it is refused (one).",
)
@option(
    "--watch",
    "watched",
    group="server",
    multiple=True,
    metavar="NAME=SOURCE",
    help="Camera, stream or directory that clients may watch (POST /v1/watch); repeatable. Default: none.",
)
@option(
    "--allow-image-host",
    "image_hosts",
    group="server",
    multiple=True,
    help="Host that images may be fetched from. Default: none.",
)
@option(
    "--grace",
    group="server",
    type=Seconds(0, MAX_SECONDS),
    default=30.0,
    help="Seconds to finish running requests after SIGTERM or Ctrl-C.",
)
@option("--state-cache-mib", group="advanced", type=click.IntRange(0), default=512, help="Memory of the prefix cache, in MiB.")
@option(
    "--state-dir",
    group="advanced",
    type=click.Path(path_type=Path),
    help="Directory of the prefix cache on disk, which survives a restart. Default: none.",
)
@option("--state-dir-mib", group="advanced", type=click.IntRange(1), default=4096, help="Size limit of --state-dir, in MiB.")
@limit_options
@option("--json", "as_json", group="output", is_flag=True, help="Print events (start, each request, end) as JSON lines.")
@debug_option
def command(
    opening: Opening,
    limits: Limits,
    host: str,
    port: int,
    model_name: str | None,
    api_key_file: Path | None,
    allowed: tuple[str, ...],
    policy: ImagePolicy,
    watched: tuple[str, ...],
    image_hosts: tuple[str, ...],
    grace: float,
    state_cache_mib: int,
    state_dir: Path | None,
    state_dir_mib: int,
    as_json: bool,
) -> None:
    """Serve BUNDLE through an OpenAI-compatible API and a web page, until SIGTERM or Ctrl-C.

    By default the server is reachable from this machine only. A further question about an image reuses its cached state.
    """
    try:
        from .access_log import EventLines
        from .build import Access, CacheOptions, serve
    except ImportError as error:
        raise MachineError(f"serve needs {error.name}; install it with: {install_hint('serve')}") from error
    key = _read_key(api_key_file)
    if key is None and not is_loopback(host):
        tell(f"no API key: anyone who can reach {host} can use this server; set one with --api-key-file")
    cache_options = CacheOptions(state_cache_mib << 20, state_dir, state_dir_mib << 20)
    access = Access(host, port, key, allowed, image_hosts)
    if not as_json:
        serve(
            opening,
            model_name,
            access,
            cache_options,
            limits,
            policy,
            watched,
            grace,
            lambda url, _model: say(f"listening on {url}"),
        )
        return
    lines = EventLines(sys.stdout)

    def on_ready(url: str, model: str) -> None:
        lines.write("listening", url=url, model=model, version=__version__)

    serve(opening, model_name, access, cache_options, limits, policy, watched, grace, on_ready, lines)
    lines.close()


def _read_key(file: Path | None) -> str | None:
    """Return the API key, or None. Raises InputError for a file or a variable without a valid key."""
    if file is None:
        text, where = os.environ.get(KEY_VARIABLE, ""), f"${KEY_VARIABLE}"
        if not text:
            return None
    else:
        where = str(file)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read ({error}); give a file with one line, the key") from error
    key = text.strip()
    if not key or not key.isprintable() or not key.isascii() or " " in key:
        raise InputError(f"{where}: expected one line of printable ASCII without spaces, the key")
    return key


main = main_of(command)
