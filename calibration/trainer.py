"""Training loop of all stages: optimisers, learning rates, workers, log, and save files to resume from."""

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

# Parameters of Muon: the Mamba's wide projections.
_BY_MUON = [[kind, "weight"] for kind in ("in_proj", "x_proj", "out_proj")]


def optimisers(modules: dict[str, nn.Module], rates: dict[str, float]) -> list[torch.optim.Optimizer]:
    """Return Muon for the Mamba's projections and AdamW for the rest, each module with its own learning rate.

    Weight decay applies to matrices only, not to A_log and D. Muon's updates are scaled to the size of AdamW's, so that
    learning rates are comparable (Jordan 2024; Liu et al. 2025, section 2.2).
    """
    projections, groups = [], []
    for name, module in modules.items():
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        muon = {n for n, _ in named if n.rsplit(".", 2)[-2:] in _BY_MUON}
        if muon:
            matrices = [p for n, p in named if n in muon]
            projections += [{"params": matrices, "lr": rates[name], "peak": rates[name]}]
        named = [(n, p) for n, p in named if n not in muon]
        decayed = [p for n, p in named if p.ndim >= 2 and "A_log" not in n]
        rest = [p for n, p in named if p.ndim < 2 or "A_log" in n]
        groups += [{"params": decayed, "weight_decay": 0.05, "peak": rates[name]}]
        groups += [{"params": rest, "weight_decay": 0.0, "peak": rates[name]}]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=(0.9, 0.98))]
    if projections:
        found.append(torch.optim.Muon(projections, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    return found


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over all workers; a missing gradient counts as zero."""
    if not distributed.is_initialized():
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = g.view_as(p)


def rate_at(step: int, steps: int, warmup: int = 150) -> float:
    """Return the share of the peak rate: linear warm-up, then a cosine to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def drop_log_after(log: Path, stage: str, step: int) -> None:
    """Remove log lines of steps after the last save, which will be repeated."""
    if log.exists():
        lines = [json.loads(text) for text in log.read_text().splitlines() if text.endswith("}")]  # the last may be cut
        kept = [line for line in lines if line.get("stage") != stage or line["step"] <= step]
        log.write_text("".join(json.dumps(line) + "\n" for line in kept))


class Run:
    """One stage of a training run: its modules, optimisers, save file and log."""

    def __init__(self, stage: str, modules: dict[str, nn.Module], args: argparse.Namespace, rates: dict[str, float]) -> None:
        """Set up the stage, and resume from its save file if there is one."""
        self.stage, self.modules, self.args = stage, modules, args
        self.file, self.log = args.out / f"{stage}.pt", args.out / "log.jsonl"
        self.steps = getattr(args, f"{stage}_steps")
        batch = getattr(args, f"{stage}_batch")
        self.settings = {"seed": args.seed, "workers": args.workers, "batch": batch, "steps": self.steps}
        self.optimisers = optimisers(modules, rates)
        self.parameters = [p for opt in self.optimisers for g in opt.param_groups for p in g["params"]]
        self.start, seconds = self._resume() if self.file.exists() else (0, 0.0)
        self.began = time.monotonic() - seconds
        self.measures: list[dict[str, float]] = []  # of the steps since the last log line
        if args.rank == 0:
            drop_log_after(self.log, stage, self.start)

    def _resume(self) -> tuple[int, float]:
        """Load the save file; returns the steps done and the seconds spent."""
        saved = torch.load(self.file, weights_only=True)
        if saved["settings"] != self.settings:
            sys.exit(f"{self.file} was trained with {saved['settings']}, not {self.settings}; give the same, or another --out")
        for name, module in self.modules.items():
            module.load_state_dict(saved[name])
        if saved["step"] < self.steps:
            for opt, state in zip(self.optimisers, saved["optimisers"], strict=True):
                opt.load_state_dict(state)
        return saved["step"], saved["seconds"]

    def take_step(self, step: int, loss_of: Any) -> None:
        """Draw a batch, and update the parameters."""
        rng = random.Random(f"{self.args.seed}/{self.stage}/{step}/{self.args.rank}")
        for group in (g for opt in self.optimisers for g in opt.param_groups):
            group["lr"] = group["peak"] * rate_at(step, self.steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = loss_of(rng, step)
        for p in self.parameters:
            p.grad = None
        loss.backward()
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for opt in self.optimisers:
            opt.step()
        if self.args.rank == 0:
            self.measures.append({"loss": float(loss.detach())} | right)

    def write_log(self, step: int) -> dict[str, float]:
        """Append the means since the last log line; returns them."""
        names = sorted({k for m in self.measures for k in m})
        mean = {k: round(float(np.mean([m[k] for m in self.measures if k in m])), 4) for k in names}
        line = {"stage": self.stage, "step": step + 1, "seconds": round(time.monotonic() - self.began, 1)} | mean
        with self.log.open("a") as f:
            f.write(json.dumps(line) + "\n")
        self.measures = []
        return mean

    def save(self, step: int) -> None:
        """Write the save file, and rename it when it is complete."""
        state: dict[str, Any] = {n: m.state_dict() for n, m in self.modules.items()}
        state |= {"optimisers": [o.state_dict() for o in self.optimisers], "settings": self.settings}
        state |= {"step": step + 1, "seconds": time.monotonic() - self.began}
        torch.save(state, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)


def train(stage: str, modules: dict[str, nn.Module], loss_of: Any, args: argparse.Namespace, rates: dict[str, float]) -> None:
    """Train modules for `args.STAGE_steps` steps, resuming from and saving to `args.out/STAGE.pt`, logging to log.jsonl.

    Args:
        stage: "vision" or "language".
        modules: by their names in the save file.
        loss_of: takes a random generator and the step; returns the loss, a scalar tensor, and accuracies by name.
        args: command line of `train_mini`, and the worker's rank.
        rates: peak learning rate by module.
    """
    run = Run(stage, modules, args, rates)
    columns = (TextColumn(stage), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[last]}"))
    with Progress(*columns, disable=args.rank > 0) as bar:
        task = bar.add_task(stage, total=run.steps, completed=run.start, last="")
        for step in range(run.start, run.steps):
            run.take_step(step, loss_of)
            bar.update(task, advance=1)
            if args.rank:
                continue
            last = step + 1 == run.steps
            if last or (step + 1) % args.log_every == 0:
                bar.update(task, last=" ".join(f"{k} {v:.3f}" for k, v in run.write_log(step).items()))
            if last or (step + 1) % args.save_every == 0:
                run.save(step)
