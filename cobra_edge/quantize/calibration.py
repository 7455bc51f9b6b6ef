"""Collect calibration statistics: stream lines through the float model, one layer in memory at a time.

Lines that share an image share its visual positions: these are read once, and every line continues from the state after them.
Between two layers only the residual streams are kept, (positions, d_model) float32.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..formats.model_config import MambaConfig
from ..model.checkpoint import Checkpoint
from ..model.cobra import stream_blocks
from ..model.mamba import REFERENCE, Block, Operations, RMSNorm
from ..model.weight_files import require_finite
from ..suite.line import Line
from ..suite.tokenized import TokenizedSuite
from ..version import __version__
from .calibration_data import EmbeddingCache, OnProgress, calibration_suite, data_sha256, no_progress
from .observer import Observer
from .resume import Resume
from .statistics import (
    HEAD,
    LAYER_PROJECTIONS,
    SCHEMA_VERSION,
    Header,
    Statistics,
    projection_name,
    projection_tensors,
    projection_width,
)

log = logging.getLogger(__name__)

# Recommended: every task a few dozen times, and positions enough for the widest second moment. It has d_inner dimensions;
# with as many positions as dimensions it is singular in all but luck, with four times as many its small directions are known
# to within a factor of about (1 - √¼)² = ¼ (Marchenko and Pastur 1967).
_RECOMMENDED_LINES = 128
_RECOMMENDED_POSITIONS_PER_INPUT = 4
_POSITIONS_AT_ONCE = 2048
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Sequence:
    """Consecutive positions of the streams that are read one after the other: an image, or a line after its image."""

    start: int
    length: int
    is_image: bool
    after: int | None = None  # index of the image's sequence, from whose state it continues

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.length)


@torch.inference_mode()
def collect_statistics(
    checkpoint: Checkpoint,
    lines: Sequence[Line],
    images: Path,
    *,
    resume_directory: Path | None = None,
    operations: Operations = REFERENCE,
    device: torch.device = _CPU,
    on_progress: OnProgress = no_progress,
    cache: EmbeddingCache | None = None,
) -> Statistics:
    """Collect statistics of the input of every projection.

    Args:
        checkpoint: with its float decoder and vision model; without vision only the text is read.
        lines: prompts with their answers.
        images: directory that image paths are relative to.
        resume_directory: keeps finished layers, so that the same call resumes after an interruption; tensors of the result
            are mapped from there. None keeps everything in memory.
        operations: sequential operations of a mixer.
        device: runs each layer and sums its statistics; the residual streams stay on the CPU.
        on_progress: called with the name of the step, and how many of its images or positions are done.
        cache: visual embeddings that other steps share; None computes them here.

    Raises:
        InputError: a line without tokens, an image that cannot be read, weights or activations that are not finite.
    """
    config = checkpoint.config.mamba
    suite = calibration_suite(checkpoint, lines, images)
    sequences = _sequences(suite, checkpoint.config.n_visual_tokens)
    header = _header(checkpoint, suite, sum(s.length for s in sequences))
    _warn_if_few(header, config)
    resume = Resume(resume_directory, msgspec.json.encode(header))
    kept = resume.read_streams((header.positions, config.d_model))
    if kept is None:
        streams = _embed(checkpoint, suite, images, cache or EmbeddingCache(checkpoint), on_progress)
        resume.keep_streams(0, streams.numpy())
    else:
        streams = torch.from_numpy(kept)
    first = resume.finished()
    for index, block in enumerate(stream_blocks(checkpoint, operations, first), first):
        observed = ObservedBlock(block, index, config, header.positions, device)
        _stream(observed, streams, sequences, on_progress)
        resume.keep(index, observed.tensors())
        resume.keep_streams(index + 1, streams.numpy())
    if not resume.has(config.n_layer):
        resume.keep(config.n_layer, _observe_head(checkpoint, streams))
    expected = {i: [t for p in LAYER_PROJECTIONS for t in projection_tensors(config, i, p)] for i in range(config.n_layer)}
    expected[config.n_layer] = projection_tensors(config, None, HEAD)
    return Statistics(header, config, resume.tensors(expected), str(resume_directory or "statistics"))


def _sequences(suite: TokenizedSuite, n_visual: int) -> list[_Sequence]:
    """Return images first, then the lines."""
    found = [_Sequence(i * n_visual, n_visual, is_image=True) for i in range(len(suite.images))]
    start = len(found) * n_visual
    for line in suite.lines:
        length = len(line.tokens)
        found.append(_Sequence(start, length, is_image=False, after=line.image))
        start += length
    return found


def _header(checkpoint: Checkpoint, suite: TokenizedSuite, positions: int) -> Header:
    return Header(
        schema_version=SCHEMA_VERSION,
        cobra_edge=__version__,
        model_id=checkpoint.config.model_id,
        model_sha256=checkpoint.sha256(),
        data_sha256=data_sha256(suite),
        lines=len(suite.lines),
        positions=positions,
    )


def _warn_if_few(header: Header, config: MambaConfig) -> None:
    positions = _RECOMMENDED_POSITIONS_PER_INPUT * config.d_inner
    if header.lines < _RECOMMENDED_LINES or header.positions < positions:
        log.warning(
            "calibration data: %d lines with %d positions; at least %d lines and %d positions are recommended (%d for each of "
            "the %d inputs of the widest projection)",
            header.lines, header.positions, _RECOMMENDED_LINES, positions, _RECOMMENDED_POSITIONS_PER_INPUT, config.d_inner,
        )  # fmt: skip


def _embed(
    checkpoint: Checkpoint, suite: TokenizedSuite, images: Path, cache: EmbeddingCache, on_progress: OnProgress
) -> Tensor:
    """Return the streams before the first layer, (positions, d_model) float32."""
    parts = []
    if suite.images:
        parts.append(cache.get([images / name for name in suite.images], on_progress))
    table = checkpoint.decoder["backbone.embedding.weight"]
    tokens = torch.tensor([t for line in suite.lines for t in line.tokens])
    parts.append(require_finite("backbone.embedding.weight", table[tokens].float()))
    return torch.cat(parts)


def _batches(sequences: list[_Sequence]) -> Iterator[list[int]]:
    """Yield indices of sequences to read together: equally long, images before the lines that continue from them."""

    def kind(i: int) -> tuple[bool, int]:
        return not sequences[i].is_image, sequences[i].length

    for (_, length), alike in itertools.groupby(sorted(range(len(sequences)), key=kind), kind):
        indices, most = list(alike), max(1, _POSITIONS_AT_ONCE // length)
        for start in range(0, len(indices), most):
            yield indices[start : start + most]


class ObservedBlock:
    """One block with an observer at the input of each projection."""

    def __init__(self, block: Block, index: int, config: MambaConfig, positions: int, device: torch.device = _CPU) -> None:
        """Attach observers for `positions` positions to the block of layer `index`, moved to the device."""
        self.block, self.index, self.config, self.device = block.to(device), index, config, device
        with device:
            self.unit = RMSNorm(config.d_model, config.norm_eps)  # the block's norm without its weight
        self.observers = {
            projection: Observer(projection_name(index, projection), projection_width(config, projection), positions, device)
            for projection in LAYER_PROJECTIONS
        }
        self.block.mixer.x_proj.register_forward_hook(self._at_x_proj)
        self.block.mixer.out_proj.register_forward_pre_hook(self._at_out_proj)

    def _at_x_proj(self, _module: Any, inputs: tuple[Tensor], outputs: Tensor) -> None:
        self.observers["x_proj"].add(inputs[0])
        self.observers["dt_proj"].add(outputs[..., : self.block.mixer.dt_rank])

    def _at_out_proj(self, _module: Any, inputs: tuple[Tensor]) -> None:
        self.observers["out_proj"].add(inputs[0])

    def __call__(self, residual: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the block on residual (batch, seq, d_model) float32; return its output, of the same shape, and both states."""
        self.observers["in_proj"].add(self.unit(residual))
        return self.block(residual, conv, ssm)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the layer's tensors, with shapes and dtypes of `projection_tensors`, such as (n,) float32."""
        return {
            **self.observers["in_proj"].tensors(self.block.norm.weight.cpu().numpy(), "unit"),
            **self.observers["x_proj"].tensors(),
            **self.observers["dt_proj"].tensors(),
            **self.observers["out_proj"].tensors(rotation="own"),
        }


def _stream(block: ObservedBlock, streams: Tensor, sequences: list[_Sequence], on_progress: OnProgress) -> None:
    """Run every sequence through a block; its output replaces its input in `streams`, (positions, d_model) float32."""
    config, step, done = block.config, f"layer {block.index + 1} of {block.config.n_layer}", 0
    empty = tuple(torch.zeros(config.d_inner, n, device=block.device) for n in (config.d_conv, config.d_state))
    after: dict[int | None, tuple[Tensor, ...]] = {None: empty}
    on_progress(step, 0, len(streams))
    for batch in _batches(sequences):
        members = [sequences[i] for i in batch]
        conv, ssm = (torch.stack([after[s.after][part] for s in members]) for part in (0, 1))
        out, conv, ssm = block(torch.stack([streams[s.rows] for s in members]).to(block.device), conv, ssm)
        out = out.to(streams.device)
        for row, (index, sequence) in enumerate(zip(batch, members, strict=True)):
            streams[sequence.rows] = out[row]
            if sequence.is_image:
                after[index] = conv[row], ssm[row]
            done += sequence.length
        on_progress(step, done, len(streams))


def _observe_head(checkpoint: Checkpoint, streams: Tensor) -> dict[str, np.ndarray]:
    """Return the head's tensors, from the streams after the last layer, (positions, d_model) float32."""
    config, name = checkpoint.config.mamba, "backbone.norm_f.weight"
    unit, observer = RMSNorm(config.d_model, config.norm_eps), Observer(HEAD, config.d_model, len(streams))
    for start in range(0, len(streams), _POSITIONS_AT_ONCE):
        observer.add(unit(streams[start : start + _POSITIONS_AT_ONCE]))
    return observer.tensors(require_finite(name, checkpoint.decoder[name].float()).numpy(), "own")
