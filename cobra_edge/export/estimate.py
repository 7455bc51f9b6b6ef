"""How long an export takes on this machine, told before it begins.

One layer is run on some positions and one matrix product is timed, in float32 and as calibration does it; what each quality
does is counted in these. The factors are from exports at full size and from layers of its width (docs/log.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from ..formats.method import Method, recipe_method
from ..formats.model_config import CobraConfig, MambaConfig
from ..formats.quality import QUALITIES
from ..suite.line_set import LineSet
from ..terminal.output import duration
from .lines import affordable, tokenized_lines
from .vision import calibration_images

if TYPE_CHECKING:
    from .plan import ExportPlan

_SAMPLED_POSITIONS = 512
_SAMPLED_SECONDS = 0.1
_BATCHING = 2e-5  # seconds that a position takes in a layer of what does not grow with it: short lines come in small batches
_STARTING = 10.0  # seconds of what does not grow with the model
_STREAMED = 2.0  # a position in a pass over lines: streams are read and written, lengths differ, memory is touched first
_BACKWARD = 0.8  # of a layer's forward pass: gradients of inputs alone
_REFERENCE = 5.0  # quick passes that the reference takes of a golden line: in plain torch and float32, and in bfloat16
_ROUNDING = 4.8e3  # floating-point operations that the scale and the codes of a weight take as long as
_LOADING = 52  # the same for a weight that is read for a token
_COST_SCHEMES = 4  # that the cost of a matrix is estimated in
_GROUPS, _SWEEPS = 4, 2  # of guided quantization


@dataclass(frozen=True)
class Rates:
    """Of this machine: seconds that a position takes in a layer of the float model, and FLOP/s of large products.

    Attributes:
        position_seconds: with its tensors in memory.
        flops: of products whose inputs may be rounded to bfloat16 (`quick_products`).
        exact_flops: of float32 products.
    """

    position_seconds: float
    flops: float
    exact_flops: float


@dataclass(frozen=True)
class Load:
    """Positions of the decoder and images of some lines, and how many of them the float model has to answer."""

    positions: int
    images: int
    unanswered: int = 0


def estimates(checkpoint: Any, plan: ExportPlan) -> dict[str, float]:
    """Return the estimated seconds of a planned export, by each quality; by its method alone if a flag chose that."""
    config, rates = checkpoint.config, measured_rates(checkpoint)
    golden, own = _load(plan.golden, plan, config), plan.choice.method
    quantizes_vision = plan.precision == "int8" and config.vision is not None
    int8 = len(calibration_images(plan.calibration or LineSet.embedded(), config)) if quantizes_vision else 0

    def of(name: str) -> float:
        method = recipe_method(name)
        data = plan.calibration or LineSet.embedded(more=method.needs_gradients)
        read = _load(affordable(data, config, gradients=method.needs_gradients, quiet=True), plan, config)
        return seconds_of(method, config, read, golden, rates, int8)

    return {own: of(own)} if plan.choice.quality is None else {q.name: of(q.method) for q in QUALITIES.values()}


def time_line(found: dict[str, float], quality: str | None) -> str:
    """Return estimates for people; `quality` is the one that was chosen."""
    told = ", ".join(f"{name} about {duration(seconds)}" for name, seconds in found.items())
    return f"time on this machine: {told}" + ("" if quality is None else f"; this is --quality {quality}")


def seconds_of(
    method: Method, config: CobraConfig, calibration: Load, golden: Load, rates: Rates, int8_images: int = 0
) -> float:
    """Return the time of an export in seconds.

    Args:
        method: of quantization.
        config: of the model.
        calibration: what statistics or gradients are collected on.
        golden: what drift is measured on.
        rates: of this machine.
        int8_images: what int8 vision is calibrated on.
    """
    from ..regress.noise_floor import floor_precisions

    mamba = config.mamba
    position = _STREAMED * rates.position_seconds + _BATCHING
    layer = calibration.positions * position
    passes = golden.positions * position * _REFERENCE
    images = (
        2 + len(floor_precisions(config))
    ) * golden.images + 2 * int8_images  # golden ones in 16 bits too, and by the graph
    quick, exact = 0.0, _ROUNDING * mamba.n_parameters / mamba.n_layer
    if method.needs_gradients:
        passes += layer * (1 + 1 + _BACKWARD + 2)  # forward, again with gradients, and the two models side by side
        quick += calibration.positions * (_moments(mamba, 1) + _moments(mamba, _GROUPS))
        exact += _solving(mamba, _GROUPS, _SWEEPS) + _costing(mamba)
    elif method.needs_statistics:
        passes += layer
        exact += calibration.positions * _moments(mamba, 1) + _solving(mamba, 1, 0)
    answered = golden
    if method.needs_gradients or method.needs_statistics:
        images += calibration.images
        answered = Load(*(a + b for a, b in zip(astuple(golden), astuple(calibration), strict=True)))
    if answered.unanswered:
        from ..quantize.own_answers import LONGEST_ANSWER

        passes += (answered.positions + LONGEST_ANSWER * answered.unanswered) * position
        exact += LONGEST_ANSWER * _LOADING * mamba.n_parameters / mamba.n_layer
    seconds = _STARTING + mamba.n_layer * (passes + quick / rates.flops + exact / rates.exact_flops)
    return seconds + (images * _tower_flops(config) / rates.exact_flops if images else 0.0)


def measured_rates(checkpoint: Any) -> Rates:
    """Measure the rates of this machine with the first layer of a checkpoint."""
    import torch

    from ..decode.native_operations import best_operations
    from ..model.cobra import load_block
    from ..quantize.streams import quick_products

    config = checkpoint.config.mamba
    block, width = load_block(checkpoint, 0, best_operations()), config.d_model
    stream = torch.zeros(1, _SAMPLED_POSITIONS, width).normal_(generator=torch.Generator().manual_seed(0))
    states = [torch.zeros(1, config.d_inner, n) for n in (config.d_conv, config.d_state)]
    weight = torch.ones(2 * config.d_inner, width)
    operations = 2.0 * _SAMPLED_POSITIONS * weight.numel()
    with torch.inference_mode():
        exact = operations / _fastest(lambda: stream[0] @ weight.T)
        with quick_products():
            position = _fastest(lambda: block(stream, *states)) / _SAMPLED_POSITIONS
            return Rates(position, operations / _fastest(lambda: stream[0] @ weight.T), exact)


def _fastest(run: Callable[[], Any]) -> float:
    """Return the least time of a call in seconds, of at least two."""
    found, began = list[float](), time.perf_counter()
    while len(found) < 2 or time.perf_counter() - began < _SAMPLED_SECONDS:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def _load(lines: LineSet, plan: ExportPlan, config: CobraConfig) -> Load:
    suite = tokenized_lines(lines, plan.codec, config, answered=False)
    images = len(suite.images)
    positions = images * config.n_visual_tokens + sum(len(line.tokens) for line in suite.lines)
    return Load(positions, images, sum(not line.line.answer for line in suite.lines))


def _moments(config: MambaConfig, groups: int) -> float:
    """Return the operations of a position's second moments: of the inputs of in_proj, x_proj and out_proj."""
    return groups * config.d_model**2 + (1 + groups) * config.d_inner**2


def _solving(config: MambaConfig, groups: int, sweeps: int) -> float:
    """Return the operations of GPTQ of a layer: factorizations in float64, rounding by columns and descent."""
    inputs = ((config.d_model, 2 * config.d_inner, groups), (config.d_inner, config.d_model, groups), (config.d_inner, 0, 1))
    return sum(2 * n * width**3 + (2 + 4 * sweeps) * rows * width**2 for width, rows, n in inputs)


def _costing(config: MambaConfig) -> float:
    """Return the operations of a layer's expected costs: of three matrices a factorization, and rounding in each scheme."""
    from ..quantize.costs import ROWS_LOOKED_AT

    widths = config.d_model, config.d_inner, config.d_inner
    return sum(2.0 * width**3 + _ROUNDING * _COST_SCHEMES * ROWS_LOOKED_AT * width for width in widths)


def _tower_flops(config: CobraConfig) -> int:
    from ..model.tower_flops import tower_flops

    return 0 if config.vision is None else tower_flops(config)
