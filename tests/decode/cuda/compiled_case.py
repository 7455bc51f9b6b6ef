"""Kernels to compile for GPUs that are not here, and a child process that does: interpreted ones cannot be compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from cobra_edge.decode.cuda.kernels.compiling import compile_launches, why_not
from cobra_edge.decode.cuda.kernels.launch import launch, recording


@triton.jit(do_not_specialize=["n"])
def total(x, y, n, stride, BLOCK: tl.constexpr):
    """Store, for each of n values, itself and the sum of its block."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * stride, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y + i, value + tl.sum(value), mask=i < n)


@triton.jit
def greedy(x, y, SIZE: tl.constexpr):
    """Hold more than registers can, and turn a whole tile over in shared memory."""
    i, j = tl.arange(0, SIZE), tl.arange(0, 2 * SIZE)
    tile = tl.load(x + i[:, None] * 2 * SIZE + j[None, :])
    tl.store(y + j[:, None] * SIZE + i[None, :], tl.trans(tile))


@triton.jit
def staged(x, y, n, TILE: tl.constexpr):
    """Have several tiles on their way into shared memory while one is multiplied."""
    i = tl.arange(0, TILE)
    total = tl.zeros([TILE, TILE], dtype=tl.float32)
    for start in range(0, n, TILE):
        left = tl.load(x + i[:, None] * n + start + i[None, :])
        right = tl.load(y + (start + i)[:, None] * TILE + i[None, :])
        total = tl.dot(left, right, total)
    tl.store(x + i[:, None] * n + i[None, :], total.to(tl.float16))


def record(case: str) -> list[Any]:
    """Return the launches of a case."""
    x = torch.empty(256, 64, dtype=torch.float16, device="meta")
    y = torch.empty(256, 256, dtype=torch.float32, device="meta")
    with recording() as launches:
        if case == "total":
            for n in (7, 16, 63):
                launch(total, (3,), x, y, n, 1, BLOCK=128, num_warps=4)
            launch(total, (3,), x, y, 7, 1, BLOCK=256, num_warps=4)
            launch(total, (3,), x, y, 7, 3, BLOCK=128, num_warps=4)
            launch(total, (3,), x.view(-1)[1:], y, 7, 1, BLOCK=128, num_warps=4)
            launch(total, (3,), y, y, 7, 1, BLOCK=128, num_warps=8)
        elif case == "greedy":
            launch(greedy, (1,), y, y, SIZE=128, num_warps=2)
            launch(staged, (1,), x, x, 4096, TILE=64, num_warps=4, num_stages=8)
        else:
            launch(total, (3,), x, y, 7, 1, BLOCK=100, num_warps=4)
    return launches


def compiled_by_a_child(case: str, *capabilities: str) -> list[dict[str, Any]]:
    """Compile a case without an interpreter in the way; returns rows as dictionaries, with `why_not`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.decode.cuda.compiled_case", case, *capabilities]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    rows = [row for capability in sys.argv[2:] for row in compile_launches(record(sys.argv[1]), capability)]
    print(json.dumps([asdict(row) | {"why_not": why_not(row)} for row in rows]))
