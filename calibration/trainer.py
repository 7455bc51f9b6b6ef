"""The loop that every stage of training runs: optimisers, rates, workers, a log, and saves to resume from."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import distributed, nn


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


def rate_at(step: int, steps: int, warmup: int = 150) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
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
                group["lr"] = group["peak"] * rate_at(step, steps)
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
                mean = {
                    k: round(float(np.mean([r[k] for r in seen if k in r])), 4) for k in sorted({k for r in seen for k in r})
                }
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
