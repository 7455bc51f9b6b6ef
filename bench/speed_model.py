"""A model of decoding speed on GPUs that were not measured.

seconds per token = bytes moved per token / (the data sheet's bandwidth × efficiency) + launches × time per launch in a graph

Bytes are exact. The efficiency is that of a measured GPU if there is a result, else the range reached by published Mamba
kernels. The time per launch is an assumption. All figures are predictions and are labelled as such; `KNOWN` are published
measurements to compare with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cobra_edge.bench.roofline import launches_per_token, token_bytes
from cobra_edge.bench.shapes import shape_named
from cobra_edge.errors import InputError
from cobra_edge.export.memory_plan import plan_memory
from cobra_edge.formats.model_config import CobraConfig, projector_kind
from cobra_edge.formats.recipe import uniform_recipe
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.formats.targets import Target, targets
from cobra_edge.model.backbones import vision_backbone

SCHEMES_SHOWN = ("fp16", "w8a16-g128", "w4a16-g128")
# Share of the data sheet's bandwidth: Mamba1-2.8B on a Jetson Orin Nano, published kernels.
PUBLISHED_EFFICIENCY = (0.73, 0.81)
# Share of the data sheet's bandwidth that a plain copy reaches: 4300 of 4800 GB/s on an H200.
READ_OF_SHEET = 0.90
# Microseconds between dependent kernels inside a CUDA graph, by family.
LAUNCH_US = {"jetson": 3.0, "rtx": 1.5}
_MEASURED_LAUNCH_US = 1.5
_FIRST_CAPABILITY = 8.0  # the lowest that the CUDA decoder supports


@dataclass(frozen=True)
class Efficiency:
    """Share of the data sheet's bandwidth that is reached, as a range, and its source."""

    low: float
    high: float
    known_from: str


ASSUMED = Efficiency(*PUBLISHED_EFFICIENCY, known_from="assumption: what published kernels reach on a Jetson Orin Nano")


@dataclass(frozen=True)
class Prediction:
    """A predicted token.

    Attributes:
        target: name of the device.
        scheme: of the weights.
        token_bytes: bytes moved per token.
        launches: kernels per token.
        low_ms, high_ms: time per token, for both ends of the efficiency.
        efficiency: that was assumed.
        lacks: why the model does not fit the device, or None.
    """

    target: str
    scheme: str
    token_bytes: int
    launches: int
    low_ms: float
    high_ms: float
    efficiency: Efficiency
    lacks: str | None

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """The predicted rate, low and high."""
        return 1e3 / self.high_ms, 1e3 / self.low_ms


def token_ms(moved_bytes: int, gb_s: float, efficiency: Efficiency, launches: int, launch_us: float) -> tuple[float, float]:
    """Return milliseconds per token, low and high."""
    bare, launching = moved_bytes / gb_s / 1e6, launches * launch_us / 1e3
    return bare / efficiency.high + launching, bare / efficiency.low + launching


def shape_config(shape: str) -> CobraConfig:
    """Return the config of a published shape. Raises InputError, with similar names, if it is unknown."""
    s = shape_named(shape)
    return CobraConfig(shape, vision_backbone(s.vision_backbone_id), projector_kind(s.arch_specifier), s.mamba)


def efficiency_of(scheme: str, results: Iterable[dict[str, Any]]) -> Efficiency:
    """Return the efficiency of a scheme on the first GPU it was measured on, or the assumption.

    Args:
        scheme: of the weights.
        results: of `bench decode --device cuda`.
    """
    for result in results:
        for row in result["rows"]:
            for c in row["runners"]:
                if c.get("scheme") == scheme and c.get("launches_per_token"):
                    return _reached(result["gpu"]["name"], row, c)
    return ASSUMED


def _reached(gpu: str, row: dict[str, Any], runner: dict[str, Any]) -> Efficiency:
    """Subtract the launches from a measured token; the rest is the time to move its bytes."""
    rate = runner["figures"][f"decode_at_{row['contexts'][0]}_tok_s"]
    moved = runner["weights_bytes"] + 2 * row["state_bytes"]
    bandwidth = row["limits"]["read_gb_s"]["median"] * 1e9
    launching = runner["launches_per_token"] * _MEASURED_LAUNCH_US / 1e6

    def share(tokens_per_second: float) -> float:
        reading = 1 / tokens_per_second - launching
        return READ_OF_SHEET * (min(moved / bandwidth / reading, 1.0) if reading > 0 else 1.0)

    return Efficiency(share(rate["low"]), share(rate["high"]), f"carried over from {gpu}, measured")


def devices(names: Sequence[str] = ()) -> list[Target]:
    """Return the profiles of known bandwidth whose GPUs the decoder supports, or those of them that are named.

    Raises:
        InputError: a name that is not one of them.
    """
    fitting = {
        t.name: t
        for t in targets().values()
        if t.memory_bandwidth_gb_s is not None
        and t.family in LAUNCH_US
        and float(t.compute_capability or 0) >= _FIRST_CAPABILITY
    }
    for name in names:
        if name not in fitting:
            raise InputError(f"no prediction for target {name!r}; known: {', '.join(fitting)}")
    return (
        [fitting[name] for name in names]
        if names
        else sorted(fitting.values(), key=lambda t: (t.family, t.memory_bandwidth_gb_s))
    )


def predict(
    target: Target, scheme: str, config: CobraConfig, efficiency: Efficiency, launches: int | None = None
) -> Prediction:
    """Predict one token.

    Args:
        target: of `devices`.
        scheme: of every matrix.
        config: the model.
        efficiency: from `efficiency_of`.
        launches: per token; None for `launches_per_token`.

    Raises:
        InputError: an unknown scheme, or one that fits no matrix.
    """
    recipe, _ = uniform_recipe(config.mamba, scheme_named(scheme))
    n = launches_per_token(config.mamba, recipe) if launches is None else launches
    moved = token_bytes(config, recipe)
    assert target.memory_bandwidth_gb_s is not None
    low, high = token_ms(moved, target.memory_bandwidth_gb_s, efficiency, n, LAUNCH_US[target.family])
    try:
        plan_memory(config, recipe, target)
        lacks = None
    except InputError as error:
        lacks = str(error)
    return Prediction(target.name, scheme, moved, n, low, high, efficiency, lacks)


@dataclass(frozen=True)
class Known:
    """A published measurement of a comparable decoder.

    Attributes:
        what: model and source.
        target: device.
        scheme: our scheme of about the same bytes.
        ms: per token.
        launches_a_layer: of its runtime, estimated from its modules.
        launch_us: per launch; without a graph, the time of the host.
    """

    what: str
    target: str
    scheme: str
    ms: float
    launches_a_layer: int
    launch_us: float


KNOWN = (
    Known("Mamba1-2.8B, fp16 (Quamba)", "jetson-orin-nano", "fp16", 103.6, 7, LAUNCH_US["jetson"]),
    Known("Mamba1-2.8B, W8A8 (Quamba)", "jetson-orin-nano", "w8a16-g128", 60.2, 7, LAUNCH_US["jetson"]),
    Known("Cobra-3.5B, bf16, no CUDA graph, re-measured by others", "rtx-4090", "fp16", 1e3 / 99, 7, 5.0),
)


@dataclass(frozen=True)
class Checked:
    """A published measurement and its prediction with the assumed efficiency, in milliseconds per token."""

    known: Known
    low_ms: float
    high_ms: float

    @property
    def off(self) -> float:
        """Relative distance of the measurement from the predicted range; 0 inside it."""
        nearest = min(max(self.known.ms, self.low_ms), self.high_ms)
        return self.known.ms / nearest - 1


def checked(shape: str = "cobra-3b") -> list[Checked]:
    """Compare predictions with published measurements."""
    config, found = shape_config(shape), []
    for known in KNOWN:
        recipe, _ = uniform_recipe(config.mamba, scheme_named(known.scheme))
        (target,) = devices([known.target])
        assert target.memory_bandwidth_gb_s is not None
        launches = known.launches_a_layer * config.mamba.n_layer
        ends = token_ms(token_bytes(config, recipe), target.memory_bandwidth_gb_s, ASSUMED, launches, known.launch_us)
        found.append(Checked(known, *ends))
    return found
