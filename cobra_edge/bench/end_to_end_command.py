"""`bench end-to-end`: tokens a second of whole answers about an image."""

from __future__ import annotations

from pathlib import Path

import click
from rich.progress import Progress
from rich.table import Table

from ..bundle.reader import Bundle
from ..decode.backends import KERNELS
from ..decode.decoder import DEFAULT_OPTIONS
from ..environment.cpu_name import cpu_name
from ..inference.session import Session
from ..terminal.output import cell, debug_option, print_json, progress, results
from .decode_tables import figure_cell
from .results import check_name, keep

# Cobra-3.5B on an A100 80GB, one image, 256 tokens, encoding included: arXiv 2403.14520.
PUBLISHED_TOK_S = 166.5


@click.command(name="end-to-end", epilog="Example: python -m cobra_edge.bench end-to-end bundles/my-cobra --device cuda")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to run.")
@click.option("--kernels", type=click.Choice(KERNELS), default="auto", show_default=True, help="The decoder's backend.")
@click.option("--vision-runtime", default="auto", show_default=True, help="What runs the vision graph.")
@click.option("--new-tokens", type=click.IntRange(2), default=256, show_default=True, help="Of each answer.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="How often.")
@click.option("--weights", default="its own", show_default=True, help="Whose weights they are, for the result: random, say.")
@click.option("--name", help="Of the file in bench/results. Default: gpu-end-to-end-GPU or cpu-end-to-end, and the model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def end_to_end(
    bundle: Path,
    device: str,
    kernels: str,
    vision_runtime: str,
    new_tokens: int,
    rounds: int,
    weights: str,
    name: str | None,
    as_json: bool,
) -> None:
    """Time answers of BUNDLE about an image: the image is encoded, the question read, all tokens written.

    That is how the published Cobra was measured; its figure is printed beside, as published.
    """
    from .end_to_end import measure_end_to_end
    from .machine import machine

    if name is not None:
        check_name(name)
    session = Session(Bundle.open(bundle), device, kernels, vision_runtime=vision_runtime)
    on_gpu = session.decoder.runs_on == "cuda"
    with progress() as bar:
        _check(session, on_gpu, bar)
        found = measure_end_to_end(session, new_tokens, rounds, bar)
    manifest = session.bundle.manifest
    machine_name, short = _gpu_names() if on_gpu else (cpu_name(), "")
    model = manifest.model.model_id
    result = {
        "bench": "end-to-end",
        "model": model,
        "weights": weights,
        "scheme": manifest.recipe.scheme,
        "decoder": session.decoder.name,
        "vision_runtime": session.vision.name if session.vision else None,
        "machine_name": machine_name,
        **found,
        "published_tok_s": PUBLISHED_TOK_S,
        "machine": machine(),
    }
    file = keep(name or (f"gpu-end-to-end-{short}-{model}" if on_gpu else f"cpu-end-to-end-{model}"), result)
    if as_json:
        print_json(result)
        return
    title = f"{model} as {manifest.recipe.scheme} on {machine_name}, {new_tokens} tokens, median (low–high) of {rounds}"
    table = Table(title=cell(title), title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("encoding the image, s", figure_cell("", found["figures"]["encode_seconds"]))
    table.add_row("first token, s", figure_cell("", found["figures"]["first_token_seconds"]))
    table.add_row("tok/s, encoding included", figure_cell("", found["figures"]["tok_s"]))
    table.add_row("Cobra-3.5B on an A100, published and not measured here", f"{PUBLISHED_TOK_S}")
    results.print(table)
    results.print(f"kept: {file}", highlight=False)


def _check(session: Session, on_gpu: bool, bar: Progress) -> None:
    """Raise MachineError for a decoder that computes something else than it should."""
    if on_gpu:
        from .gpu_gate import check_on_gpu, plain_decoder

        check_on_gpu(session.decoder, plain_decoder(session.bundle), half_steps=session.decoder.name == "bitsandbytes")
    elif session.decoder.name == "native":
        from .gate import check

        check(session.bundle, DEFAULT_OPTIONS, "auto", bar)


def _gpu_names() -> tuple[str, str]:
    """Return the GPU's name and its short one."""
    from .gpu import gpu_here, short_name

    gpu = gpu_here()
    return gpu.name, short_name(gpu.name)
