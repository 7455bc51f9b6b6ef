"""Bench: measure, and keep the result.

python -m cobra_edge.bench export --shape cobra-3b
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..bundle import Bundle
from ..decode.decoder import ACTIVATIONS, DecoderOptions
from ..errors import InputError, MachineError
from ..scheme import scheme_named
from ..tables import cell, figure
from ..targets import target_named
from ..terminal import debug_option, print_json, progress, results
from .shapes import shape_named

RESULTS = Path("bench") / "results"


@click.group(epilog="Example: python -m cobra_edge.bench export --shape cobra-3b")
def command() -> None:
    """Measure, and keep the result under bench/results."""


def keep(name: str, result: dict[str, Any]) -> Path:
    """Write a result as bench/results/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return file


@command.command(epilog="Example: python -m cobra_edge.bench export --shape cobra-3b --scratch /tmp")
@click.option("--shape", default="cobra-3b", show_default=True, help="A published shape, filled with random weights.")
@click.option("--target", default="jetson", show_default=True, help="Device profile or family.")
@click.option("--scheme", default="w4a16-g128", show_default=True, help="Weight format.")
@click.option("--scratch", type=click.Path(path_type=Path, exists=True), help="Where to put checkpoint and bundle.")
@click.option("--golden-lines", type=click.IntRange(1), default=2, show_default=True, help="How many golden lines.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def export(shape: str, target: str, scheme: str, scratch: Path | None, golden_lines: int, as_json: bool) -> None:
    """Export a random checkpoint of a published shape; wall time and peak memory of the whole command.

    The drift of random weights says nothing about a trained model and is not kept.
    """
    shape_named(shape), scheme_named(scheme), target_named(target)  # before gigabytes are written
    try:
        from .random_checkpoint import write_random_checkpoint
    except ImportError as error:
        raise MachineError(f"bench export needs {error.name}; install it with: pip install 'cobra-edge[export]'") from error
    from .machine import machine, measure

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source, out = Path(folder) / shape, Path(folder) / "bundle"
        with progress() as bar:
            task = bar.add_task(f"random {shape}", total=3)
            write_random_checkpoint(shape, source, lambda: bar.advance(task))
        arguments = ["--target", target, "--checkpoint", str(source), "--scheme", scheme, "--out", str(out)]
        no_limits = Path(folder) / "budget.toml"
        no_limits.write_text(f"[schemes.{scheme}]\n", encoding="utf-8")
        arguments += ["--golden-lines", str(golden_lines), "--budget", str(no_limits), "--json"]
        done = measure(["cobra_edge.export", *arguments])
        if done.exit_code:
            raise MachineError(f"the export ended with exit code {done.exit_code}; see its messages above")
        exported = json.loads(done.stdout)
        files = {name: entry["bytes"] for name, entry in exported["manifest"]["files"].items()}
        checkpoint_bytes = sum(f.stat().st_size for f in source.rglob("*") if f.is_file())
    result = {
        "bench": "export",
        "shape": shape,
        "target": target,
        "scheme": scheme,
        "golden_lines": golden_lines,
        "seconds": round(done.seconds, 1),
        "peak_gib": round(done.peak_bytes / 2**30, 2),
        "checkpoint_bytes": checkpoint_bytes,
        "bundle_bytes": files,
        "onnx_relative_rms": exported["onnx_relative_rms"],
        "machine": machine(),
    }
    file = keep(f"export-{shape}", result)
    if as_json:
        print_json(result)
        return
    table = Table(title=f"export of {shape} as {scheme} for {target}", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("wall time, minutes", f"{done.seconds / 60:.1f}")
    table.add_row("peak resident memory, GiB", f"{done.peak_bytes / 2**30:.2f}")
    table.add_row("checkpoint, GB", f"{checkpoint_bytes / 1e9:.2f}")
    table.add_row("bundle, GB", f"{sum(files.values()) / 1e9:.2f}")
    table.add_row("vision graph against torch, relative RMS", figure(exported["onnx_relative_rms"]))
    results.print(table)
    results.print(f"kept: {file}", highlight=False)


@command.command(epilog="Example: python -m cobra_edge.bench decode --shape cobra-3b --scheme w4a16-g128")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--shape", default="cobra-3b", show_default=True, help="Random weights of a published shape; without BUNDLE.")
@click.option("--scheme", "schemes", multiple=True, help="Of the random weights; may be given again. Default: w4a16-g128.")
@click.option("--device", type=click.Choice(["cpu"]), default="cpu", show_default=True, help="Where to run.")
@click.option(
    "--prompt-tokens", multiple=True, type=click.IntRange(1), default=(256, 768), show_default=True, help="To prefill."
)
@click.option("--new-tokens", type=click.IntRange(1), default=16, show_default=True, help="Steps timed together.")
@click.option(
    "--context", multiple=True, type=click.IntRange(1), default=(64, 16384), show_default=True, help="Read before steps."
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Each figure is taken so often.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Default: one a physical core.")
@click.option("--activations", type=click.Choice(ACTIVATIONS), default="int8", show_default=True, help="What enters a product.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def decode(
    bundle: Path | None,
    shape: str,
    schemes: tuple[str, ...],
    device: str,
    prompt_tokens: tuple[int, ...],
    new_tokens: int,
    context: tuple[int, ...],
    rounds: int,
    threads: int | None,
    activations: str,
    as_json: bool,
) -> None:
    """Time prefill and decoding of BUNDLE, or of random weights in a published shape, beside the memory's bandwidth.

    Before anything is timed the native decoder is compared with the numpy one; where they differ no figure is printed.
    """
    from .decode import measure_decode, random_bundle
    from .machine import machine

    if bundle is not None and schemes:
        raise InputError("--scheme is of random weights and BUNDLE has its own; give one of them")
    options, rows = DecoderOptions(threads, activations), []
    with progress() as bar:
        for scheme in schemes or ("w4a16-g128",):
            opened = (
                random_bundle(shape_named(shape).mamba, scheme, Path("bundles") / f"bench-{shape}-{scheme}", bar)
                if bundle is None
                else Bundle.open(bundle)
            )
            rows.append(measure_decode(opened, options, list(prompt_tokens), new_tokens, list(context), rounds, bar))
    name = shape if bundle is None else opened.manifest.model.model_id
    result = {"bench": "decode", "model": name, "device": device, "rows": rows, "machine": machine()}
    file = keep(f"{device}-decode-{name}", result)
    if as_json:
        print_json(result)
        return
    for row in rows:
        title = f"{name} as {row['scheme']}, {row['activations']} activations, {row['kernels']}, {row['threads']} threads"
        table = Table(title=cell(title), title_justify="left")
        for column in ("measure", "median", "low", "high"):
            table.add_column(column, justify="left" if column == "measure" else "right")
        for measure, value in row["figures"].items():
            table.add_row(measure, *(figure(value[k]) for k in ("median", "low", "high")))
        results.print(table)
    results.print(f"kept: {file}", highlight=False)


@command.command(epilog="Example: python -m cobra_edge.bench quality")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def quality(as_json: bool) -> None:
    """Run the held-out suite of cobra-mini through each scheme: drift from float, accuracy a task."""
    from .machine import machine
    from .quality import measure_schemes

    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        rows = measure_schemes(Path(folder), bar)
    result = {"bench": "quality", "model": "cobra-mini", "rows": rows, "machine": machine()}
    file = keep("quality", result)
    if as_json:
        print_json(result)
        return
    table = Table(title=f"cobra-mini on {rows[0]['lines']} held-out lines", title_justify="left")
    tasks = list(rows[0]["accuracy"])
    for column in ("scheme", "activations", "bits", "mean KLD", "top-1", *tasks, "ppl"):
        table.add_column(column, justify="left" if column in ("scheme", "activations") else "right")
    for r in rows:
        cells = [
            r["scheme"],
            r["activations"],
            f"{r['bits_per_weight']:.2f}",
            f"{r['kld_mean']:.1e}",
            f"{r['top1_agreement']:.1%}",
        ]
        cells += [f"{r['accuracy'][t]:.1%}" for t in tasks]
        table.add_row(*cells, f"{r['caption_perplexity']:.3f}")
    results.print(table)
    results.print(f"kept: {file}", highlight=False)
