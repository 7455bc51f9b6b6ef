"""Train cobra-mini from nothing, in the order of its big sister: first eyes, then language with the eyes frozen.

    python -m calibration.train_mini [--out runs/mini] [--seed 0]

Stage `vision` teaches both encoders, at the very features the decoder will see (second-to-last block), to say for every patch
what stands there; it takes the place of the DINOv2 and SigLIP pretraining that nobody repeats on two cores. Stage `language`
freezes them and trains projector and Mamba on questions: the image is read once and its state shared by all questions about
it, exactly as the product later does. Stage `comparison` goes on with what came last: relations of two objects. Every batch is
drawn from (seed, stage, step, worker), so an interrupted run resumes where it stopped and ends with the same data; nothing is
drawn twice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor, distributed, multiprocessing, nn

from cobra_edge.bench.machine import machine
from cobra_edge.model.config import MambaConfig, vision_backbone
from cobra_edge.model.mamba import Mamba, MambaState
from cobra_edge.model.projector import Projector
from cobra_edge.model.vision import VisionTower
from cobra_edge.text import END_OF_TEXT, PromptTemplate

from .native_mixer import NATIVE
from .questions import LESSONS, Question, draw_question
from .scenes import COLOURS, MAX_OBJECTS, SHAPES, SIZE, Scene, draw_scene, render

VISION = vision_backbone("dinosiglip-vit-mini-112px")
MAMBA = MambaConfig(d_model=256, n_layer=4, vocab=512, d_inner=512, d_state=16, d_conv=4, dt_rank=16)
GRID = SIZE // 14
# A branch is a conversation that starts from the state after the image. Branches of one kind are one batch, so that short
# questions are not padded to the length of a caption.
Branches = tuple[tuple[tuple[str, ...], ...], ...]
CAPTION: Branches = ((("caption",),),)
ALL_TASKS: Branches = (
    (("existence",), ("existence",), ("spatial",), ("spatial",), ("place",), ("attribute",), ("count",)),
    (("attribute", "count"),),
    (("caption",),),
)
# What is learned last: two objects found by name and compared.
QUESTIONS: Branches = (
    (
        ("existence",),
        ("existence",),
        ("spatial",),
        ("spatial",),
        ("spatial",),
        ("place",),
        ("place",),
        ("attribute",),
        ("attribute",),
        ("count",),
    ),
)
COMPARISONS: Branches = (
    (
        ("existence",),
        ("spatial",),
        ("spatial",),
        ("spatial",),
        ("spatial",),
        ("relation",),
        ("relation",),
        ("relation",),
        ("attribute",),
        ("attribute",),
    ),
)
RELATIONS: Branches = (
    (
        ("existence",),
        ("existence",),
        ("spatial",),
        ("spatial",),
        ("relation",),
        ("relation",),
        ("relation",),
        ("place",),
        ("attribute",),
        ("attribute",),
    ),
)
TOKENIZER = Path(__file__).parent.parent / "cobra_edge" / "mini" / "tokenizer.json"


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Return (batch, 6, SIZE, SIZE) float32: three channels for each encoder, normalised its way."""
    raw = torch.from_numpy(np.stack([np.asarray(render(s)) for s in scenes])).permute(0, 3, 1, 2).float() / 255
    parts = [(raw - torch.tensor(e.mean).view(3, 1, 1)) / torch.tensor(e.std).view(3, 1, 1) for e in VISION.encoders]
    return torch.cat(parts, dim=1)


# --- stage one: eyes -------------------------------------------------------------------------------------------------

HEAD_SIZES = {
    "here": 2,
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": 2,
    "cover": len(COLOURS) + 1,
    "cover_shape": len(SHAPES),
    "row": GRID,
    "column": GRID,
    "centre": 2,
}


def patch_labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Return what stands in each patch, (batch, GRID²): -100 where a label does not apply.

    here tells whether an object's centre lies in the patch; shape, colour, size and centre (x, y in patches from the
    patch's corner, NaN elsewhere) are that object's. cover and cover_shape are colour (0 is background) and shape of
    whatever covers the middle of the patch. row and column are the patch's own place, asked for wherever an object is:
    features that do not say where they are leave the decoder to count patches, and it never learns left from right.
    """
    n = len(scenes)
    labels = {k: np.full((n, GRID * GRID), -100, np.int64) for k in HEAD_SIZES if k != "centre"}
    labels["here"][:], labels["cover"][:] = 0, 0
    centre = np.full((n, GRID * GRID, 2), np.nan, np.float32)
    middles = (np.arange(GRID) + 0.5) * 14
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            patch = int(thing.y // 14) * GRID + int(thing.x // 14)
            shape, colour = SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)
            labels["here"][i, patch], labels["shape"][i, patch], labels["colour"][i, patch] = 1, shape, colour
            labels["size"][i, patch] = int(thing.size == "large")
            centre[i, patch] = thing.x % 14 / 14, thing.y % 14 / 14
            near = np.hypot(middles[None, :] - thing.x, middles[:, None] - thing.y) < 0.8 * thing.radius
            labels["cover"][i, near.reshape(-1)] = colour + 1
            labels["cover_shape"][i, near.reshape(-1)] = shape
    occupied = (labels["here"] == 1) | (labels["cover"] > 0)
    patches = np.arange(GRID * GRID)
    labels["row"] = np.where(occupied, patches // GRID, -100)
    labels["column"] = np.where(occupied, patches % GRID, -100)
    return {k: torch.from_numpy(v) for k, v in labels.items()} | {"centre": torch.from_numpy(centre)}


def vision_loss(tower: VisionTower, heads: nn.ModuleList, scenes: list[Scene]) -> tuple[Tensor, dict[str, float]]:
    """Return the mean loss of both encoders, and for each the shares of objects named and placed right and of centres found."""
    labels, pixels = patch_labels(scenes), pixels_of(scenes)
    total, right = torch.zeros(()), {}
    for name, encoder, head, part in zip(("dino", "siglip"), tower.encoders, heads, pixels.split(3, dim=1), strict=True):
        out = dict(zip(HEAD_SIZES, head(encoder(part)).float().split(list(HEAD_SIZES.values()), dim=-1), strict=True))
        for label in ("shape", "colour", "size", "cover", "cover_shape", "row", "column"):
            total = total + F.cross_entropy(out[label].flatten(0, 1), labels[label].flatten(), ignore_index=-100)
        rare = torch.tensor([1.0, 4.0])  # few patches hold a centre
        total = total + 2 * F.cross_entropy(out["here"].flatten(0, 1), labels["here"].flatten(), weight=rare)
        here = labels["here"] == 1
        total = total + 2 * F.mse_loss(out["centre"][here], labels["centre"][here])
        ok = out["shape"].argmax(-1)[here] == labels["shape"][here]
        ok &= out["colour"].argmax(-1)[here] == labels["colour"][here]
        placed = out["row"].argmax(-1)[here] == labels["row"][here]
        placed &= out["column"].argmax(-1)[here] == labels["column"][here]
        right[f"{name}_placed"] = float(placed.float().mean())
        right[f"{name}_named"] = float(ok.float().mean())
        right[f"{name}_found"] = float(((out["here"].argmax(-1) == 1) == here).all(dim=1).float().mean())
    return total / len(tower.encoders), right


# --- stage two: language ---------------------------------------------------------------------------------------------


def conversations(rng: random.Random, scene: Scene, kinds: tuple[tuple[str, ...], ...]) -> list[list[Question]]:
    """Draw one conversation a branch; a task the scene does not allow is replaced by a question of existence."""
    out = []
    for tasks in kinds:
        out.append([draw_question(rng, scene, t) or draw_question(rng, scene, "existence") for t in tasks])
    return out  # type: ignore[return-value]


def tokens_of(tokenizer: Tokenizer, turns: list[Question]) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation and which of them belong to an answer."""
    template, tokens, answered = PromptTemplate("zephyr"), [], []
    for index, turn in enumerate(turns):
        text = template.later_turn(turn.prompt) if index else template.first_turn(turn.prompt)
        for part, is_answer in ((text, False), (turn.answer + END_OF_TEXT, True)):
            ids = tokenizer.encode(part, add_special_tokens=False).ids
            tokens += ids
            answered += [is_answer] * len(ids)
    return tokens, answered


def language_batch(tokenizer: Tokenizer, talks: list[list[Question]]) -> tuple[Tensor, Tensor]:
    """Pad conversations: tokens (n, seq) and targets (n, seq), -100 where the next token is no answer."""
    rows = [tokens_of(tokenizer, t) for t in talks]
    seq = max(len(r[0]) for r in rows)
    tokens, targets = torch.zeros(len(rows), seq, dtype=torch.int64), torch.full((len(rows), seq), -100)
    for i, (ids, answered) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
        following = [t if a else -100 for t, a in zip(ids[1:], answered[1:], strict=True)]
        targets[i, : len(following)] = torch.tensor(following)
    return tokens, targets


def repeat_state(state: MambaState, times: int) -> MambaState:
    """Give every image of the batch `times` branches, branches of an image side by side."""
    parts = (tuple(t.repeat_interleave(times, 0) for t in tensors) for tensors in (state.conv, state.ssm))
    return MambaState(*parts)


@dataclass(frozen=True)
class Lesson:
    """What a step of stage language is about: scenes of `least` to `most` objects, and what is asked about them."""

    least: int
    most: int
    branches: Branches
    scenes_per_batch: int


def lesson_at(step: int, steps: int) -> Lesson:
    """Captions, then all tasks, from the middle on mostly short questions, at last with the number of objects growing again.

    Captions first, of one object, then of more: a state must hold a scene before questions can be asked of it. They take a
    quarter of the steps, on twice the scenes a step, since they are short. A caption tells the objects in their order; a
    question has to find one by its name, which is learned only where there is another to be mistaken for, and best where
    there is just one other. So the last part begins again with two objects; relations join it when places are known.
    """
    done = step / steps
    if done < _CAPTIONS:
        return Lesson(1, min(1 + int(6 * done / _CAPTIONS), MAX_OBJECTS), CAPTION, 2)
    short = RELATIONS if done >= _RELATIONS else QUESTIONS if done >= _QUESTIONS else ALL_TASKS
    branches = short if step % 4 else ALL_TASKS
    if done < _ALL_SIZES:
        return Lesson(1, MAX_OBJECTS, branches, 1)
    through = (done - _ALL_SIZES) / (1 - _ALL_SIZES)
    most = next(most for share, most in _GROWTH if through < share)
    return Lesson(1 if through >= _GROWTH[-2][0] else 2, most, branches, 1)


def comparison_at(step: int, steps: int) -> Lesson:
    """Stage comparison: two or three objects, then up to five; every fourth step asks everything, so that nothing is lost."""
    return Lesson(2, 3 if step < 0.35 * steps else MAX_OBJECTS, COMPARISONS if step % 4 else ALL_TASKS, 1)


# Where in stage language captions end, short questions begin, the objects start to grow again and relations join, and how long
# each number of objects lasts in that last part.
_CAPTIONS, _QUESTIONS, _ALL_SIZES, _RELATIONS = 1 / 4, 1 / 2, 11 / 21, 2 / 3
_GROWTH = ((0.25, 2), (0.4, 3), (0.55, 4), (1.0, MAX_OBJECTS))


def language_loss(
    model: Mamba,
    projector: Projector,
    features: Tensor,
    tokenizer: Tokenizer,
    scenes: list[Scene],
    rng: random.Random,
    branches: Branches,
) -> tuple[Tensor, dict[str, float]]:
    """Return the mean loss over all tokens of answers, and how often each task's answer is right to the last token."""
    _, after_image = model.hidden(projector(features))
    losses, right = [], {}
    for kinds in branches:
        group = [talk for scene in scenes for talk in conversations(rng, scene, kinds)]
        tokens, targets = language_batch(tokenizer, group)
        hidden, _ = model.hidden(model.embed(tokens), repeat_state(after_image, len(kinds)))
        wanted = targets >= 0
        logits = model.lm_head(hidden[wanted]).float()
        losses.append(F.cross_entropy(logits, targets[wanted], reduction="none"))
        ok = torch.ones_like(targets, dtype=torch.bool)
        ok[wanted] = logits.argmax(-1) == targets[wanted]
        whole = ok.all(dim=1)
        for task in LESSONS:
            rows = [i for i, talk in enumerate(group) if len(talk) == 1 and talk[0].task == task]
            if rows:
                right[task] = float(whole[rows].float().mean())
    return torch.cat(losses).mean(), right


def initialise(model: Mamba, projector: Projector, seed: int) -> None:
    """Initialise as Mamba does (Gu and Dao 2023, section 3.6): dt log-uniform in 0.001..0.1, small outputs."""
    torch.manual_seed(seed)
    nn.init.normal_(model.backbone.embedding.weight, std=0.02)
    for layer in model.backbone.layers:
        mixer: Any = layer.mixer
        for linear in (mixer.in_proj, mixer.x_proj, mixer.out_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        mixer.out_proj.weight.data /= math.sqrt(len(model.backbone.layers))
        nn.init.uniform_(mixer.dt_proj.weight, -(mixer.dt_rank**-0.5), mixer.dt_rank**-0.5)
        dt = torch.exp(torch.empty(MAMBA.d_inner).uniform_(math.log(1e-3), math.log(1e-1)))
        mixer.dt_proj.bias.data = dt + torch.log(-torch.expm1(-dt))
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    last: Any = list(projector.modules())[-1]
    last.weight.data *= 0.2  # the towers' features are large; layers must be heard beside them


# --- the loop all stages share --------------------------------------------------------------------------------------


def optimisers(modules: dict[str, nn.Module], rates: dict[str, float]) -> list[torch.optim.Optimizer]:
    """Muon for the Mamba's projections, AdamW for the rest, each module at its own rate.

    Weight decay is for matrices only, never for A_log and D. Muon's rate means what AdamW's does: its steps are scaled to the
    same size (Jordan 2024; Liu et al. 2025, section 2.2).
    """
    projections, groups = [], []
    for name, module in modules.items():
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        turned = {n for n, _ in named if n.endswith(("in_proj.weight", "x_proj.weight", "out_proj.weight"))}
        if turned:
            matrices = [p for n, p in named if n in turned]
            projections += [{"params": matrices, "lr": rates[name], "peak": rates[name]}]
        named = [(n, p) for n, p in named if n not in turned]
        decayed = [p for n, p in named if p.ndim >= 2 and "A_log" not in n]
        rest = [p for n, p in named if p.ndim < 2 or "A_log" in n]
        groups += [{"params": decayed, "weight_decay": 0.05, "peak": rates[name]}]
        groups += [{"params": rest, "weight_decay": 0.0, "peak": rates[name]}]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.98))]
    if projections:
        found.append(torch.optim.Muon(projections, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    return found


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients of all workers; a parameter without one counts as zero."""
    if not distributed.is_initialized():
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p)


def rate_at(step: int, steps: int, restart: float = 1.0, warmup: int = 150) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak; from the share `restart` of the steps on, one that begins at a half.

    Source: Loshchilov and Hutter 2017, warm restarts.
    """
    if step < warmup:
        return (step + 1) / warmup
    if step / steps >= restart:
        return 0.01 + 0.49 * 0.5 * (1 + math.cos(math.pi * (step / steps - restart) / (1 - restart)))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def forget_after(log: Path, stage: str, step: int) -> None:
    """Drop what the log says of steps after the last save: they are about to be made again."""
    if log.exists():
        lines = [json.loads(text) for text in log.read_text().splitlines() if text.endswith("}")]  # the last may be cut
        kept = [line for line in lines if line.get("stage") != stage or line["step"] <= step]
        log.write_text("".join(json.dumps(line) + "\n" for line in kept))


def train(
    stage: str,
    modules: dict[str, nn.Module],
    loss_of: Any,
    args: argparse.Namespace,
    rates: dict[str, float],
    restart: float = 1.0,
) -> None:
    """Train the modules for `steps`, saving to and resuming from `args.out/<stage>.pt`, logging to log.jsonl."""
    file, log = args.out / f"{stage}.pt", args.out / "log.jsonl"
    steps = getattr(args, f"{stage}_steps")
    settings = {"seed": args.seed, "workers": args.workers, "batch": getattr(args, f"{stage}_batch"), "steps": steps}
    opts = optimisers(modules, rates)
    parameters = [p for opt in opts for g in opt.param_groups for p in g["params"]]
    start, spent = 0, 0.0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        if saved["settings"] != settings:
            sys.exit(f"{file} was trained with {saved['settings']}, not {settings}; give the same, or another --out")
        for name, module in modules.items():
            module.load_state_dict(saved[name])
        start, spent = saved["step"], saved["seconds"]
        if start < steps:
            for opt, state in zip(opts, saved["optimisers"], strict=True):
                opt.load_state_dict(state)
    if args.rank == 0:
        forget_after(log, stage, start)
    columns = (TextColumn(stage), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[last]}"))
    bar = Progress(*columns, disable=args.rank > 0)
    began, seen = time.monotonic() - spent, []
    with bar:
        task = bar.add_task(stage, total=steps, completed=start, last="")
        for step in range(start, steps):
            rng = random.Random(f"{args.seed}/{stage}/{step}/{args.rank}")
            for group in (g for opt in opts for g in opt.param_groups):
                group["lr"] = group["peak"] * rate_at(step, steps, restart)
            with torch.autocast("cpu", torch.bfloat16):
                loss, right = loss_of(rng, step)
            for p in parameters:
                p.grad = None
            loss.backward()
            average_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for opt in opts:
                opt.step()
            bar.update(task, advance=1)
            if args.rank:
                continue
            seen.append({"loss": float(loss.detach())} | right)
            if (step + 1) % args.log_every == 0 or step + 1 == steps:
                mean = {k: round(float(np.mean([r[k] for r in seen if k in r])), 4) for k in sorted(seen[-1])}
                line = {"stage": stage, "step": step + 1, "seconds": round(time.monotonic() - began, 1)} | mean
                with log.open("a") as f:
                    f.write(json.dumps(line) + "\n")
                seen = []
                bar.update(task, last=" ".join(f"{k} {v:.3f}" for k, v in mean.items()))
            if (step + 1) % args.save_every == 0 or step + 1 == steps:
                whole: dict[str, Any] = {n: m.state_dict() for n, m in modules.items()}
                whole |= {"optimisers": [o.state_dict() for o in opts], "settings": settings}
                whole |= {"step": step + 1, "seconds": time.monotonic() - began}
                torch.save(whole, file.with_suffix(".tmp"))
                os.replace(file.with_suffix(".tmp"), file)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mini"), help="checkpoints and log (default runs/mini)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes, each with its own batches")
    parser.add_argument("--vision-batch", type=int, default=16, help="scenes a step and worker of stage vision")
    parser.add_argument("--vision-steps", type=int, default=3000)
    parser.add_argument("--language-batch", type=int, default=6, help="scenes a step and worker of stage language")
    parser.add_argument("--language-steps", type=int, default=8400)
    parser.add_argument("--comparison-batch", type=int, default=6, help="scenes a step and worker of stage comparison")
    parser.add_argument("--comparison-steps", type=int, default=1600)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=500)
    return parser.parse_args()


def main() -> None:
    """Run all stages, one worker a core: small batches on one thread each use the cores better than one process on all."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    NATIVE.conv(torch.zeros(1, 1, 32), torch.zeros(1, 32, 4), torch.zeros(32, 4), torch.zeros(32))  # compiles it once
    (args.out / "workers").unlink(missing_ok=True)
    if args.workers == 1:
        work(0, args)
    else:
        multiprocessing.spawn(work, (args,), nprocs=args.workers)


def work(rank: int, args: argparse.Namespace) -> None:
    """Run all stages as one of `args.workers`."""
    args.rank = rank
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    if args.workers > 1:
        meeting = args.out / "workers"
        distributed.init_process_group("gloo", init_method=f"file://{meeting.resolve()}", rank=rank, world_size=args.workers)
    if rank == 0:
        with (args.out / "log.jsonl").open("a") as f:
            f.write(json.dumps(machine() | {k: str(v) for k, v in vars(args).items() if k != "rank"}) + "\n")
    torch.manual_seed(args.seed)
    tower = VisionTower(VISION)
    heads = nn.ModuleList(nn.Linear(e.embed_dim, sum(HEAD_SIZES.values())) for e in VISION.encoders)
    eyes: dict[str, nn.Module] = {"tower": tower, "heads": heads}

    def see(rng: random.Random, _step: int) -> tuple[Tensor, dict[str, float]]:
        return vision_loss(tower, heads, [draw_scene(rng, "train") for _ in range(args.vision_batch)])

    train("vision", eyes, see, args, {"tower": 1.5e-3, "heads": 1.5e-3})

    tower.eval().requires_grad_(False)
    model, projector = Mamba(MAMBA, NATIVE), Projector("fused-gelu-mlp", VISION.feature_dim, MAMBA.d_model)
    initialise(model, projector, args.seed)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))

    def talk(lesson: Lesson, batch: int, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        count = batch * lesson.scenes_per_batch
        scenes = [draw_scene(rng, "train", lesson.most, lesson.least) for _ in range(count)]
        with torch.no_grad():
            features = tower(pixels_of(scenes))
        return language_loss(model, projector, features, tokenizer, scenes, rng, lesson.branches)

    voice: dict[str, nn.Module] = {"model": model, "projector": projector}

    def speak(rng: random.Random, step: int) -> tuple[Tensor, dict[str, float]]:
        return talk(lesson_at(step, args.language_steps), args.language_batch, rng)

    def compare(rng: random.Random, step: int) -> tuple[Tensor, dict[str, float]]:
        return talk(comparison_at(step, args.comparison_steps), args.comparison_batch, rng)

    # A projector as fast as the Mamba grows until nothing is heard beside its output, and the colours drown.
    train("language", voice, speak, args, {"model": 1e-3, "projector": 2e-4}, _RELATIONS)
    train("comparison", voice, compare, args, {"model": 6e-4, "projector": 1e-4})


if __name__ == "__main__":
    main()
