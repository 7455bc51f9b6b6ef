"""Draw the embedded suites: held-out questions, the calibration set, and the image of the demo.

    python -m calibration.make_suites

No training run can draw their scenes (see `Scene.split`). Answers are balanced: of the questions a scene allows, the one whose
answer is rarest so far is taken.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from cobra_edge.suite.line import Line

from .questions import TASKS, draw_question
from .scenes import Scene, Split, draw_scene, render

MINI = Path(__file__).parent.parent / "cobra_edge" / "mini"
SCENES = {"heldout": 130, "calibration": 200}
# Scenes of calibration.jsonl; the others are in calibration-more.jsonl. Plain statistics hardly gain by more than these, and
# cost in proportion (docs/log.md).
FEW = 40
_DRAWS = 24


def rarest(rng: random.Random, scene: Scene, task: str, seen: Counter[tuple[str, str]]) -> Line | None:
    """Return the question of a task whose answer is rarest among `seen`."""
    drawn = [q for _ in range(_DRAWS) if (q := draw_question(rng, scene, task))]
    return min(drawn, key=lambda q: seen[task, q.answer], default=None)


def draw_suite(split: Split, seed: int) -> tuple[list[Scene], list[tuple[int, Line]]]:
    """Return the scenes of a split and (scene index, question) for up to one question per task and scene."""
    rng, seen = random.Random(f"{split}/{seed}"), Counter[tuple[str, str]]()
    scenes: list[Scene] = []
    lines: list[tuple[int, Line]] = []
    while len(scenes) < SCENES[split]:
        scene = draw_scene(rng, split)
        if len(scene.things) < 2:
            continue
        for task in TASKS:
            question = rarest(rng, scene, task, seen)
            if question is not None:
                seen[task, question.answer] += task != "caption"
                lines.append((len(scenes), question))
        scenes.append(scene)
    return scenes, lines


def write_suite(split: Split, goal: Path, seed: int = 0) -> dict[str, int]:
    """Write `<split>.jsonl` and its images under `goal`, calibration in two parts; returns the number of lines of each."""
    scenes, lines = draw_suite(split, seed)
    parts: dict[str, range] = {split: range(len(scenes))}
    if split == "calibration":
        parts = {split: range(FEW), f"{split}-more": range(FEW, len(scenes))}
    for part, indices in parts.items():
        images = goal / part
        images.mkdir(parents=True, exist_ok=True)
        for index in indices:
            render(scenes[index]).save(images / f"{index:03d}.png", optimize=True)
        with (goal / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for index, q in lines:
                if index in indices:
                    row = {"image": f"{part}/{index:03d}.png", "prompt": q.prompt, "answer": q.answer, "task": q.task}
                    file.write(json.dumps(row) + "\n")
    return {part: sum(index in indices for index, _ in lines) for part, indices in parts.items()}


def demo_scene() -> Scene:
    """Return the held-out scene of the demo: one with four objects, from a seed of its own."""
    rng = random.Random("demo")
    while True:
        scene = draw_scene(rng, "heldout")
        if len(scene.things) == 4:
            return scene


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MINI)
    out = parser.parse_args().out
    for split in ("heldout", "calibration"):
        for part, count in write_suite(split, out).items():
            print(f"{part}: {count} lines")
    render(demo_scene()).save(out / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
