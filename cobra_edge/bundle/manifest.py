"""manifest.json as frozen structs; unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from ..formats.model_config import CobraConfig
from ..formats.precision import InputForm, PrecisionName
from ..formats.recipe import Recipe
from .engine_key import EngineKey

SCHEMA_VERSION = 2


# Source of the encoder weights: the checkpoint itself (fine-tuned); files next to it; timm's hub, as published.
VisionSource = Literal["checkpoint", "files", "hub"]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint a bundle was made from.

    Attributes:
        id: its name.
        sha256: hash over its weight files.
        vision: source of the encoder weights; None for a text-only model, and in older bundles.
    """

    id: str
    sha256: str
    vision: VisionSource | None = None


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and hash of one file."""

    bytes: int
    sha256: str


class MemoryPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Memory for running the bundle on its target, in bytes.

    Attributes:
        vision_bytes, decoder_bytes: weights.
        state_bytes: decoding states; on a GPU there are two.
        working_bytes: activations, the largest at a time.
        reserved_bytes: the system, the process and the CUDA context.
        available_bytes: None if it depends on the machine.
        buffer_bytes: of the decoder on a GPU, where they stay; 0 on a CPU, and in older bundles.
    """

    vision_bytes: int
    decoder_bytes: int
    state_bytes: int
    working_bytes: int
    reserved_bytes: int
    available_bytes: int | None
    buffer_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        parts = self.vision_bytes, self.decoder_bytes, self.state_bytes, self.buffer_bytes
        return sum(parts) + self.working_bytes + self.reserved_bytes


class Drift(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Drift of the bundle from the float model on the golden lines.

    Attributes:
        runtime: the measured decoder backend.
        vision_runtime: the vision runtime; None without vision.
        lines, positions: number of golden lines, and of answer tokens in them.
        measures: by name of `regress.measures.measure_named`, including those of tasks and layers.
        activations: of the decoder that was measured; empty in bundles of earlier versions.
        expected_kld: mean KLD in nats that the gradients of a guided export foretold; None without.
        images: number of images of the golden lines, a line without one counting as one; 0 in bundles of earlier versions.
        intervals: bounds of the 95 % intervals of `measures`, over images.
        too_few: images of each of `measures` that has too few for an interval.
        by_line: a number for each golden line, by column of `regress.recorded.COLUMNS`; empty in bundles of earlier versions.
    """

    runtime: str
    vision_runtime: str | None
    lines: int
    positions: int
    measures: dict[str, float]
    activations: str = ""
    by_line: dict[str, tuple[Annotated[float, msgspec.Meta(ge=0)], ...]] = {}
    expected_kld: Annotated[float, msgspec.Meta(ge=0)] | None = None
    images: Annotated[int, msgspec.Meta(ge=0)] = 0
    intervals: dict[str, tuple[float, float]] = {}
    too_few: dict[str, Annotated[int, msgspec.Meta(ge=0)]] = {}


class VisionGraph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How vision.onnx was made.

    Attributes:
        precision: of its matmuls, a name of `precision.PRECISIONS`.
        input: "float32" for normalized pixels, "uint8" for decoded images.
        parity: its relative RMS error against the float32 torch model, by "encoder 0", … and "projector", the largest over the
            export's test images.
        wide: matmuls that int8 leaves float, by node name, with the relative error that int8 would have there.
    """

    precision: PrecisionName = "fp32"
    input: InputForm = "float32"
    parity: dict[str, float] = {}
    wide: dict[str, float] = {}


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """manifest.json."""

    schema_version: int
    cobra_edge: str
    source: Source
    model: CobraConfig
    target: str
    recipe: Recipe
    files: dict[str, FileEntry]
    memory_plan: MemoryPlan
    drift: Drift | None
    vision: VisionGraph | None = None  # older bundles have fp32 and float32
    engines: dict[str, EngineKey] = {}  # by file name: engines in the bundle
    # Drift of the float model in "fp16" and "bf16" from float32, on the golden lines; of a large model in "bf16" alone.
    noise_floor: dict[str, dict[str, float]] = {}


class PromptFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """prompt.json: the prompt style and the token that ends an answer."""

    style: str
    end: str
    end_id: int
