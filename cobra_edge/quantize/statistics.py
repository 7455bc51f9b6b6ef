"""Calibration statistics: the inputs of a decoder's projections, as one safetensors file (docs/statistics.md).

The projections are in_proj, x_proj, dt_proj and out_proj of every layer, and head. For the input x of each, the file holds

* the second moment H = mean over positions of x xᵀ, as its diagonal and as the correlations H_ij / √(H_ii · H_jj) in float16:
  GPTQ's Hessian, and which inputs are outliers;
* a histogram of magnitudes for each group of 32 consecutive inputs, in the model's own basis and in the rotated one: where
  rounded activations may be clipped.

At in_proj and head, x is the normalised residual without the norm's weight, so that norms can be folded and the stream rotated
afterwards. Tensors are memory-mapped, and read one projection at a time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from ..errors import InputError
from ..files.staging import staged_file
from ..formats.model_config import CobraConfig, MambaConfig
from ..formats.recipe import StoredTensor
from ..formats.safetensors_file import SafetensorsWriter, map_tensors, read_metadata

SCHEMA_VERSION = 1
LAYER_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
HEAD = "head"
GROUP = 32  # consecutive inputs that share a histogram
BINS = 128
_BINS_PER_OCTAVE = 8
_METADATA = "statistics"  # the key of the header among the file's metadata
_ROUNDING = 2e-3  # by how much a correlation may exceed 1 for being a float16
_MATRIX = re.compile(r"backbone\.layers\.(\d+)\.mixer\.(in_proj|x_proj|dt_proj|out_proj)\.weight")


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Model and data of the statistics.

    Attributes:
        schema_version: of the file.
        cobra_edge: version that wrote it.
        model_id: of the model, for messages.
        model_sha256: of the checkpoint, as `Checkpoint.sha256` says.
        data_sha256: over the lines and the bytes of their images.
        lines: number of lines.
        positions: visual and text positions that H is the mean over; those of an image count once, however many lines share it.
    """

    schema_version: int
    cobra_edge: str
    model_id: str
    model_sha256: str
    data_sha256: str
    lines: int
    positions: int


def projection_of(name: str) -> tuple[int | None, str] | None:
    """Return (layer, projection) of a decoder matrix; None for a tensor that is no projection."""
    if name in ("lm_head.weight", "backbone.embedding.weight"):  # a tied head is the embedding
        return None, HEAD
    found = _MATRIX.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def projection_name(layer: int | None, projection: str) -> str:
    """Return the prefix of the projection's tensors."""
    return HEAD if layer is None else f"backbone.layers.{layer}.mixer.{projection}"


def projection_width(config: MambaConfig, projection: str) -> int:
    """Return the number of inputs of the projection."""
    widths = {"in_proj": config.d_model, "dt_proj": config.dt_rank, HEAD: config.d_model}
    return widths.get(projection, config.d_inner)


def projection_tensors(config: MambaConfig, layer: int | None, projection: str) -> list[StoredTensor]:
    """Return the tensors that are stored for a projection, in file order."""
    name, n = projection_name(layer, projection), projection_width(config, projection)
    groups = -(-n // GROUP)
    return [
        StoredTensor(f"{name}.diagonal", "float32", (n,)),
        StoredTensor(f"{name}.correlation", "float16", (n * (n + 1) // 2,)),
        StoredTensor(f"{name}.peak", "float32", (2, groups)),
        StoredTensor(f"{name}.histogram", "int32", (2, groups, BINS)),
    ]


def projections(config: MambaConfig) -> list[tuple[int | None, str]]:
    """Return every (layer, projection), in file order; the head's layer is None."""
    return [*((i, projection) for i in range(config.n_layer) for projection in LAYER_PROJECTIONS), (None, HEAD)]


def statistics_tensors(config: MambaConfig) -> list[StoredTensor]:
    """Return every tensor of the file, in file order."""
    return [t for layer, projection in projections(config) for t in projection_tensors(config, layer, projection)]


def pack_second_moment(second_moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the diagonal (n,) float32 and the correlations (n·(n+1)/2,) float16 of a second moment.

    Args:
        second_moment: (n, n) float32, finite, of which the lower triangle is read.
    """
    n, diagonal = len(second_moment), np.diagonal(second_moment).astype(np.float32)
    root = np.sqrt(diagonal)
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    correlation, start = np.empty(n * (n + 1) // 2, np.float16), 0
    for i in range(n):
        correlation[start : start + i + 1] = second_moment[i, : i + 1] * inverse[: i + 1] * inverse[i]
        start += i + 1
    return diagonal, correlation


def unpack_second_moment(diagonal: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """Undo `pack_second_moment`: return the symmetric matrix, (n, n) float32, with exactly the given diagonal."""
    n, start, root = len(diagonal), 0, np.sqrt(diagonal)
    second_moment = np.zeros((n, n), np.float32)
    for i in range(n):
        second_moment[i, :i] = correlation[start : start + i] * root[:i] * root[i]
        start += i + 1
    second_moment += second_moment.T.copy()
    np.fill_diagonal(second_moment, diagonal)
    return second_moment


def histogram_of(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count magnitudes in logarithmic bins, eight per octave, sixteen octaves down from the largest of all samples.

    Args:
        samples: (positions, n) float32, finite.

    Returns:
        The largest magnitude of each group of 32 inputs (groups,) float32, and counts (groups, 128) int32. With `top` the
        largest of all, bin k counts magnitudes up to top · 2^((k - 127) / 8) that are not in a lower bin.
    """
    positions, n = samples.shape
    groups = -(-n // GROUP)
    magnitudes = np.zeros((positions, groups * GROUP), np.float32)
    np.abs(samples, out=magnitudes[:, :n])
    peak = magnitudes.reshape(positions, groups, GROUP).max(axis=(0, 2), initial=0.0)
    top = float(peak.max())
    with np.errstate(divide="ignore", over="ignore"):
        bins = np.log2(magnitudes / np.float32(top or 1.0))
    np.ceil(bins * _BINS_PER_OCTAVE + (BINS - 1), out=bins)
    codes = np.clip(bins, 0, BINS - 1).astype(np.int32).reshape(positions, groups, GROUP)
    codes += (np.arange(groups, dtype=np.int32) * BINS)[:, None]
    counts = np.bincount(codes.ravel(), minlength=groups * BINS).reshape(groups, BINS).astype(np.int32)
    counts[-1, 0] -= positions * (groups * GROUP - n)  # padding of the last group
    return peak, counts


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one model, from a file or just collected.

    Attributes:
        header: model and data.
        config: sizes of the decoder.
        tensors: those of `statistics_tensors`, memory-mapped or in memory.
        origin: where they come from, for messages.
    """

    header: Header
    config: MambaConfig
    tensors: Mapping[str, np.ndarray]
    origin: str = "statistics"

    def diagonal(self, layer: int | None, projection: str) -> np.ndarray:
        """Return the mean square of each input, (n,) float32. Raises InputError for invalid values."""
        name = projection_name(layer, projection)
        values = self.tensors[f"{name}.diagonal"]
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise InputError(f"{self.origin}: {name}.diagonal holds negative or non-finite mean squares; calibrate again")
        return values

    def second_moment(self, layer: int | None, projection: str) -> np.ndarray:
        """Return H, (n, n) float32, symmetric. Raises InputError for invalid values."""
        name, diagonal = projection_name(layer, projection), self.diagonal(layer, projection)
        correlation = self.tensors[f"{name}.correlation"]
        if not (np.abs(correlation) <= 1 + _ROUNDING).all():  # not so for NaN either
            raise InputError(f"{self.origin}: {name}.correlation holds values beyond -1..1; calibrate again")
        return unpack_second_moment(diagonal, correlation)

    def percentile(self, layer: int | None, projection: str, group: int, percentile: float, *, rotated: bool) -> np.ndarray:
        """Return for each group of inputs a bound that `percentile` percent of its magnitudes do not exceed.

        Args:
            layer, projection: as `projections` lists them.
            group: consecutive inputs that share a bound: a multiple of 32 that divides n, or n itself.
            percentile: above 0, up to 100. 100 gives the largest magnitude seen.
            rotated: of the inputs in a rotated model: at in_proj R x without the norm's weight, which is folded into the
                matrix; at head and out_proj R times the unrotated input; elsewhere the same.

        Returns:
            (n / group,) float32: the upper edge of the bin in which the percentile falls, at most 9 % above it.

        Raises:
            InputError: an invalid group or percentile, no rotated histogram, or invalid values.
        """
        name, n = projection_name(layer, projection), projection_width(self.config, projection)
        if n % group or (group % GROUP and group != n):
            raise InputError(
                f"{name}: no bounds for groups of {group}; expected a multiple of {GROUP} that divides {n}, or {n}"
            )
        if not 0 < percentile <= 100:
            raise InputError(f"percentile {percentile} is out of range; expected above 0 and up to 100")
        per = -(-group // GROUP)
        peaks = self.tensors[f"{name}.peak"][int(rotated)].reshape(-1, per)
        counts = self.tensors[f"{name}.histogram"][int(rotated)].astype(np.int64).reshape(-1, per, BINS)
        if not (np.isfinite(peaks).all() and (peaks >= 0).all() and (counts >= 0).all()):
            raise InputError(f"{self.origin}: {name} holds an invalid histogram; calibrate again")
        whole, peak = counts.sum(axis=1), peaks.max(axis=1)
        total = whole.sum(axis=1)
        if (total == 0).any():
            basis = f"in the rotated basis: width {n} has no Hadamard matrix" if rotated else "counted; calibrate again"
            raise InputError(f"{self.origin}: {name} has no magnitudes {basis}")
        if percentile == 100:
            return np.ascontiguousarray(peak, np.float32)
        reached = whole.cumsum(axis=1) >= np.ceil(total * (percentile / 100))[:, None]
        edges = peaks.max() * np.exp2((np.arange(BINS, dtype=np.float32) - (BINS - 1)) / _BINS_PER_OCTAVE)
        return np.minimum(edges[reached.argmax(axis=1)], peak).astype(np.float32)

    def fingerprint(self) -> str:
        """Return a hash of the header and of every diagonal: it differs for another model, other data or other numbers."""
        digest = hashlib.sha256(msgspec.json.encode(self.header))
        for layer, projection in projections(self.config):
            digest.update(np.ascontiguousarray(self.tensors[f"{projection_name(layer, projection)}.diagonal"]).data)
        return digest.hexdigest()


def write_statistics(statistics: Statistics, file: Path, *, force: bool = True) -> None:
    """Write the file, one tensor at a time, and rename it when it is complete. Raises what `staging.staged_file` raises."""
    metadata = {_METADATA: msgspec.json.encode(statistics.header).decode()}
    plan = statistics_tensors(statistics.config)
    with staged_file(file, force=force) as staged, SafetensorsWriter(staged, plan, metadata) as writer:
        for tensor in plan:
            writer.write(tensor.name, statistics.tensors[tensor.name])


def read_header(file: Path) -> Header:
    """Read the header of a file of statistics.

    Raises:
        InputError: no such file, not safetensors, not statistics, or an unknown schema version.
    """
    if not file.is_file():
        raise InputError(
            f"{file}: no such file; expected statistics, as `python -m cobra_edge.calibrate --out {file}` writes them"
        )
    text = read_metadata(file).get(_METADATA)
    if text is None:
        raise InputError(f"{file}: not statistics, its metadata has no {_METADATA!r}; expected a file written by calibrate")
    try:
        header = msgspec.json.decode(text, type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: its header is invalid ({error}); calibrate again") from error
    if header.schema_version != SCHEMA_VERSION:
        raise InputError(f"{file}: schema version {header.schema_version}, expected {SCHEMA_VERSION}; calibrate again")
    return header


def read_statistics(file: Path, config: CobraConfig, model_sha256: str) -> Statistics:
    """Open a file of statistics.

    Args:
        file: written by `write_statistics`.
        config: of the model to quantize.
        model_sha256: that model's hash, `Checkpoint.sha256`.

    Raises:
        InputError: unreadable, statistics of another model, or tensors that do not match its sizes. Values are checked when
            they are read.
    """
    header = read_header(file)
    if header.model_sha256 != model_sha256:
        raise InputError(
            f"{file}: statistics of another model: {header.model_id} ({header.model_sha256[:12]}…), expected {config.model_id} "
            f"({model_sha256[:12]}…); calibrate again with this checkpoint"
        )
    tensors = map_tensors(file, statistics_tensors(config.mamba))
    return Statistics(header, config.mamba, tensors, file.name)
