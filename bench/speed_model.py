"""Speed on paper: what a token should take on a GPU that nobody here has measured.

seconds = bytes a token moves / (the data sheet's bandwidth × efficiency) + launches × what one takes inside a graph

Bytes are exact. The efficiency is carried over from a GPU that was measured where there is a result, otherwise it is the range
that published Mamba kernels reached. What one launch takes is an assumption. Every figure that comes from here is a prediction
and is called one; `KNOWN` are published measurements that the same sum is held against.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cobra_edge.bench.roofline import launches_per_token, token_bytes
from cobra_edge.bench.shapes import shape_named
from cobra_edge.bundle.memory_plan import plan_memory
from cobra_edge.errors import InputError
from cobra_edge.formats.model_config import CobraConfig, projector_kind
from cobra_edge.formats.recipe import uniform_recipe
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.formats.targets import Target, targets
from cobra_edge.model.backbones import vision_backbone

SCHEMES_SHOWN = ("fp16", "w8a16-g128", "w4a16-g128")
# Of the data sheet's bandwidth: Mamba1-2.8B on a Jetson Orin Nano, by published kernels.
PUBLISHED_EFFICIENCY = (0.73, 0.81)
# What plain reading and copying gets of the data sheet's bandwidth; an H200 was seen to copy at 4300 of its 4800 GB/s.
READ_OF_SHEET = 0.90
# Microseconds from one kernel to the next one that waits for it, inside a CUDA graph, by family.
LAUNCH_US = {"jetson": 3.0, "rtx": 1.5}
_MEASURED_LAUNCH_US = 1.5
_FIRST_CAPABILITY = 8.0  # which the CUDA decoder's kernels are compiled for


@dataclass(frozen=True)
class Efficiency:
    """Which share of the data sheet's bandwidth is reached, from low to high, and how that is known."""

    low: float
    high: float
    known_from: str


ASSUMED = Efficiency(*PUBLISHED_EFFICIENCY, known_from="assumption: what published kernels reach on a Jetson Orin Nano")


@dataclass(frozen=True)
class Prediction:
    """A token on paper.

    Attributes:
        target: the device's name.
        scheme: of the weights.
        token_bytes: what a token moves.
        launches: kernels of a token.
        low_ms, high_ms: what a token takes, by the efficiency's ends.
        efficiency: that was taken.
        lacks: why it would not fit there, or None.
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
        """The predicted rate, from low to high."""
        return 1e3 / self.high_ms, 1e3 / self.low_ms


def token_ms(moved_bytes: int, gb_s: float, efficiency: Efficiency, launches: int, launch_us: float) -> tuple[float, float]:
    """Return milliseconds a token takes, from low to high: the sum that this module is about."""
    bare, launching = moved_bytes / gb_s / 1e6, launches * launch_us / 1e3
    return bare / efficiency.high + launching, bare / efficiency.low + launching


def shape_config(shape: str) -> CobraConfig:
    """Return the whole model of a published shape. Raises InputError with near matches."""
    s = shape_named(shape)
    return CobraConfig(shape, vision_backbone(s.vision_backbone_id), projector_kind(s.arch_specifier), s.mamba)


def efficiency_of(scheme: str, results: Iterable[dict[str, Any]]) -> Efficiency:
    """Return what a scheme reached on the first GPU that it was measured on, or the assumption.

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
    """Take the launches off a measured token; what is left moved its bytes."""
    rate = runner["figures"][f"decode_at_{row['contexts'][0]}_tok_s"]
    moved = runner["weights_bytes"] + 2 * row["state_bytes"]
    bandwidth = row["limits"]["read_gb_s"]["median"] * 1e9
    launching = runner["launches_per_token"] * _MEASURED_LAUNCH_US / 1e6

    def share(tokens_per_second: float) -> float:
        reading = 1 / tokens_per_second - launching
        return READ_OF_SHEET * (min(moved / bandwidth / reading, 1.0) if reading > 0 else 1.0)

    return Efficiency(share(rate["low"]), share(rate["high"]), f"carried over from {gpu}, measured")


def devices(names: Sequence[str] = ()) -> list[Target]:
    """Return the profiles whose bandwidth is known and whose GPUs the kernels are compiled for, or those of them named.

    Raises:
        InputError: a name that is none of them.
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
        launches: counted ones; None for those of `launches_per_token`.

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
    """A published measurement of such a decoder.

    Attributes:
        what: it is, with its source.
        target: where it was taken.
        scheme: ours of about the same bytes.
        ms: that a token took.
        launches_a_layer: of the runtime it was taken with, estimated from its modules.
        launch_us: what one takes there; outside a graph it is the host's time.
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
    """A published measurement beside what the sum says of it with the assumed efficiency, in milliseconds a token."""

    known: Known
    low_ms: float
    high_ms: float

    @property
    def off(self) -> float:
        """How far the measurement lies outside of what was predicted, as a share of the nearer end; 0 inside."""
        nearest = min(max(self.known.ms, self.low_ms), self.high_ms)
        return self.known.ms / nearest - 1


def checked(shape: str = "cobra-3b") -> list[Checked]:
    """Hold the sum against what is known."""
    config, found = shape_config(shape), []
    for known in KNOWN:
        recipe, _ = uniform_recipe(config.mamba, scheme_named(known.scheme))
        (target,) = devices([known.target])
        assert target.memory_bandwidth_gb_s is not None
        launches = known.launches_a_layer * config.mamba.n_layer
        ends = token_ms(token_bytes(config, recipe), target.memory_bandwidth_gb_s, ASSUMED, launches, known.launch_us)
        found.append(Checked(known, *ends))
    return found
