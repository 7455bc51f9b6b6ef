"""Take statistics: stream questions about pictures through the float model, one layer in memory at a time.

Lines that share a picture share its visual positions: those are read once, and every line goes on from the state they left.
Between two layers only the residual streams are kept, (positions, d_model) float32.
"""

from __future__ import annotations

import hashlib
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
from ..version import __version__
from .observer import Site
from .questions import OnProgress, Question, Questions, seen, silent, tokenised
from .resume import Parts
from .statistics import HEAD, LAYER_SITES, SCHEMA_VERSION, Header, Statistics, site_name, site_tensors, site_width

log = logging.getLogger(__name__)

# What is advised: every task a few dozen times, and positions enough for the widest second moment. It has d_inner dimensions;
# with as many positions as dimensions it is singular in all but luck, with four times as many its small directions are known
# to within a factor of about (1 - √¼)² = ¼ (Marchenko and Pastur 1967).
_ADVISED_LINES = 128
_ADVISED_POSITIONS_PER_INPUT = 4
_POSITIONS_AT_ONCE = 2048
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Sequence:
    """Consecutive positions of the streams that are read one after the other: a picture, or a line after its picture."""

    start: int
    length: int
    is_picture: bool
    after: int | None = None  # index of the picture's sequence, whose state it goes on from

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.length)


@torch.inference_mode()
def collect_statistics(
    checkpoint: Checkpoint,
    lines: Sequence[Question],
    pictures: Path,
    *,
    partial: Path | None = None,
    operations: Operations = REFERENCE,
    device: torch.device = _CPU,
    on_progress: OnProgress = silent,
) -> Statistics:
    """Take statistics of every matrix product's input.

    Args:
        checkpoint: whose float decoder and vision model; one without vision reads the text alone.
        lines: questions with their answers.
        pictures: directory that their images are relative to.
        partial: directory in which finished layers are kept, so that the same call goes on after an interruption; the tensors
            of what is returned are mapped from there. None keeps everything in memory.
        operations: the sequential operations of a mixer.
        device: where a layer runs and its statistics are summed; what lies between layers stays on the host.
        on_progress: called with a stage's name, how much of it is done and how much there is: pictures, or positions.

    Raises:
        InputError: a question that gives no tokens, a picture that cannot be read, weights or activations that are not finite.
    """
    config = checkpoint.config.mamba
    text = tokenised(checkpoint, lines)
    sequences = _sequences(text, checkpoint.config.n_visual_tokens)
    positions = sum(s.length for s in sequences)
    header = Header(
        SCHEMA_VERSION,
        __version__,
        checkpoint.config.model_id,
        checkpoint.sha256(),
        _data_sha256(lines, [pictures / name for name in text.pictures]),
        len(lines),
        positions,
    )
    _warn_of_few(header, config)
    parts = Parts(partial, msgspec.json.encode(header))
    kept = parts.read_streams((positions, config.d_model))
    if kept is None:
        streams = _embedded(checkpoint, text, pictures, on_progress)
        parts.keep_streams(0, streams.numpy())
    else:
        streams = torch.from_numpy(kept)
    done = parts.finished()
    for index, block in enumerate(stream_blocks(checkpoint, operations, done), done):
        observed = ObservedBlock(block, index, config, positions, device)
        _stream(observed, streams, sequences, on_progress)
        parts.keep(index, observed.tensors())
        parts.keep_streams(index + 1, streams.numpy())
    if not parts.has(config.n_layer):
        parts.keep(config.n_layer, _head(checkpoint, streams))
    expected = {i: [t for s in LAYER_SITES for t in site_tensors(config, i, s)] for i in range(config.n_layer)}
    expected[config.n_layer] = site_tensors(config, None, HEAD)
    return Statistics(header, config, parts.tensors(expected), str(partial or "statistics"))


def _sequences(text: Questions, n_visual: int) -> list[_Sequence]:
    """Return pictures first, then the lines."""
    found = [_Sequence(i * n_visual, n_visual, is_picture=True) for i in range(len(text.pictures))]
    start = len(found) * n_visual
    for tokens, picture in zip(text.tokens, text.picture_of, strict=True):
        found.append(_Sequence(start, len(tokens), is_picture=False, after=picture))
        start += len(tokens)
    return found


def _data_sha256(lines: Sequence[Question], pictures: list[Path]) -> str:
    digest = hashlib.sha256(msgspec.json.encode([(line.image, line.prompt, line.answer) for line in lines]))
    for picture in pictures:
        digest.update(picture.read_bytes())
    return digest.hexdigest()


def _warn_of_few(header: Header, config: MambaConfig) -> None:
    advised = _ADVISED_POSITIONS_PER_INPUT * config.d_inner
    if header.lines < _ADVISED_LINES or header.positions < advised:
        log.warning(
            "calibration data: %d lines with %d positions; advisable are %d lines and %d positions (%d for each of the widest "
            "product's %d inputs)",
            header.lines, header.positions, _ADVISED_LINES, advised, _ADVISED_POSITIONS_PER_INPUT, config.d_inner,
        )  # fmt: skip


def _embedded(checkpoint: Checkpoint, text: Questions, pictures: Path, on_progress: OnProgress) -> Tensor:
    """Return the streams before the first layer, (positions, d_model) float32."""
    parts = []
    if text.pictures:
        parts.append(seen(checkpoint, [pictures / name for name in text.pictures], on_progress))
    table = checkpoint.decoder["backbone.embedding.weight"]
    tokens = torch.tensor([t for line in text.tokens for t in line])
    parts.append(require_finite("backbone.embedding.weight", table[tokens].float()))
    return torch.cat(parts)


def _batches(sequences: list[_Sequence]) -> Iterator[list[int]]:
    """Yield indices of sequences to be read together: equally long, pictures before the lines that go on from them."""

    def kind(i: int) -> tuple[bool, int]:
        return not sequences[i].is_picture, sequences[i].length

    for (_, length), alike in itertools.groupby(sorted(range(len(sequences)), key=kind), kind):
        indices, most = list(alike), max(1, _POSITIONS_AT_ONCE // length)
        for start in range(0, len(indices), most):
            yield indices[start : start + most]


class ObservedBlock:
    """One block, and what enters its products."""

    def __init__(self, block: Block, index: int, config: MambaConfig, positions: int, device: torch.device = _CPU) -> None:
        self.block, self.index, self.config, self.device = block.to(device), index, config, device
        with device:
            self.unit = RMSNorm(config.d_model, config.norm_eps)  # the block's norm without its weight
        self.sites = {site: Site(site_name(index, site), site_width(config, site), positions, device) for site in LAYER_SITES}
        self.block.mixer.x_proj.register_forward_hook(self._at_x_proj)
        self.block.mixer.out_proj.register_forward_pre_hook(self._at_out_proj)

    def _at_x_proj(self, _module: Any, inputs: tuple[Tensor], outputs: Tensor) -> None:
        self.sites["x_proj"].add(inputs[0])
        self.sites["dt_proj"].add(outputs[..., : self.block.mixer.dt_rank])

    def _at_out_proj(self, _module: Any, inputs: tuple[Tensor]) -> None:
        self.sites["out_proj"].add(inputs[0])

    def __call__(self, residual: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the block over residual (batch, seq, d_model); return what leaves it, and the state."""
        self.sites["in_proj"].add(self.unit(residual))
        out, conv, ssm = self.block.mixer(self.block.norm(residual), conv, ssm)
        return residual + out, conv, ssm

    def tensors(self) -> dict[str, np.ndarray]:
        """Return what is stored of the layer."""
        return {
            **self.sites["in_proj"].tensors(self.block.norm.weight.cpu().numpy(), "unit"),
            **self.sites["x_proj"].tensors(),
            **self.sites["dt_proj"].tensors(),
            **self.sites["out_proj"].tensors(rotation="own"),
        }


def _stream(block: ObservedBlock, streams: Tensor, sequences: list[_Sequence], on_progress: OnProgress) -> None:
    """Run every sequence through a block, and put what leaves it in the place of what entered."""
    config, stage, done = block.config, f"layer {block.index + 1} of {block.config.n_layer}", 0
    nothing = tuple(torch.zeros(config.d_inner, n, device=block.device) for n in (config.d_conv, config.d_state))
    after: dict[int | None, tuple[Tensor, ...]] = {None: nothing}
    on_progress(stage, 0, len(streams))
    for batch in _batches(sequences):
        members = [sequences[i] for i in batch]
        conv, ssm = (torch.stack([after[s.after][part] for s in members]) for part in (0, 1))
        out, conv, ssm = block(torch.stack([streams[s.rows] for s in members]).to(block.device), conv, ssm)
        out = out.to(streams.device)
        for row, (index, sequence) in enumerate(zip(batch, members, strict=True)):
            streams[sequence.rows] = out[row]
            if sequence.is_picture:
                after[index] = conv[row], ssm[row]
            done += sequence.length
        on_progress(stage, done, len(streams))


def _head(checkpoint: Checkpoint, streams: Tensor) -> dict[str, np.ndarray]:
    """Return what is stored of the head, from the streams after the last layer."""
    config, name = checkpoint.config.mamba, "backbone.norm_f.weight"
    unit, site = RMSNorm(config.d_model, config.norm_eps), Site(HEAD, config.d_model, len(streams))
    for start in range(0, len(streams), _POSITIONS_AT_ONCE):
        site.add(unit(streams[start : start + _POSITIONS_AT_ONCE]))
    return site.tensors(require_finite(name, checkpoint.decoder[name].float()).numpy(), "own")
