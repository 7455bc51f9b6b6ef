"""manifest.json as frozen structs: what a bundle says of itself, unknown fields refused."""

from __future__ import annotations

import msgspec

from .model.config import CobraConfig
from .precision import InputForm, PrecisionName
from .recipe import Recipe
from .vision.engines.cache import EngineKey

SCHEMA_VERSION = 1


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The checkpoint a bundle was made from, and the hash over its weight files."""

    id: str
    sha256: str


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
    """How far the bundle's answers are from the float model's, teacher-forced on the golden lines.

    Attributes:
        runtime: the decoder backend that was measured.
        lines, positions: golden lines, and answer tokens in them.
        kld_mean, kld_p99, kld_max: KL(float ‖ quantized) of next-token distributions, in nats.
        top1_agreement: share of positions where both choose the same token.
        perplexity_ratio: perplexity of the given answers, quantized over float.
        vision_relative_rms: of the visual embeddings, vision graph against torch; None without vision.
        vision_runtime: what computed them.
    """

    runtime: str
    lines: int
    positions: int
    kld_mean: float
    kld_p99: float
    kld_max: float
    top1_agreement: float
    perplexity_ratio: float
    vision_relative_rms: float | None
    vision_runtime: str | None = None


class VisionGraph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How vision.onnx was made.

    Attributes:
        precision: in which numbers its matrix products are, a name of `precision.PRECISIONS`.
        input: what it takes: "float32", normalised pixels, or "uint8", pictures as they are decoded.
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


class PromptFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """prompt.json: the prompt style and the token that ends an answer."""

    style: str
    end: str
    end_id: int
