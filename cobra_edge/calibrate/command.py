"""Calibrate: take statistics of what enters every matrix product of a checkpoint, for quantizers that look at activations.

python -m cobra_edge.calibrate --checkpoint mini --data cobra_edge/mini/calibration.jsonl --out statistics.safetensors
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click
import msgspec

from ..environment.requirements import require_export
from ..errors import MachineError
from ..export.checks import check_text_only
from ..files.staging import check_file_goal, held, staged_file
from ..inference.session_options import threads_option
from ..suite.reader import CALIBRATION, read_suite, spread
from ..terminal.output import debug_option, main_of, print_json, say, stages

_MARGIN_BYTES = 64 << 20


@click.command(epilog="Example: python -m cobra_edge.calibrate --checkpoint mini --out statistics.safetensors")
@click.option("--checkpoint", "source", required=True, help="mini, cobra+3b of the hub, or a directory.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=CALIBRATION,
    help="JSON lines of image, prompt, answer and task; default: the set of synthetic scenes that ships.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File of the statistics.")
@click.option("--force", is_flag=True, help="Replace a file that is already there.")
@click.option("--lines", "n_lines", type=click.IntRange(1), help="Read that many lines, of every task as many; default: all.")
@click.option("--vision-weights", type=click.Path(path_type=Path), help="Directory with the encoders' safetensors.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json or its directory.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where layers run.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def command(
    source: str,
    data: Path,
    out: Path,
    force: bool,
    n_lines: int | None,
    device: str,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Take statistics of what enters every matrix product, one layer in memory at a time.

    Finished layers are kept in OUT.partial: after an interruption the same command goes on with the next one.

    Exit codes: 0 done; 2 bad input; 3 this machine lacks something; 130 interrupted.
    """
    check_file_goal(out, force=force)
    lines = read_suite(data)
    lines = lines if n_lines is None else spread(lines, n_lines)
    require_export("calibrate", "timm", "torch")
    from ..decode.native_operations import operations_on
    from ..model.checkpoint import open_checkpoint
    from ..model.torch_device import torch_device
    from ..model.vision import check_tower
    from ..quantize.calibration import collect_statistics
    from ..quantize.resume import remove_parts
    from ..quantize.statistics import statistics_tensors, write_statistics

    there = torch_device(device)
    checkpoint = open_checkpoint(source, **options)
    if checkpoint.config.vision is None:
        check_text_only(checkpoint.config.model_id, vision_weights=options["vision_weights"])
    else:
        check_tower(checkpoint.config.vision, checkpoint.vision_weights, checkpoint.tower)
    partial = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    _require_room(partial, sum(t.n_bytes for t in statistics_tensors(checkpoint.config.mamba)))
    with staged_file(out, force=force) as staged, held(partial), stages() as stage:
        operations = operations_on(there, checkpoint.config.mamba)
        statistics = collect_statistics(
            checkpoint, lines, data.parent, partial=partial, operations=operations, device=there, on_progress=stage
        )
        stage("write the file", 0, 1)
        write_statistics(statistics, staged)
        remove_parts(partial)
    header = statistics.header
    if as_json:
        print_json({"statistics": str(out), "bytes": out.stat().st_size, **msgspec.structs.asdict(header)})
    else:
        say(f"{header.lines} lines, {header.positions} positions of {header.model_id} ({header.model_sha256[:12]}…)")
        say(f"statistics: {out} ({out.stat().st_size / 2**20:.1f} MiB)")


def _require_room(partial: Path, file_bytes: int) -> None:
    """Raise MachineError where the disk has no room for finished layers and for the file made of them."""
    kept = sum(f.stat().st_size for f in partial.glob("*")) if partial.is_dir() else 0
    needed, free = 2 * file_bytes + _MARGIN_BYTES - kept, shutil.disk_usage(partial.parent).free
    if needed > free:
        raise MachineError(
            f"{partial.parent}: {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB needed (twice the statistics, "
            "while they are put together); free some, or give --out on another disk"
        )


main = main_of(command)

if __name__ == "__main__":
    main()
