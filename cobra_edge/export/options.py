"""Options of an export, and how those that are not given are chosen: by the quality and by the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InputError
from ..formats.precision import InputForm
from ..formats.quality import DEFAULT_QUALITY, quality_named
from ..formats.scheme import scheme_named
from ..formats.targets import Target


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        quality: a name of `quality.QUALITIES`; None for the default one, or for none if a method is given.
        scheme: weight format; None for the target's.
        method: quantization method, a name of `method.METHODS`; None for that of the quality. A method that is given stands for
            itself: no rotation and no bits but those that are given too.
        rotation: one of `recipe.ROTATIONS`: "out-proj" rotates out_proj's input, "residual" the residual stream; None for
            that of the quality.
        bits: budget of bits per weight for bit allocation; None for the target's if the quality allocates bits and no scheme
            is given, otherwise every matrix is stored by `scheme`.
        activations: activations of a bit allocation; None for those of the target's scheme.
        sensitivity: file of `sensitivity` for this checkpoint; None measures it now if bits are allocated.
        statistics: file of `calibrate` for this checkpoint, for methods that need statistics.
        calibration: folder of images, or suite, for new statistics, for bit allocation and for int8 vision; None for the
            embedded set.
        skip_bad: leave out images and lines of `calibration` that cannot be read.
        clip_activations: percentile at which rounded activations are clipped; None does not clip.
        force: replace an existing bundle.
        vision_precision: of the vision graph, one of `precision.PRECISIONS`; None for the target's.
        vision_input: input of the graph: "uint8" (default), decoded images, or "float32", normalised pixels.
        engine: one of ENGINES: how to build an engine ahead of time, if the target runs one.
        vision_weights, tokenizer: for checkpoints that have none.
        golden: suite of the golden lines; None for held-out images of `calibration`, or else for the embedded suite.
        golden_lines: how many; None for all (1000 at most); of more than 10⁹ weights 64, or 16 if the method reads them alone.
        budget: drift budget; None for the embedded one.
        device: "cpu", or "cuda" to collect statistics on a GPU.
    """

    quality: str | None = None
    scheme: str | None = None
    method: str | None = None
    rotation: str | None = None
    bits: float | None = None
    activations: Literal["float32", "int8"] | None = None
    sensitivity: Path | None = None
    statistics: Path | None = None
    calibration: Path | None = None
    skip_bad: bool = False
    clip_activations: float | None = None
    force: bool = False
    vision_precision: str | None = None
    vision_input: InputForm | None = None
    engine: str = "auto"
    vision_weights: Path | None = None
    tokenizer: Path | None = None
    golden: Path | None = None
    golden_lines: int | None = None
    budget: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Choice:
    """How the decoder is quantized, with nothing left open.

    Attributes:
        quality: the name of the quality if it chose the method; None if flags did.
        scheme: of every matrix, or of the activations if bits are allocated.
        method, rotation: as in `ExportOptions`.
        bits: budget for bit allocation; None without one.
        implied: fields that no flag gave: an export may depart from them, and says so.
    """

    quality: str | None
    scheme: str
    method: str
    rotation: str
    bits: float | None
    implied: frozenset[str] = frozenset()

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the quality and the target chose."""
        return self.quality is not None and {"scheme", "rotation", "bits"} <= self.implied


def choose(o: ExportOptions, target: Target) -> Choice:
    """Choose what the options leave open.

    Raises:
        InputError: an unknown name, or --quality where it has no effect.
    """
    scheme = scheme_named(o.scheme or target.scheme)
    implied = frozenset(name for name in ("scheme", "rotation", "bits") if getattr(o, name) is None)
    if o.method is not None:
        if o.quality is not None:
            raise InputError(f"--quality {o.quality} chooses the method, --method {o.method} does too; give one of the two")
        return Choice(None, scheme.name, o.method, o.rotation or "none", o.bits, implied - {"rotation", "bits"})
    quality = quality_named(o.quality or DEFAULT_QUALITY)
    if scheme.group_size is None or scheme.code_format != "int":
        if o.quality is not None and quality.method != "rtn":
            raise InputError(f"--quality {o.quality}: no method applies to {scheme.name}; omit it")
        return Choice(None, scheme.name, "rtn", o.rotation or "none", o.bits, implied - {"rotation", "bits"})
    allocates = quality.allocates and o.scheme is None
    bits = target.bits if o.bits is None and allocates else o.bits
    return Choice(quality.name, scheme.name, quality.method, o.rotation or quality.rotation, bits, implied)
