"""`bench end-to-end`: tokens per second of complete answers about an image."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.progress import Progress

from ..bundle.reader import Bundle
from ..decode.decoder import DEFAULT_OPTIONS
from ..environment.cpu_name import cpu_name
from ..inference.session import Session
from ..inference.session_options import kernels_option
from ..terminal.option_groups import Command, option
from ..terminal.output import debug_option, print_json, progress
from ..vision.runtimes import RUNTIME_NAMES
from .results import check_name, save_result
from .tables import print_result


@click.command(name="end-to-end", cls=Command, epilog="Example: cobra-edge bench end-to-end bundles/demo --new-tokens 64")
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--device", group="model", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Device to measure.")
@kernels_option("--kernels")
@option("--vision-runtime", group="model", type=click.Choice(RUNTIME_NAMES), default="auto", help="Vision runtime.")
@option("--new-tokens", group="measurement", type=click.IntRange(2), default=256, help="Length of each answer.")
@option("--rounds", group="measurement", type=click.IntRange(1), default=5, help="Answers to time.")
@option("--weights", group="output", default="trained", help="Kind of weights, noted in the result: trained or random.")
@option(
    "--name",
    group="output",
    help="Name of the file in bench/results.  [default: gpu-end-to-end-GPU-MODEL or cpu-end-to-end-MODEL]",
)
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table.")
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
    """Measure complete answers of BUNDLE about an image.

    The time includes encoding the image, reading the question and generating all tokens, as in the paper of Cobra, whose figure
    is shown for comparison.
    """
    from .end_to_end import PUBLISHED_TOK_S, EndToEndResult, end_to_end_table, measure_end_to_end
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
    result = EndToEndResult(
        **msgspec.structs.asdict(found),
        model=manifest.model.model_id,
        weights=weights,
        scheme=manifest.recipe.scheme,
        decoder=session.decoder.name,
        vision_runtime=session.vision.name if session.vision else None,
        machine_name=machine_name,
        published_tok_s=PUBLISHED_TOK_S,
        machine=machine(),
    )
    default = f"gpu-end-to-end-{short}-{result.model}" if on_gpu else f"cpu-end-to-end-{result.model}"
    file = save_result(name or default, result)
    if as_json:
        print_json(result)
    else:
        print_result([end_to_end_table(result)], file)


def _check(session: Session, on_gpu: bool, bar: Progress) -> None:
    """Raise MachineError for a decoder that is not correct."""
    if on_gpu:
        from .gpu_gate import check_on_gpu, reference_decoder

        check_on_gpu(session.decoder, reference_decoder(session.bundle), half_steps=session.decoder.name == "bitsandbytes")
    elif session.decoder.name == "native":
        from .gate import check

        check(session.bundle, DEFAULT_OPTIONS, "auto", bar)


def _gpu_names() -> tuple[str, str]:
    """Return the GPU's name, and the short one for file names."""
    from .gpu import gpu_here, short_name

    gpu = gpu_here()
    return gpu.name, short_name(gpu.name)
