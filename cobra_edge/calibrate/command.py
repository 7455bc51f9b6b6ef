"""Collect calibration statistics of a checkpoint, for quantization methods that use them.

cobra-edge calibrate --checkpoint mini --out statistics.safetensors
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec

from ..environment.memory import keep_freed_memory
from ..environment.requirements import require_export
from ..errors import InputError, MachineError
from ..export.checks import check_text_only
from ..export.lines import affordable, check_answerable, drawn_lines
from ..files.staging import check_file_goal, held, staged_file
from ..inference.session_options import threads_option
from ..quantize.statistics import Header
from ..suite.calibration_lines import read_calibration
from ..suite.line_set import LineSet
from ..suite.reader import spread
from ..terminal.option_groups import Command, option
from ..terminal.output import debug_option, main_of, print_json, say, stages

_MARGIN_BYTES = 64 << 20


_PATH = click.Path(path_type=Path)


@click.command(cls=Command, epilog="Example: cobra-edge calibrate --checkpoint mini --out statistics.safetensors")
@option(
    "--checkpoint",
    "source",
    group="input",
    metavar="SOURCE",
    required=True,
    help="mini, cobra+3b (downloaded from the hub) or a directory.",
)
@option(
    "--data",
    group="input",
    type=_PATH,
    show_default="drawn images",
    help="Folder of images, or JSON lines of image and prompt. The float model answers what has no answer.",
)
@option("--skip-bad", group="input", is_flag=True, help="Leave out images and lines of --data that cannot be read.")
@option(
    "--lines",
    "n_lines",
    group="input",
    type=click.IntRange(1),
    show_default="all",
    help="Number of lines to use, evenly spread over the tasks.",
)
@option("--vision-weights", group="input", type=_PATH, help="Directory with the safetensors of the vision encoders.")
@option("--tokenizer", group="input", type=_PATH, help="tokenizer.json or its directory.")
@option("--out", group="output", type=_PATH, required=True, help="File of the statistics.")
@option("--force", group="output", is_flag=True, help="Replace an existing file.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object.")
@option("--device", group="advanced", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Device that runs the layers.")
@threads_option
@debug_option
def command(
    source: str,
    data: Path | None,
    skip_bad: bool,
    out: Path,
    force: bool,
    n_lines: int | None,
    device: str,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Collect statistics of the inputs of all projections, one layer in memory at a time.

    Finished layers are kept in OUT.partial, finished answers in OUT.answers; after an interruption the same command resumes.

    Exit codes: 0 done; 2 bad input; 3 this machine lacks something; 130 interrupted.
    """
    check_file_goal(out, force=force)
    if skip_bad and data is None:
        raise InputError("--skip-bad is for images and lines of --data; omit it")
    given = None if data is None else read_calibration(data, skip_bad=skip_bad)
    require_export("calibrate", "timm", "torch")
    from ..model.checkpoint import open_checkpoint
    from ..model.torch_device import torch_device
    from ..model.vision import check_tower

    runs_on = torch_device(device)
    checkpoint = open_checkpoint(source, **options)
    lines = given or drawn_lines(checkpoint.config) or LineSet.embedded()
    lines = affordable(lines, checkpoint.config, gradients=False)
    lines = lines if n_lines is None else replace(lines, lines=spread(list(lines.lines), n_lines))
    if checkpoint.config.vision is None:
        check_text_only(checkpoint.config.model_id, vision_weights=options["vision_weights"])
        check_answerable(lines, checkpoint.config)
    else:
        check_tower(checkpoint.config.vision, checkpoint.vision_weights, checkpoint.tower)
    keep_freed_memory()
    header = _write(checkpoint, lines, out, runs_on, force=force)
    _print(header, out, as_json=as_json)


def _write(checkpoint: Any, lines: LineSet, out: Path, device: Any, *, force: bool) -> Header:
    """Let the float model answer what has no answer, collect statistics on a torch device and write them."""
    from ..decode.native_operations import operations_on
    from ..quantize.calibration import collect_statistics
    from ..quantize.calibration_data import EmbeddingCache
    from ..quantize.own_answers import Greedy, with_own_answers
    from ..quantize.resume import remove_resume_directory
    from ..quantize.statistics import statistics_tensors, write_statistics

    resume = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    _require_disk_space(resume, sum(t.n_bytes for t in statistics_tensors(checkpoint.config.mamba)))
    operations, cache = operations_on(device, checkpoint.config.mamba), EmbeddingCache(checkpoint)
    answers = out.with_name(f"{out.name}.answers")
    with staged_file(out, force=force) as staged, held(resume), stages() as on_progress:
        lines = with_own_answers(checkpoint, lines, cache, Greedy(operations, device, on_progress), answers)
        statistics = collect_statistics(
            checkpoint,
            lines.lines,
            lines.directory,
            resume_directory=resume,
            operations=operations,
            device=device,
            on_progress=on_progress,
            cache=cache,
        )
        on_progress("write the file", 0, 1)
        write_statistics(statistics, staged)
        remove_resume_directory(resume)
    answers.unlink(missing_ok=True)
    return statistics.header


def _print(header: Header, out: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"statistics": str(out), "bytes": out.stat().st_size, **msgspec.structs.asdict(header)})
    else:
        say(f"{header.lines} lines, {header.positions} positions of {header.model_id} ({header.model_sha256[:12]}…)")
        say(f"statistics: {out} ({out.stat().st_size / 2**20:.1f} MiB)")


def _require_disk_space(resume: Path, file_bytes: int) -> None:
    """Raise MachineError if the disk has no space for finished layers and for the file made of them."""
    kept = sum(f.stat().st_size for f in resume.glob("*")) if resume.is_dir() else 0
    needed, free = 2 * file_bytes + _MARGIN_BYTES - kept, shutil.disk_usage(resume.parent).free
    if needed > free:
        raise MachineError(
            f"{resume.parent}: {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB needed (twice the size of the "
            "statistics); free some space, or give --out on another disk"
        )


main = main_of(command)

if __name__ == "__main__":
    main()
