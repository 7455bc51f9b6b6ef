"""Residual streams of a calibration set: which positions belong to which image or line, and how a layer reads them.

Lines that share an image share its visual positions: an image is read once, and every line continues from the state after it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.hadamard import hadamard_factors, hadamard_matrix
from ..formats.model_config import MambaConfig
from ..suite.tokenized import TokenizedSuite

# A layer on some sequences: residual (batch, seq, d_model), conv and ssm states to output and both states.
Layer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Span:
    """Consecutive positions that are read one after the other: an image, or a line after its image.

    Attributes:
        start, length: its rows of a stream.
        image: index of the image, or of the image that the line continues from; None for a line without one.
        is_image: whether it is the image itself.
        answer: number of positions at its end whose logits predict a token of the answer.
    """

    start: int
    length: int
    image: int | None
    is_image: bool
    answer: int = 0

    @property
    def rows(self) -> slice:
        """Its rows of a stream (positions, …)."""
        return slice(self.start, self.start + self.length)

    @property
    def answer_rows(self) -> range:
        """Rows whose logits predict tokens of the answer."""
        return range(self.start + self.length - self.answer, self.start + self.length)


# Spans that a layer reads together: batches of equal length, the images first and then the lines that continue from them.
Family = list[list[Span]]


def spans_of(suite: TokenizedSuite, n_visual_tokens: int, *, whole: bool = True) -> list[Span]:
    """Return the spans of a suite in the order of their rows: images, then lines.

    Args:
        suite: tokenized.
        n_visual_tokens: of an image.
        whole: lines with their last token; without it, each position predicts the next token.
    """
    spans = [Span(i * n_visual_tokens, n_visual_tokens, i, is_image=True) for i in range(len(suite.images))]
    start = len(spans) * n_visual_tokens
    for line in suite.lines:
        length = len(line.tokens if whole else line.inputs)
        spans.append(Span(start, length, line.image, is_image=False, answer=len(line.inputs) - line.answer_from))
        start += length
    return spans


def families(spans: Sequence[Span], most_positions: int) -> Iterator[Family]:
    """Group spans into families of about `most_positions` positions at most: whole images with all of their lines.

    Lines without an image form families of their own.
    """
    of_image: dict[int | None, list[Span]] = {}
    for span in spans:
        of_image.setdefault(span.image, []).append(span)
    lonely = [[span] for span in of_image.pop(None, [])]
    group, size = list[Span](), 0
    for members in [*lonely, *of_image.values()]:
        length = sum(span.length for span in members)
        if group and size + length > most_positions:
            yield _batches(group)
            group, size = [], 0
        group, size = group + members, size + length
    if group:
        yield _batches(group)


def _batches(spans: list[Span]) -> Family:
    def kind(span: Span) -> tuple[bool, int]:
        return not span.is_image, span.length

    return [list(alike) for _, alike in itertools.groupby(sorted(spans, key=kind), kind)]


def run_family(
    layer: Layer,
    family: Family,
    config: MambaConfig,
    read: Callable[[list[Span]], Tensor],
    device: torch.device = _CPU,
) -> Iterator[tuple[list[Span], Tensor, Tensor]]:
    """Run a layer over a family; yields batches with the layer's input and output, (batch, seq, width) float32.

    Args:
        layer: of the decoder, or a part of it that keeps states.
        family: of spans.
        config: sizes of the decoder.
        read: returns the input of a batch of spans.
        device: of the layer.
    """
    empty = [torch.zeros(config.d_inner, n, device=device) for n in (config.d_conv, config.d_state)]
    after: dict[int | None, list[Tensor]] = {None: empty}
    for batch in family:
        starts = [after[None if span.is_image else span.image] for span in batch]
        conv, ssm = (torch.stack([start[part] for start in starts]) for part in (0, 1))
        x = read(batch)
        out, conv, ssm = layer(x, conv, ssm)
        after |= {span.image: [conv[i], ssm[i]] for i, span in enumerate(batch) if span.is_image}
        yield batch, x, out


@contextmanager
def quick_products() -> Iterator[None]:
    """Let processors with bfloat16 products round the inputs of float32 matmuls to it within the block; sums stay float32.

    For passes over calibration data, whose rounding is far below what quantization does to the same values. Where a processor
    has none, products stay as they are.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rows_of(batch: list[Span]) -> Tensor:
    """Return the rows of a batch of spans of equal length, (batch, seq) int64."""
    return torch.stack([torch.arange(span.start, span.start + span.length) for span in batch])


def rotated(x: Tensor) -> Tensor:
    """Return R x for each row of x (positions, n) float32, of its shape; R is that of `hadamard.rotate`, as two products."""
    left, right = _rotation(x.shape[1])
    return (left @ (x.reshape(len(x), len(left), len(right)) @ right)).reshape(x.shape)


@functools.cache
def _rotation(width: int) -> tuple[Tensor, Tensor]:
    """Return the two factors of R, orthonormal; the second is symmetric."""
    left, right = (torch.from_numpy(hadamard_matrix(order)) / math.sqrt(order) for order in hadamard_factors(width))
    return left, right
