"""manifest.json as frozen structs: what a bundle says of itself, unknown fields refused."""

from __future__ import annotations

from typing import Literal

import msgspec

from ..formats.model_config import CobraConfig
from ..formats.precision import InputForm, PrecisionName
from ..formats.recipe import Recipe
from .engine_key import EngineKey

SCHEMA_VERSION = 2


# Where encoders' weights come from: trained along, and in the checkpoint itself; files beside it; timm's hub, as published.
VisionSource = Literal["checkpoint", "files", "hub"]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint a bundle was made from.

    Attributes:
        id: its name.
        sha256: over its weight files.
        vision: where the encoders' weights came from; None for a text-only model, and in bundles from before it was written.
    """

    id: str
    sha256: str
    vision: VisionSource | None = None


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and hash of one file."""

    bytes: int
    sha256: str


class MemoryPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What running the bundle takes on its target, in bytes; available is None where it depends on the machine."""

    vision_bytes: int
    decoder_bytes: int
    state_bytes: int
    working_bytes: int
    reserved_bytes: int
    available_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return self.vision_bytes + self.decoder_bytes + self.state_bytes + self.working_bytes + self.reserved_bytes


class Drift(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the bundle's answers are from the float model's, on the golden lines.

    Attributes:
        runtime: the decoder backend that was measured.
        vision_runtime: what computed the visual embeddings; None without vision.
        lines, positions: golden lines, and answer tokens in them.
        measures: by name of `regress.measures.measure_named`, tasks' and layers' too, those that could be taken.
    """

    runtime: str
    vision_runtime: str | None
    lines: int
    positions: int
    measures: dict[str, float]


class VisionGraph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How vision.onnx was made.

    Attributes:
        precision: in which numbers its matrix products are, a name of `precision.PRECISIONS`.
        input: what it takes: "float32", normalised pixels, or "uint8", images as they are decoded.
        parity: its relative RMS distance from the torch model in float32, by "encoder 0", … and "projector", the worst of what
            the export looked at.
        wide: products that int8 leaves float, by node name, with the relative error that int8 would have had there.
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
    vision: VisionGraph | None = None  # bundles from before it was written down have fp32 and float32
    engines: dict[str, EngineKey] = {}  # by file name: engines that were built with the bundle
    noise_floor: dict[
        str, dict[str, float]
    ] = {}  # of the float model in "fp16" and "bf16" against float32, on the golden lines


class PromptFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """prompt.json: the prompt style and the token that ends an answer."""

    style: str
    end: str
    end_id: int
