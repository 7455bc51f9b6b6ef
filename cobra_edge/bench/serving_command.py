"""`bench serve`: the server, from the outside."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..bundle.reader import MANIFEST, Bundle
from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from ..formats.targets import target_named
from ..terminal.output import cell, debug_option, print_json, progress, results, stages
from .results import check_name, save_result
from .serving_figures import measures
from .serving_memory import SAMPLE_EVERY
from .shapes import shape_named

PARTS = ("follow-up", "load", "memory", "shutdown")
_MINI = "cobra-mini"
_SCHEME = "w4a16-g128"
_SHUTDOWNS = 3


@click.command(name="serve", epilog="Example: python -m cobra_edge.bench serve --clients 32 --seconds 60")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--shape", help=f"Instead of BUNDLE: {_MINI}, or a published shape of random weights.  [default: {_MINI}]")
@click.option(
    "--part",
    "parts",
    multiple=True,
    type=click.Choice(PARTS),
    help="Measure this one only; may be given again.  [default: all; of a published shape follow-up]",
)
@click.option("--rounds", type=click.IntRange(1), help="New images of follow-up.  [default: 15; of a published shape 3]")
@click.option("--clients", type=click.IntRange(1), default=32, show_default=True, help="Of load and shutdown, at a time.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=60, show_default=True, help="Of load.")
@click.option("--requests", type=click.IntRange(2 * SAMPLE_EVERY), default=1000, show_default=True, help="Of memory.")
@click.option("--bundle-dir", type=click.Path(path_type=Path), help="Where a random bundle is kept: made once, then opened.")
@click.option("--scratch", type=click.Path(path_type=Path, exists=True), help="Where to put checkpoint and bundle.")
@click.option("--name", help="Of the file in bench/results. Default: serve-MODEL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def serve(
    bundle: Path | None,
    shape: str | None,
    parts: tuple[str, ...],
    rounds: int | None,
    clients: int,
    seconds: float,
    requests: int,
    bundle_dir: Path | None,
    scratch: Path | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Start the server as a process of its own and measure it through HTTP.

    follow-up: the first token about a new image, and about one that is remembered. load: many clients, a mix of questions.
    memory: what stays after many requests. shutdown: SIGTERM in the middle of a load.
    """
    if bundle is not None and (shape or bundle_dir):
        raise InputError("--shape and --bundle-dir are for bundles made here; give them instead of BUNDLE")
    if name is not None:
        check_name(name)
    shape = shape or _MINI
    shape_named(shape)
    random = bundle is None and shape != _MINI
    chosen = parts or (("follow-up",) if random else PARTS)
    try:
        import httpx  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise MachineError("bench serve needs httpx; install it with: pip install httpx") from error
    from .machine import machine, version_of

    with _bundle(bundle, shape, bundle_dir, scratch) as directory:
        manifest = Bundle.open(directory).manifest
        if manifest.model.vision is None:
            raise InputError(f"{manifest.model.model_id} is a text-only model; give a bundle with a vision graph")
        found = _measured(directory, chosen, rounds, random, (clients, seconds, requests))
    model = manifest.model.model_id if bundle is not None else shape
    result = {
        "bench": "serve",
        "model": model,
        "weights": "random" if random else "trained",
        "scheme": manifest.recipe.scheme,
        **found,
        "server": {package: version_of(package) for package in ("fastapi", "uvicorn")},
        "machine": machine(),
    }
    file = save_result(name or f"serve-{model}", result)
    if as_json:
        print_json(result)
        return
    table = Table(title=cell(f"{model} as {manifest.recipe.scheme}, served"), title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for measure, value in measures(result).items():
        table.add_row(measure, cell(value))
    results.print(table)
    results.print(f"kept: {file}", highlight=False)


def _measured(
    directory: Path, parts: tuple[str, ...], rounds: int | None, large: bool, load: tuple[int, float, int]
) -> dict[str, Any]:
    from .serving_client import image_url, photograph_url
    from .serving_load import measure_load, measure_shutdown
    from .serving_memory import measure_memory
    from .serving_prefix_reuse import measure_prefix_reuse

    (clients, seconds, requests), found = load, dict[str, Any]()
    with stages() as on_step:
        if "follow-up" in parts:
            count = rounds or (3 if large else 15)
            # A large model reads an image for seconds on a CPU, and what random weights say is no better for being longer.
            checked, tokens = (1, 2) if large else (count + 1, 48)
            for name, image in (("prefix_reuse", image_url), ("prefix_reuse_photo", photograph_url)):
                found[name] = measure_prefix_reuse(directory, image, count, checked, tokens, on_step)
        if "load" in parts:
            found["load"] = measure_load(directory, clients, seconds, max(1, clients // 2), on_step)
        if "memory" in parts:
            found["memory"] = measure_memory(directory, requests, on_step)
        if "shutdown" in parts:
            found["shutdown"] = measure_shutdown(directory, clients, _SHUTDOWNS, on_step)
    return found


@contextmanager
def _bundle(given: Path | None, shape: str, kept: Path | None, scratch: Path | None) -> Iterator[Path]:
    """Give the bundle that is served; one that is made here and not kept goes with the block."""
    there = kept if kept is not None and (kept / MANIFEST).is_file() else None
    if there is not None and Bundle.open(there).manifest.model.mamba != shape_named(shape).mamba:
        raise InputError(f"{there} holds a bundle of another shape than {shape}; give another --bundle-dir")
    ready = given or there
    if ready is not None:
        yield ready
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = kept or Path(folder) / "bundle"
        try:
            if shape == _MINI:
                from ..export.pipeline import export_bundle

                export_bundle("mini", target_named("cpu"), out, scheme=_SCHEME)
            else:
                from .random_export import export_random

                source = Path(folder) / "source"
                source.mkdir()
                with progress() as bar:
                    export_random(shape, "cpu", _SCHEME, 1, source, out, bar)
        except ImportError as error:
            raise MachineError(f"bench serve needs {error.name}; install it with: {install_hint('export')}") from error
        yield out
