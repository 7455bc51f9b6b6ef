"""Fault injection: faults in builds of cobra-mini, each a mistake that an exporter or a runtime can make.

A fault is injected into a copy of a good build, and the regression harness runs on its golden lines. It is judged by the gates
that ship, as without a flag, and by cobra-mini's own budget.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cobra_edge.bundle.reader import Bundle
from cobra_edge.errors import CobraEdgeError
from cobra_edge.regress.budget import judge, read_budget
from cobra_edge.regress.gates import GATES as GATES_THAT_SHIP
from cobra_edge.regress.gates import gate_of
from cobra_edge.regress.measures import measure_named
from cobra_edge.regress.outputs.rows import all_figures
from cobra_edge.regress.report import Report, Verdict

from . import fault_kinds
from .fault_kinds import on_tensors
from .fault_result import FaultRow
from .mini_budget import BUDGET, GATES, export_gate, measured

_LAYER = "backbone.layers.{}.mixer."
_EMBEDDING = "backbone.embedding.weight"
_LAYERS = 4  # of cobra-mini


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: unique.
        description: what is broken.
        gate: the build that it is injected into, a name of `mini_budget.GATES`.
        expected: measures of which one should exceed its limit; empty if the harness should refuse the build.
        on_disk: breaks the directory of a bundle, at a random place.
        running: breaks the runtime inside a block.
        draws: how often it is injected, each time at another place.
    """

    name: str
    description: str
    gate: str
    expected: tuple[str, ...]
    on_disk: Callable[[Path, np.random.Generator], None] | None = None
    running: Callable[[], AbstractContextManager[None]] = nullcontext
    draws: int = 1


def _states(layer: int) -> tuple[str, ...]:
    """Return the measures that should show a fault in a layer: the errors of its state and of those of later layers.

    The output of a layer, its gate, and C first affect the state of the next layer.
    """
    return "state_error", *(f"state_error.{i}" for i in range(layer, _LAYERS))


def _one_scale(gate: str, kind: str, layer: int, draws: int = 6) -> Fault:
    name = _LAYER.format(layer) + f"{kind}.weight"
    # The output of out_proj first affects the state of the next layer.
    expected = _states(layer + 1) if kind == "out_proj" else _states(layer)
    return Fault(f"one scale, {kind}, {gate}", f"one scale of layer {layer}'s {kind} doubled", gate, expected,
                 on_tensors(fault_kinds.one_scale(name, 2)), draws=draws)  # fmt: skip


def _embedding_scale(gate: str) -> Fault:
    return Fault(f"one scale, embedding, {gate}", "one scale of the embedding doubled", gate, ("prompt_kld_mean", *_states(0)),
                 on_tensors(fault_kinds.one_scale(_EMBEDDING, 2)), draws=6)  # fmt: skip


def _on_tensors(
    name: str, description: str, expected: tuple[str, ...], change: fault_kinds.Change, gate: str = "w4a16-g128"
) -> Fault:
    return Fault(name, description, gate, expected, on_tensors(change))


def _pixels(name: str, description: str, change: Callable[[np.ndarray], np.ndarray], gate: str = "w4a16-g128") -> Fault:
    return Fault(name, description, gate, ("vision_error",), running=lambda: fault_kinds.pixels_changed(change))


def _halved(pixels: np.ndarray) -> np.ndarray:
    return pixels[:, ::2, ::2].repeat(2, 1).repeat(2, 2)


def _in_layer(kind: str, layer: int = 1) -> str:
    return _LAYER.format(layer) + kind


def _scaled(gate: str) -> Iterator[Fault]:
    """Yield faults of all scales of one matrix: a tenth too large, and doubled."""
    for kind in ("in_proj", "x_proj", "out_proj"):
        for layer in (0, 3):
            for times, words in ((1.1, "a tenth larger"), (2.0, "doubled")):
                name = f"scales {words}, {kind} {layer}, {gate}"
                expected = ("kld_mean",) if kind == "out_proj" and layer == _LAYERS - 1 else _states(layer)
                change = fault_kinds.all_scales(_in_layer(f"{kind}.weight", layer), times)
                yield _on_tensors(name, f"every scale of layer {layer}'s {kind} {words}", expected, change, gate)


def _parts(gate: str) -> Iterator[Fault]:
    """Yield faults of one row and one group of layer 2, of whole layers, and of the embedding."""
    name, states = _in_layer("in_proj.weight", 2), _states(2)
    rows, groups = fault_kinds.row_scales(name, 2), fault_kinds.group_scales(name, 2)
    yield Fault(f"row, {gate}", "scales of one row of layer 2's in_proj doubled", gate, states, on_tensors(rows), draws=3)
    yield Fault(f"group, {gate}", "scales of one group of layer 2's in_proj doubled", gate, states, on_tensors(groups), draws=3)
    yield Fault(f"sign, {gate}", "one group of layer 2's out_proj negated, as by a wrong rotation", gate, _states(3),
                on_tensors(fault_kinds.group_scales(_in_layer("out_proj.weight", 2), -1)), draws=3)  # fmt: skip
    swapped = fault_kinds.layers_swapped(1, 2)
    yield _on_tensors(f"whole layers, {gate}", "layers 1 and 2 swapped", _states(1), swapped, gate)
    rolled = fault_kinds.rows_rolled(_EMBEDDING)
    yield _on_tensors(
        f"stale embedding, {gate}", "every row of the embedding taken from its neighbour", _states(0), rolled, gate
    )
    not_a_number = fault_kinds.one_scale(_EMBEDDING, float("nan"))
    yield _on_tensors(f"NaN, {gate}", "one scale of the embedding is not a number", (), not_a_number, gate)


def _everywhere(gate: str) -> Iterator[Fault]:
    """Yield faults of text, images and kernels."""
    yield Fault(f"tokenizer, {gate}", "tokens of another tokenizer", gate, (), fault_kinds.tokens_swapped)
    yield Fault(f"end id, {gate}", "another token ends answers", gate, (), fault_kinds.other_end_token)
    yield Fault(f"graph, {gate}", "the graph of another export: its projector at 6 bits", gate, ("vision_error",),
                fault_kinds.graph_of_few_bits)  # fmt: skip
    yield _pixels(f"one pixel off, {gate}", "images resized from one pixel beside", lambda x: np.roll(x, 1, 1), gate)
    yield _pixels(f"too coarse, {gate}", "images resized through half their size", _halved, gate)
    yield Fault(f"cut, {gate}", "a kernel cuts its inputs to 8 bits and does not round", gate, _states(0),
                running=fault_kinds.products_cut)  # fmt: skip


_ANSWERS = ("greedy_match", "accuracy")
_BUILDS = ("w8a16-g128", "w4a16-g128", "mixed")
_TABLE = (
    *(fault for gate in _BUILDS for fault in _scaled(gate)),
    *(fault for gate in _BUILDS[:2] for fault in _parts(gate)),
    *(fault for gate in _BUILDS[:2] for fault in _everywhere(gate)),
    Fault("few images", "the decoder of an export that was calibrated on two images", "mixed", ("kld_mean",),
          fault_kinds.of_few_images),
    *(_one_scale(g, kind, 1) for g in ("w8a16-g128", "w4a16-g128") for kind in ("in_proj", "x_proj", "out_proj")),
    _embedding_scale("w8a16-g128"),
    _embedding_scale("w4a16-g128"),
    _on_tensors("all scales", "every scale of layer 1's out_proj doubled", _states(2),
                fault_kinds.all_scales(_in_layer("out_proj.weight"), 2)),
    _on_tensors("scales reversed", "scales of layer 1's in_proj in the wrong order", _states(1),
                fault_kinds.scales_reversed(_in_layer("in_proj.weight"))),
    _on_tensors("2 bits, of 4", "layer 1 at 2 bits", _states(1), fault_kinds.fewer_bits(1, 2)),
    _on_tensors("2 bits, of 8", "layer 1 at 2 bits", _states(1), fault_kinds.fewer_bits(1, 2), "w8a16-g128"),
    _on_tensors("4 bits, of 8", "layer 1 at 4 bits", _states(1), fault_kinds.fewer_bits(1, 4), "w8a16-g128"),
    _on_tensors("nibbles", "the codes of every byte of layer 1's in_proj swapped", _states(1),
                fault_kinds.nibbles_swapped(_in_layer("in_proj.weight"))),
    _on_tensors("codes off by one", "codes of layer 1's x_proj one too low", _states(1),
                fault_kinds.codes_off_by_one(_in_layer("x_proj.weight")), "w8a16-g128"),
    _on_tensors("layers swapped", "out_proj of layers 1 and 2 swapped", _states(2),
                fault_kinds.swapped(_in_layer("out_proj.weight"), _in_layer("out_proj.weight", 2))),
    _on_tensors("A_log", "A of layer 1 a tenth larger", _states(1), fault_kinds.shifted(_in_layer("A_log"), 0.0953)),
    _on_tensors("convolution's bias", "the convolution's bias of layer 1 dropped", _states(1),
                fault_kinds.zeroed(_in_layer("conv1d.bias"))),
    _on_tensors("D", "D of layer 3 dropped", ("kld_mean",), fault_kinds.zeroed(_in_layer("D", 3))),
    Fault("dt_proj row", "one row of layer 1's dt_proj doubled", "w4a16-g128", _states(1),
          on_tensors(fault_kinds.row_scales(_in_layer("dt_proj.weight"), 2)), draws=6),
    Fault("embedding row", "one row of the embedding zeroed", "w4a16-g128", ("prompt_kld_mean", *_states(0)),
          on_tensors(fault_kinds.row_zeroed(_EMBEDDING)), draws=6),
    Fault("infinite scale", "one scale of layer 1's in_proj infinite", "w4a16-g128", (),
          on_tensors(fault_kinds.one_scale(_in_layer("in_proj.weight"), float("inf")))),
    Fault("no rotation", "rotated matrices run without rotation", "mixed", _states(0), fault_kinds.no_rotation),
    Fault("clips", "activations clipped at 0.5", "w4a8", _states(0), fault_kinds.clips_at(0.5)),
    Fault("normalisation", "each encoder's images normalised with the other's mean and deviation", "w4a16-g128",
          ("vision_error",), fault_kinds.swapped_normalisations),
    _pixels("red and blue", "red and blue swapped", lambda pixels: pixels[..., ::-1]),
    _pixels("upside down", "images turned upside down", lambda pixels: pixels[:, ::-1]),
    _pixels("darker", "every byte of an image one too low", lambda pixels: np.maximum(pixels, 1) - 1),
    Fault("projector's bias", "the projector's last bias random", "w4a16-g128", ("vision_error",),
          fault_kinds.random_projector_bias),
    Fault("prompt style", "the template of the plain language model", "w4a16-g128", (), fault_kinds.other_prompt_style),
    Fault("end token", "answers do not end at the end token", "w4a16-g128", _ANSWERS, running=fault_kinds.no_end_token),
    Fault("image forgotten", "the state is reset between image and question", "w4a16-g128", ("kld_mean",),
          running=fault_kinds.image_forgotten),
    Fault("stale convolution", "a step keeps the convolution's old inputs", "w4a16-g128", _ANSWERS,
          running=fault_kinds.stale_convolution),
)  # fmt: skip
FAULTS = {fault.name: fault for fault in _TABLE}


@dataclass(frozen=True)
class Found:
    """The outcome of one injected fault.

    Attributes:
        exit_code: of `regress`.
        failed: measures that exceed cobra-mini's own budget.
        gates: those that failed of the gates that ship, without a flag.
        worst: the measure furthest beyond its limit, and how many times the limit's distance from the ideal; None without one.
        refused: message of a run that failed, or "".
    """

    exit_code: int
    failed: tuple[str, ...]
    gates: tuple[str, ...]
    worst: tuple[str, float] | None
    refused: str = ""


def inject(fault: Fault, good: Path, copy: Path, draw: int = 0) -> None:
    """Copy a good build and inject a fault into the copy."""
    shutil.copytree(good, copy)
    if fault.on_disk is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            fault.on_disk(copy, np.random.default_rng([draw, len(fault.name)]))


def run_trial(fault: Fault, good: Path, draw: int = 0) -> Found:
    """Inject a fault, measure, and judge by the gates that ship and by cobra-mini's own budget."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "broken"
        inject(fault, good, copy, draw)
        with fault.running(), np.errstate(all="ignore"):
            try:
                report = measured(copy, threads=1, budget=read_budget()).report
            except CobraEdgeError as error:
                return Found(error.exit_code, (), (), None, str(error))
        failed = [v for v in verdicts_of(report, copy, BUDGET) if not v.within]
    gates = tuple(name for name in GATES_THAT_SHIP if any(gate_of(v) == name for v in report.verdicts if not v.within))
    worst = max(((v.measure, _times(v)) for v in failed), key=lambda pair: pair[1], default=None)
    return Found(int(bool(failed)), _names(failed), gates, worst)


def verdicts_of(report: Report, bundle: Path, budget: Path | None) -> tuple[Verdict, ...]:
    """Judge the report of a bundle by a budget; None for the shipped one."""
    manifest, precision = Bundle.open(bundle).manifest, report.build.vision_precision
    limits = read_budget(budget).limits_of(manifest.recipe.scheme, precision, manifest.target)  # type: ignore[arg-type]
    return judge(all_figures(report), limits, manifest.noise_floor)


def _names(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(v.measure for v in verdicts))


def _times(verdict: Verdict) -> float:
    """Return the distance of the judged value from the ideal, over that of the limit."""
    ideal = measure_named(verdict.measure).ideal
    assert verdict.judged is not None and verdict.limit is not None
    return abs(verdict.judged - ideal) / max(abs(verdict.limit - ideal), 1e-300)


def run_trials(
    folder: Path, faults: Sequence[Fault], on_draw: Callable[[str, int, int], None] = lambda name, done, total: None
) -> Iterator[FaultRow]:
    """Yield a row for each fault.

    Args:
        folder: for good builds; existing ones are reused.
        faults: to inject.
        on_draw: called with the name, the number of finished draws, and the total.
    """
    for fault in faults:
        good, found = folder / fault.gate, list[Found]()
        if not good.exists():
            export_gate(GATES[fault.gate], folder)
        for draw in range(fault.draws):
            on_draw(fault.name, draw, fault.draws)
            found.append(run_trial(fault, good, draw))
        yield _row(fault, found)


def _row(fault: Fault, found: Sequence[Found]) -> FaultRow:
    worst = Counter(f.worst[0] for f in found if f.worst)
    often = worst.most_common(1)[0][0] if worst else None
    return FaultRow(
        name=fault.name,
        description=fault.description,
        build=fault.gate,
        draws=len(found),
        caught=sum(f.exit_code != 0 for f in found),
        caught_by_shipped=sum(bool(f.gates or f.refused) for f in found),
        gates=dict(Counter(name for f in found for name in f.gates)),
        expected=fault.expected,
        expected_failed=sum(bool(set(f.failed) & set(fault.expected)) for f in found),
        exit_codes=tuple(f.exit_code for f in found),
        failed=dict(Counter(name for f in found for name in f.failed)),
        worst=often,
        worst_times=max((f.worst[1] for f in found if f.worst and f.worst[0] == often), default=None),
        refused=next((f.refused for f in found if f.refused), ""),
    )
