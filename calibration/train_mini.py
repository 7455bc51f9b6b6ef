"""Train cobra-mini from scratch in two stages, as Cobra: the vision tower, then language with the tower frozen.

    python -m calibration.train_mini [--out runs/mini] [--seed 0]

Every batch is drawn from (seed, stage, step, worker), so an interrupted run resumes with the same data; nothing is drawn twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from tokenizers import Tokenizer
from torch import Tensor, distributed, multiprocessing, nn

from cobra_edge.bench.machine import machine
from cobra_edge.decode.native_operations import differentiable_operations
from cobra_edge.formats.model_config import ProjectorKind
from cobra_edge.model.mamba import Mamba
from cobra_edge.model.projector import Projector
from cobra_edge.model.vision import VisionTower

from .auxiliary_heads import AuxiliaryHeads
from .scenes import draw_scene
from .train_language import MAMBA, initialise, language_loss, lesson_at
from .train_vision import HEAD_SIZES, VISION, pixels_of, vision_loss
from .trainer import train

TOKENIZER = Path(__file__).parent.parent / "cobra_edge" / "mini" / "tokenizer.json"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mini"), help="checkpoints and log (default runs/mini)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random draws (default 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with its own batches (default 2)")
    parser.add_argument("--vision-batch", type=int, default=16, help="scenes per step and worker in stage vision (default 16)")
    parser.add_argument("--vision-steps", type=int, default=3000, help="steps of stage vision (default 3000)")
    parser.add_argument(
        "--language-batch", type=int, default=8, help="scenes per step and worker in stage language (default 8)"
    )
    parser.add_argument("--language-steps", type=int, default=6000, help="steps of stage language (default 6000)")
    parser.add_argument("--log-every", type=int, default=100, help="steps between log lines (default 100)")
    parser.add_argument("--save-every", type=int, default=500, help="steps between saves (default 500)")
    return parser.parse_args()


def main() -> None:
    """Run all stages with one worker per core: small batches on one thread each use cores better than one process on all."""
    run_workers(work, parse())


def run_workers(task: Callable[[int, argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a task, which takes a rank and `args`, in `args.workers` processes; one alone in this one."""
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "workers").unlink(missing_ok=True)
    if args.workers == 1:
        task(0, args)
    else:
        multiprocessing.spawn(task, (args,), nprocs=args.workers)


def begin_work(rank: int, args: argparse.Namespace) -> None:
    """Set up this process as one of `args.workers`, and log machine and settings."""
    args.rank = rank
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    if args.workers > 1:
        rendezvous = args.out / "workers"
        distributed.init_process_group("gloo", init_method=f"file://{rendezvous.resolve()}", rank=rank, world_size=args.workers)
    if rank == 0:
        with (args.out / "log.jsonl").open("a") as f:
            settings = {k: v for k, v in vars(args).items() if k not in ("rank", "out")}
            f.write(json.dumps(msgspec.to_builtins(machine()) | settings) + "\n")


def work(rank: int, args: argparse.Namespace) -> None:
    """Run all stages as one of `args.workers`."""
    begin_work(rank, args)
    torch.manual_seed(args.seed)
    tower = VisionTower(VISION)
    heads = nn.ModuleList(nn.Linear(e.embed_dim, sum(HEAD_SIZES.values())) for e in VISION.encoders)
    vision_modules: dict[str, nn.Module] = {"tower": tower, "heads": heads}

    def vision_step(rng: random.Random, _step: int) -> tuple[Tensor, dict[str, float]]:
        return vision_loss(tower, heads, [draw_scene(rng, "train") for _ in range(args.vision_batch)])

    train("vision", vision_modules, vision_step, args, {"tower": 1.5e-3, "heads": 1.5e-3})

    train_language(tower, "fused-gelu-mlp", args)


def train_language(
    tower: VisionTower, kind: ProjectorKind, args: argparse.Namespace, *, image_last: bool = False, heads: bool = True
) -> None:
    """Run stage language with a trained tower, which is frozen.

    Args:
        tower: encoders.
        kind: of the projector.
        args: of the run; the stage is saved as `args.out/language.pt`.
        image_last: whether the image follows the question, instead of coming first.
        heads: whether auxiliary heads help; they cannot where names come before the image.
    """
    tower.eval().requires_grad_(False)
    model, projector = Mamba(MAMBA, differentiable_operations()), Projector(kind, tower.config.feature_dim, MAMBA.d_model)
    initialise(model, projector, args.seed)
    auxiliary = AuxiliaryHeads(model) if heads else None
    tokenizer = Tokenizer.from_file(str(TOKENIZER))

    def language_step(rng: random.Random, step: int) -> tuple[Tensor, dict[str, float]]:
        lesson = lesson_at(step, args.language_steps)
        scenes = [draw_scene(rng, "train", lesson.most, lesson.least) for _ in range(args.language_batch * lesson.times)]
        with torch.no_grad():
            features = tower(pixels_of(scenes, tower.config))
        return language_loss(
            model, projector, auxiliary, features, tokenizer, scenes, rng, lesson.branches, image_last=image_last
        )

    # At the Mamba's learning rate the projector's outputs grow until they dominate the residual stream, and colours are lost.
    language_modules: dict[str, nn.Module] = {"model": model, "projector": projector}
    if auxiliary is not None:
        language_modules["auxiliary_heads"] = auxiliary
    rates = {"model": 1e-3, "projector": 2e-4, "auxiliary_heads": 1e-3}
    train("language", language_modules, language_step, args, rates)


if __name__ == "__main__":
    main()
