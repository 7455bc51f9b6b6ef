"""`bench serve`: the server, measured through HTTP."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from ..bundle.manifest import Manifest
from ..bundle.reader import MANIFEST, Bundle
from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from ..formats.targets import target_named
from ..terminal.option_groups import Command, option
from ..terminal.output import debug_option, print_json, progress, stages
from .results import check_name, save_result
from .serving_memory import SAMPLE_EVERY
from .serving_result import ServeParts, ServeResult, serving_table
from .shapes import shape_named
from .tables import print_result

PARTS = ("prefix-reuse", "load", "memory", "shutdown")
_RENAMED = {"follow-up": "prefix-reuse"}
_MINI = "cobra-mini"
_SCHEME = "w4a16-g128"
_SHUTDOWNS = 3


@dataclass(frozen=True)
class _Plan:
    """What is measured: parts, images of prefix reuse (None for the default), clients, seconds of load, requests of memory."""

    parts: tuple[str, ...]
    rounds: int | None
    clients: int
    seconds: float
    requests: int


def _known_parts(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if value in _RENAMED:
            raise click.BadParameter(f"{value} is now called {_RENAMED[value]}")
        if value not in PARTS:
            raise click.BadParameter(f"{value!r} is not one of {', '.join(PARTS)}")
    return values


@click.command(name="serve", cls=Command, epilog="Example: cobra-edge bench serve --part load --clients 32 --seconds 60")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@option(
    "--shape",
    group="input",
    help=f"Instead of BUNDLE: {_MINI}, or a published shape with random weights.  [default: {_MINI}]",
)
@option("--bundle-dir", group="input", type=click.Path(path_type=Path), help="Directory of the bundle of --shape, made once.")
@option(
    "--part",
    "parts",
    group="measurement",
    metavar="[" + "|".join(PARTS) + "]",
    multiple=True,
    callback=_known_parts,
    help="Measure only this part; repeatable.  [default: all; prefix-reuse for a published shape]",
)
@option(
    "--rounds",
    group="measurement",
    type=click.IntRange(1),
    help="Images of prefix-reuse.  [default: 15; 3 for a published shape]",
)
@option("--clients", group="measurement", type=click.IntRange(1), default=32, help="Concurrent clients of load and shutdown.")
@option("--seconds", group="measurement", type=click.FloatRange(0, min_open=True), default=60, help="Duration of load.")
@option("--requests", group="measurement", type=click.IntRange(2 * SAMPLE_EVERY), default=1000, help="Requests of memory.")
@option("--name", group="output", help="Name of the file in bench/results.  [default: serve-MODEL]")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table.")
@option("--scratch", group="advanced", type=click.Path(path_type=Path, exists=True), help="Directory for temporary files.")
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
    """Start the server as a child process and measure it through HTTP.

    prefix-reuse: time to first token of first and second questions about an image. load: throughput and latency under many
    clients. memory: growth of resident memory. shutdown: SIGTERM under load.
    """
    if bundle is not None and (shape or bundle_dir):
        raise InputError("--shape and --bundle-dir apply to bundles made here; give them instead of BUNDLE")
    if name is not None:
        check_name(name)
    shape = shape or _MINI
    shape_named(shape)
    random = bundle is None and shape != _MINI
    _require_httpx()
    plan = _Plan(parts or (PARTS[:1] if random else PARTS), rounds, clients, seconds, requests)
    with _bundle(bundle, shape, bundle_dir, scratch) as directory:
        manifest = Bundle.open(directory).manifest
        if manifest.model.vision is None:
            raise InputError(f"{manifest.model.model_id} is a text-only model; give a bundle with a vision graph")
        found = _measure(directory, plan, random)
    result = _result(found, manifest, manifest.model.model_id if bundle is not None else shape, random)
    file = save_result(name or f"serve-{result.model}", result)
    if as_json:
        print_json(result)
    else:
        print_result([serving_table([result])], file)


def _require_httpx() -> None:
    try:
        import httpx  # noqa: F401 - only whether it is installed
    except ImportError as error:
        raise MachineError("bench serve needs httpx; install it with: pip install httpx") from error


def _result(found: ServeParts, manifest: Manifest, model: str, random: bool) -> ServeResult:
    from .machine import machine, version_of

    return ServeResult(
        **msgspec.structs.asdict(found),
        model=model,
        weights="random" if random else "trained",
        scheme=manifest.recipe.scheme,
        server={package: version_of(package) for package in ("fastapi", "uvicorn")},
        machine=machine(),
    )


def _measure(directory: Path, plan: _Plan, large: bool) -> ServeParts:
    from .serving_client import image_url, photograph_url
    from .serving_load import measure_load, measure_shutdown
    from .serving_memory import measure_memory
    from .serving_prefix_reuse import measure_prefix_reuse

    found: dict[str, Any] = {}
    with stages() as on_step:
        if "prefix-reuse" in plan.parts:
            count = plan.rounds or (3 if large else 15)
            # On a CPU a large model takes seconds to encode an image, and longer answers of random weights add nothing.
            checked, tokens = (1, 2) if large else (count + 1, 48)
            for field, image in (("prefix_reuse", image_url), ("prefix_reuse_photo", photograph_url)):
                found[field] = measure_prefix_reuse(directory, image, count, checked, tokens, on_step)
        if "load" in plan.parts:
            found["load"] = measure_load(directory, plan.clients, plan.seconds, max(1, plan.clients // 2), on_step)
        if "memory" in plan.parts:
            found["memory"] = measure_memory(directory, plan.requests, on_step)
        if "shutdown" in plan.parts:
            found["shutdown"] = measure_shutdown(directory, plan.clients, _SHUTDOWNS, on_step)
    return ServeParts(**found)


@contextmanager
def _bundle(given: Path | None, shape: str, kept: Path | None, scratch: Path | None) -> Iterator[Path]:
    """Yield the bundle to serve; one made here without --bundle-dir is deleted at the end of the block."""
    existing = kept if kept is not None and (kept / MANIFEST).is_file() else None
    if existing is not None and Bundle.open(existing).manifest.model.mamba != shape_named(shape).mamba:
        raise InputError(f"{existing} holds a bundle of another shape than {shape}; give another --bundle-dir")
    ready = given or existing
    if ready is not None:
        yield ready
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = kept or Path(folder) / "bundle"
        try:
            if shape == _MINI:
                from ..export.pipeline import export_bundle

                export_bundle("mini", target_named("cpu"), out, scheme=_SCHEME, method="rtn", vision_precision="fp32")
            else:
                from .random_export import export_random

                source = Path(folder) / "source"
                source.mkdir()
                with progress() as bar:
                    recipe = ["--scheme", _SCHEME, "--method", "rtn", "--vision-precision", "fp32", "--golden-lines", "2"]
                    export_random(shape, "cpu", recipe, source, out, bar)
        except ImportError as error:
            raise MachineError(f"bench serve needs {error.name}; install it with: {install_hint('export')}") from error
        yield out
