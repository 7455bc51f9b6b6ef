"""Convert the files of a published benchmark into a suite.

cobra-edge regress convert pope --questions coco_pope_random.json --images val2014 --out pope-random.jsonl
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import click
import msgspec
from rich.table import Table

from ..errors import InputError
from ..files.staging import check_file_goal
from ..terminal.option_groups import Command, option
from ..terminal.output import cell, debug_option, print_json, results, say
from .benchmarks import READERS, Sources
from .line import Line
from .reader import flaw_of, missing_image, name_on_disk, write_suite

_PATH = click.Path(path_type=Path)


@click.command(
    name="convert",
    cls=Command,
    epilog="Example: cobra-edge regress convert pope --questions coco_pope_random.json --images val2014 --out pope.jsonl",
)
@click.argument("benchmark", type=click.Choice(list(READERS)))
@option("--questions", group="input", type=_PATH, required=True, help="File with the questions.")
@option("--annotations", group="input", type=_PATH, help="File with the answers, if separate (vqa-v2).")
@option("--ocr", group="input", type=_PATH, help="File with OCR words to add to the prompts (textvqa).")
@option("--images", group="input", type=_PATH, required=True, help="Directory of the images.")
@option("--skip-bad", group="input", is_flag=True, help="Skip and count records without an image, or that cannot be scored.")
@option("--out", group="output", type=_PATH, required=True, help="File of the suite, JSON lines.")
@option("--force", group="output", is_flag=True, help="Replace an existing file.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object.")
@debug_option
def command(
    benchmark: str,
    questions: Path,
    annotations: Path | None,
    ocr: Path | None,
    images: Path,
    out: Path,
    force: bool,
    skip_bad: bool,
    as_json: bool,
) -> None:
    """Convert the files of BENCHMARK into a suite. Nothing is downloaded, and images stay in place.

    Exit codes: 0 done; 2 bad input; 3 this machine lacks something; 130 interrupted.
    """
    check_file_goal(out, force=force)
    if not images.is_dir():
        raise InputError(f"{images} is not a directory; give the directory of the images with --images")
    read = READERS[benchmark].read(Sources(questions, annotations, ocr))
    lines, skipped = _usable(read, questions, images, skip_bad)
    start = os.path.relpath(os.path.realpath(images), os.path.realpath(out.parent))
    moved = (msgspec.structs.replace(line, image=os.path.join(start, line.image or "")) for line in lines)
    write_suite(out, moved, force=force)
    tasks, n_images = Counter(line.task for line in lines), len({line.image for line in lines})
    if as_json:
        print_json({"suite": str(out), "lines": len(lines), "tasks": tasks, "images": n_images, "skipped": skipped})
        return
    table = Table(title=cell(f"{benchmark}: lines by task"), title_justify="left")
    table.add_column("task")
    table.add_column("lines", justify="right")
    for task, count in tasks.items():
        table.add_row(cell(task), f"{count:,}")
    results.print(table)
    say(f"{len(lines):,} lines, {n_images:,} images, {skipped:,} skipped")
    say(f"suite: {out}")


def _usable(read: Iterable[Line], questions: Path, images: Path, skip_bad: bool) -> tuple[list[Line], int]:
    """Return the lines that can be scored and the number of the others, which raise InputError unless they are skipped."""
    there, lines, skipped = dict[str, bool](), list[Line](), 0
    for line in read:
        assert line.image is not None
        line = msgspec.structs.replace(line, image=name_on_disk(images, line.image))
        assert line.image is not None
        flaw = flaw_of(line)
        if flaw is not None and not skip_bad:
            raise InputError(f"{questions}: record {line.id}: {flaw}; or give --skip-bad to skip such records")
        if line.image not in there:
            there[line.image] = missing_image(images, line.image) is None
        if flaw is None and there[line.image]:
            lines.append(line)
        else:
            skipped += 1
    missing = [name for name, found in there.items() if not found]
    if missing and not skip_bad:
        raise InputError(
            f"{images}: {len(missing):,} of {len(there):,} images do not exist, such as {missing[0]}; give their "
            f"directory, or --skip-bad to skip their {skipped:,} lines"
        )
    if not lines:
        raise InputError(f"{questions}: none of {skipped:,} records is left; are these the images of {questions.name}?")
    return lines, skipped
