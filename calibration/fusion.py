"""`python -m calibration.fusion`: ways to fuse vision and language, compared on variants of cobra-mini.

All variants have the same trained encoders (cobra-mini's, frozen), the same scenes and questions in the same order, and the
same number of steps; each differs in one thing. What was trained and measured is kept in --out, so the same command resumes.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import torch

from cobra_edge.bench.machine import machine
from cobra_edge.bench.results import read_result, save_result
from cobra_edge.bench.tables import print_result
from cobra_edge.bundle.reader import Bundle
from cobra_edge.errors import InputError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.files.staging import staged_file
from cobra_edge.formats.package_data import MINI
from cobra_edge.formats.quality import DEFAULT_QUALITY, QUALITIES
from cobra_edge.formats.targets import target_named
from cobra_edge.model.vision import VisionTower, load_tower
from cobra_edge.suite.line_set import LineSet
from cobra_edge.suite.reader import HELDOUT
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, print_json, tell

from .fusion_reading import first_token_ms, golden_reading, image_last_reading
from .fusion_result import NAME, FusionResult, FusionRow, draw_fusion, fusion_table, paper_table
from .fusion_variants import VARIANTS, Variant, variant_named
from .package_mini import write_run_directory
from .train_mini import begin_work, run_workers, train_language
from .train_vision import VISION


def tower_of(variant: Variant) -> VisionTower:
    """Return the variant's encoders, those of cobra-mini."""
    whole = load_tower(VISION, MINI / "vision")
    kept: Any = [whole.encoders[VISION.encoders.index(encoder)] for encoder in variant.vision.encoders]
    return VisionTower(variant.vision, kept).eval()


def train_variant(rank: int, args: argparse.Namespace) -> None:
    """Train `args.variant` as one of `args.workers`."""
    variant = variant_named(args.variant)
    begin_work(rank, args)
    train_language(tower_of(variant), variant.projector, args, image_last=variant.image_last, heads=variant.heads)


@dataclass(frozen=True)
class Training:
    """How every variant is trained: steps, scenes of a step and worker, processes, steps between saves."""

    steps: int
    batch: int
    workers: int
    log_every: int

    def run(self, variant: Variant, out: Path, seed: int) -> None:
        """Train a variant, or go on where an earlier run was stopped, and write its run directory, `out`/checkpoint."""
        args = argparse.Namespace(
            out=out,
            variant=variant.name,
            seed=seed,
            workers=self.workers,
            language_batch=self.batch,
            language_steps=self.steps,
            log_every=self.log_every,
            save_every=self.log_every,
        )
        run_workers(train_variant, args)
        directory = out / "checkpoint"
        write_run_directory(directory, variant.config, variant.vision, tower_of(variant).state_dict(), out / "language.pt")
        shutil.copyfile(MINI / "tokenizer.json", directory / "tokenizer.json")


def measured(variant: Variant, out: Path, seed: int, suite: Path, quality: str) -> FusionRow:
    """Export a trained variant in 4 bits, fast and by `quality`, and compare it with its float model on the lines of a suite.

    An export reads the image first. Where it comes last the reference is a float16 build, both built without any data.
    """
    saved, lines = torch.load(out / "language.pt", weights_only=True), LineSet.of_suite(suite)
    numbers = sum(tensor.numel() for part in ("model", "projector") for tensor in saved[part].values())

    def build(name: str, **options: Any) -> Path:
        golden = (
            {"golden_lines": 16} if variant.image_last else {"golden": suite}
        )  # what they say of the wrong order is not used
        source, goal = str(out / "checkpoint"), out / name
        return export_bundle(source, target_named("cpu"), goal, force=True, **options, **golden).directory

    fast = build("fast", scheme="w4a16-g128", method="rtn")
    if variant.image_last:
        reading, better = image_last_reading(fast, build("fp16", scheme="fp16", method="rtn"), lines), None
    else:
        reading, better = golden_reading(fast), golden_reading(build(quality, quality=quality)).measures["kld_mean"]
    manifest = Bundle.open(fast).manifest
    return FusionRow(
        variant=variant.name,
        encoders=variant.encoders,
        projector=variant.projector,
        image_last=variant.image_last,
        heads=variant.heads,
        seed=seed,
        steps=saved["step"],
        minutes=saved["seconds"] / 60,
        visual_tokens=manifest.model.n_visual_tokens,
        parameters=numbers,
        accuracy={task.task: task.reference for task in reading.tasks},
        accuracy_4_bits=reading.measures["accuracy"],
        accuracy_change=reading.measures["accuracy_change"],
        kld_fast=reading.measures["kld_mean"],
        quality=quality,
        kld_quality=better,
        bundle_bytes=sum(entry.bytes for entry in manifest.files.values()),
        first_token_ms=first_token_ms(fast, lines),
        machine=machine(),
    )


@click.command(name="fusion", cls=Command, epilog="Example: python -m calibration.fusion --steps 1500")
@option("--variant", "names", group="input", multiple=True, help="A variant; repeatable. Default: all.")
@option("--suite", group="input", type=click.Path(path_type=Path), default=HELDOUT, help="Lines to compare on.")
@option("--steps", group="model", type=click.IntRange(1), default=1500, show_default=True, help="Steps of stage language.")
@option("--seeds", group="model", type=click.IntRange(1), default=1, show_default=True, help="How often each is trained.")
@option("--batch", group="model", type=click.IntRange(1), default=8, show_default=True, help="Scenes of a step and worker.")
@option("--workers", group="model", type=click.IntRange(1), default=2, show_default=True, help="Processes that train.")
@option("--log-every", group="model", type=click.IntRange(1), default=100, show_default=True, help="Steps between saves.")
@option("--quality", group="quantization", type=click.Choice(list(QUALITIES)), default=DEFAULT_QUALITY, show_default=True,
        help="Of the other export of each in 4 bits.")  # fmt: skip
@option("--out", group="output", type=click.Path(path_type=Path), default=Path("runs/fusion"), show_default=True,
        help="Directory for trained variants; the same command resumes.")  # fmt: skip
@option("--name", group="output", default=NAME, show_default=True, help="Name of the result.")
@option("--plot", group="output", type=click.Path(path_type=Path), default=None, help="Also draw accuracy over time as a PNG.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def fusion(
    names: tuple[str, ...],
    suite: Path,
    steps: int,
    seeds: int,
    batch: int,
    workers: int,
    log_every: int,
    quality: str,
    out: Path,
    name: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Train variants of cobra-mini that differ in how vision and language are fused, and compare them."""
    variants = [variant_named(each) for each in names] or list(VARIANTS.values())
    training, rows = Training(steps, batch, workers, log_every), list[FusionRow]()
    if unseen := [number for number, line in enumerate(LineSet.of_suite(suite).lines, 1) if line.image is None]:
        raise InputError(f"{suite}, line {unseen[0]}: has no image; variants are compared by what they see")
    for done, (seed, variant) in enumerate((seed, variant) for seed in range(seeds) for variant in variants):
        tell(f"{variant.name}, seed {seed}: {done + 1} of {seeds * len(variants)}")
        rows.append(_row(variant, training, out / f"{variant.name}-{seed}", seed, suite, quality))
    result = FusionResult(rows=tuple(rows), machine=machine())
    file = save_result(name, result)
    if plot is not None:
        draw_fusion(result, plot)
    if as_json:
        print_json(result)
    else:
        print_result([fusion_table(result), paper_table()], file)


def _row(variant: Variant, training: Training, out: Path, seed: int, suite: Path, quality: str) -> FusionRow:
    """Return a variant's row: the one that an earlier run kept, or a new one."""
    kept = out / "row.json"
    if kept.is_file():
        row = read_result(kept, FusionRow)
        if (row.steps, row.quality) != (training.steps, quality):
            raise InputError(
                f"{kept}: of {row.steps} steps and {row.quality}, expected {training.steps} and {quality}; give the same "
                "--steps and --quality, or another --out"
            )
        return row
    training.run(variant, out, seed)
    row = measured(variant, out, seed, suite, quality)
    with staged_file(kept, force=True) as staged:
        staged.write_bytes(msgspec.json.format(msgspec.json.encode(row)))
    return row


main = main_of(fusion)

if __name__ == "__main__":
    main()
