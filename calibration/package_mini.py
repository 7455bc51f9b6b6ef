"""Package the trained cobra-mini as a Cobra run directory with float16 safetensors.

The log of the run is copied to docs/mini-training.jsonl.

python -m calibration.package_mini [--run runs/mini]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cobra_edge.formats.model_config import VisionConfig
from cobra_edge.model.vision import encoder_file

from .train_language import MAMBA
from .train_vision import VISION

ROOT = Path(__file__).parent.parent
MINI = ROOT / "cobra_edge" / "mini"
CONFIG = {
    "model": {
        "model_id": "cobra-mini",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": VISION.backbone_id,
        "llm_backbone_id": "mamba-mini-zephyr",
        "image_resize_strategy": "resize-naive",
        "llm_max_length": 1024,
    }
}


def package(run: Path, goal: Path) -> int:
    """Write config, decoder, projector and encoders of a training run to `goal`; returns the bytes written."""
    vision = torch.load(run / "vision.pt", weights_only=True)
    return write_run_directory(goal, CONFIG, VISION, vision["tower"], run / "language.pt")


def write_run_directory(
    goal: Path, config: dict[str, Any], vision: VisionConfig, tower: Mapping[str, Tensor], language: Path
) -> int:
    """Write a run directory as `open_checkpoint` takes it, without tokenizer, in float16; returns the bytes written.

    Args:
        goal: the directory; created if missing.
        config: contents of config.json.
        vision: the encoders.
        tower: state of their `VisionTower`.
        language: what stage language saved.
    """
    trained = torch.load(language, weights_only=True)
    decoder = {f"llm_backbone.llm.{k}": v for k, v in trained["model"].items()}
    assert MAMBA.tied
    decoder.pop("llm_backbone.llm.lm_head.weight")
    projector = {f"projector.{k}": v for k, v in trained["projector"].items()}
    files = {"checkpoints/latest-checkpoint.safetensors": decoder | projector}
    for index in range(len(vision.encoders)):
        prefix = f"encoders.{index}.vit."
        weights = {k.removeprefix(prefix): v for k, v in tower.items() if k.startswith(prefix)}
        files[f"vision/{encoder_file(vision, index)}"] = weights
    total = 0
    for name, tensors in files.items():
        (goal / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in tensors.items()}, goal / name)
        total += (goal / name).stat().st_size
    (goal / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return total


def main() -> None:
    """Package a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/mini"))
    run = parser.parse_args().run
    print(f"{package(run, MINI) / 1e6:.2f} MB")
    shutil.copyfile(run / "log.jsonl", ROOT / "docs" / "mini-training.jsonl")


if __name__ == "__main__":
    main()
