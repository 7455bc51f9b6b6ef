"""Reports as a run makes them, without a run."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import msgspec
from PIL import Image, ImageDraw

from cobra_edge.regress import report as r

HOSTILE = (
    "<script>alert(1)</script> | [red]@octocat[/red] `x` $y$ #1 \x1b[31m\x00\ud7ff\u202e\nwww.example.com *b* _i_ {{ 7*7 }} ]]>"
)


def figure(value: float, spread: float = 0.1) -> r.Figure:
    return r.Figure(value, value - abs(value) * spread, value + abs(value) * spread)


_MEASURES = {
    "kld_mean": figure(0.0123),
    "kld_median": figure(0.0041),
    "kld_p90": figure(0.03),
    "kld_p99": figure(0.21),
    "kld_max": figure(1.4),
    "prompt_kld_mean": figure(0.02),
    "top1_agreement": r.Figure(0.981, 0.974, 0.987),
    "right_change_mean": r.Figure(-1.2e-3, -3e-3, 6e-4),
    "right_change_rms": figure(0.02),
    "perplexity": figure(1.21, 0.02),
    "perplexity_ratio": r.Figure(1.004, 0.999, 1.009),
    "state_error": figure(0.034),
    "vision_error": figure(0.0052),
    "greedy_match": r.Figure(0.93, 0.90, 0.96),
    "length_ratio": r.Figure(1.01, 0.99, 1.03),
    "accuracy": r.Figure(0.88, 0.84, 0.91),
    "accuracy_change": r.Figure(-0.01, -0.03, 0.005),
}


def make_report(**changes: Any) -> r.Report:
    """Return a report of every section; `changes` replace its fields."""
    rng = random.Random(0)
    tasks = ("caption", "color", "count", "exist", "position", "shape")
    full = r.Report(
        schema_version=r.REPORT_VERSION,
        cobra_edge="0.1.0",
        commit="0123456789abcdef0123456789abcdef01234567",
        build=r.Build(
            "cobra-mini-x86-cpu-w4a16-g128", "f" * 64, "cobra-mini", "mini", "a" * 64, "x86-cpu", "w4a16-g128", "gptq",
            ("residual",), "int8", 4.37, 3_210_000,
        ),
        runtime=r.Runtime("native, AVX2", "onnxruntime CPU", "float32", 4, "cpu", "Intel Xeon, 2 cores"),
        baseline=r.Baseline("checkpoint", "mini", "torch, float32", 64, 0.0031, 0.4, 512),
        suite=r.Suite("heldout", "b" * 64, 240, 60, 1310, 4020, {17: "the image is missing", 31: "no answer"}),
        measures=_MEASURES,
        not_taken={"prompt_kld_p99": "the baseline keeps no question tokens"},
        noise_floor={"fp16": {"kld_mean": 2.1e-6, "top1_agreement": 0.9995}, "bf16": {"kld_mean": 1.4e-4}},
        tasks=tuple(
            r.TaskFigures(
                t, "exact", 40, figure(0.7 + 0.04 * i, 0.05), 0.72 + 0.04 * i, r.Figure(-0.02, -0.05, 0.01),
                figure(0.004 * (i + 1), 0.3), r.Figure(0.95, 0.9, 0.98), {"f1": 0.8}, {"f1": 0.82},
            )
            for i, t in enumerate(tasks)
        ),
        positions=tuple(r.PositionFigures(at, 60, 0.02 * rng.random() / (1 + abs(at)) + 1e-4) for at in range(-20, 12)),
        layers=tuple(r.LayerFigures(i, figure(0.004 * 1.25**i)) for i in range(12)),
        worst=tuple(worst_line(i) for i in range(12)),
        attribution=r.Attribution(
            24,
            (
                r.Part("vision tower", 0.0021, 0.996, "by onnxruntime"),
                r.Part("projector", 0.0004, 0.999, "by onnxruntime"), r.Part("decoder", 0.0102, 0.984),
                r.Part("together", 0.0123, 0.981), r.Part("head", None, None, "the head is tied to the embedding"),
            ),
            tuple(r.Part(f"layer {i}", 0.006 / (i + 1), 0.99) for i in range(12)),
            tuple(r.Part(f"backbone.layers.{i}.mixer.in_proj.weight", 0.003 / (i + 1), 0.99) for i in range(30)),
        ),
        budget="default.toml",
        verdicts=(
            r.Verdict("kld_mean", "max", 0.02, 0.01353, True),
            r.Verdict("kld_mean", "max_times_floor", 0.005, 0.01353, False, "40 times the floor in fp16"),
            r.Verdict("top1_agreement", "min", 0.97, 0.974, True),
            r.Verdict("accuracy.color", "min", 0.65, 0.703, True),
            r.Verdict("prompt_kld_p99", "max", 0.5, None, False, "the baseline keeps no question tokens"),
        ),
        passed=False,
        times=r.Times("2026-03-01T12:00:00Z", 61.5, 3.9),
    )  # fmt: skip
    return msgspec.structs.replace(full, **changes)


def worst_line(i: int, **changes: Any) -> r.WorstLine:
    said = "The image shows a small red circle above a large blue square."
    line = r.WorstLine(
        i + 3, "caption", f"scene-{i:04d}.png", "What is in the image?", said, said,
        said if i == 4 else said.replace("red", "green"), 0.9 / (i + 1), 2.1 / (i + 1), None if i == 4 else 6,
    )  # fmt: skip
    return msgspec.structs.replace(line, **changes)


def held_report(**changes: Any) -> r.Report:
    verdicts = (r.Verdict("kld_mean", "max", 0.02, 0.01353, True), r.Verdict("top1_agreement", "min", 0.97, 0.974, True))
    return make_report(**{"verdicts": verdicts, "passed": True, **changes})


def bare_report(**changes: Any) -> r.Report:
    """Return a report of a text-only model of which next to nothing could be taken."""
    build = msgspec.structs.replace(make_report().build, vision_precision=None, rotations=())
    runtime = msgspec.structs.replace(make_report().runtime, vision=None, threads=None)
    nothing = {
        "commit": None, "build": build, "runtime": runtime, "not_taken": {"kld_mean": "logits are not finite"},
        "measures": {"kld_mean": r.Figure(None), "kld_max": r.Figure(2.5)}, "noise_floor": {}, "tasks": (), "positions": (),
        "layers": (r.LayerFigures(0, r.Figure(None)),), "worst": (), "attribution": None, "budget": None, "verdicts": (),
        "passed": True,
    }  # fmt: skip
    return make_report(**{**nothing, **changes})


def hostile_report() -> r.Report:
    """Return a report in which every text is hostile, and a reply is giant."""
    report = _texts_replaced(make_report(), lambda text: HOSTILE)
    giant = worst_line(0, prompt=HOSTILE, reply="word " * 200_000, reference_reply="word " * 100_000 + HOSTILE, task=HOSTILE)
    return msgspec.structs.replace(report, worst=(giant, *report.worst), not_taken={"kld_p99": HOSTILE, HOSTILE: HOSTILE})


def _texts_replaced(value: Any, hostile: Callable[[str], str]) -> Any:
    """Return a struct with every text replaced but names of measures and rules."""
    if isinstance(value, msgspec.Struct):
        kept = ("measure", "rule", "began")
        fields = {f: getattr(value, f) for f in value.__struct_fields__}
        changed = {f: v if f in kept else _texts_replaced(v, hostile) for f, v in fields.items()}
        return msgspec.structs.replace(value, **changed)
    if isinstance(value, str):
        return hostile(value)
    if isinstance(value, tuple):
        return tuple(_texts_replaced(item, hostile) for item in value)
    if isinstance(value, dict):
        return {name: _texts_replaced(item, hostile) for name, item in value.items()}
    return value


def image(side: int = 112, kind: str = "PNG", noisy: bool = False) -> bytes:
    drawn = Image.effect_noise((side, side), 90).convert("RGB") if noisy else Image.new("RGB", (side, side), "#e8e4da")
    draw = ImageDraw.Draw(drawn)
    draw.ellipse((side * 0.2, side * 0.1, side * 0.45, side * 0.35), "#c0322b")
    draw.rectangle((side * 0.4, side * 0.5, side * 0.85, side * 0.95), "#2b58c0")
    stream = io.BytesIO()
    drawn.save(stream, kind)
    return stream.getvalue()


def images(count: int = 12, **of: Any) -> dict[str, bytes]:
    return {f"scene-{i:04d}.png": image(**of) for i in range(count)}
