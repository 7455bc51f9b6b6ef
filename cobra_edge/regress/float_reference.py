"""What the float model itself says to a suite's lines: the truth that every build is compared with.

Plain torch in float32, one layer in memory at a time: all pictures, then all questions from the states those left, then all
answers, teacher-forced. Run in 16 bits (products with weights take rounded operands and give rounded results, as a GPU's do,
the recurrence stays float32) it is the noise floor: what is lost with nothing quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.checkpoint import Checkpoint
from ..model.cobra import stream_blocks
from ..model.config import MambaConfig
from ..model.mamba import Block, RMSNorm
from .asked import AskedLine, reply_limit
from .sketch import sketched

NARROW = {"fp16": torch.float16, "bf16": torch.bfloat16}
_POSITIONS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class FloatReading:
    """What the float model made of a line.

    Attributes:
        logits: (n_text - 1, vocab) float32, after each token of question and answer but the last.
        state: (n_layer, SKETCH) float32, of the recurrent state after them.
        reply: tokens of its own greedy answer without the end token; empty where it was not asked for.
    """

    logits: np.ndarray
    state: np.ndarray
    reply: tuple[int, ...]


@torch.inference_mode()
def float_readings(
    checkpoint: Checkpoint,
    lines: Sequence[AskedLine],
    embeddings: Sequence[np.ndarray],
    *,
    precision: str | None = None,
    replies_end_with: int | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> Iterator[FloatReading]:
    """Yield the reading of each line, in order; what is in memory at once does not depend on how many there are.

    Args:
        checkpoint: whose decoder.
        lines: tokenised; those about one picture should follow each other, so that it is read once.
        embeddings: (n_visual_tokens, d_model) float32 of each picture, by `AskedLine.picture`.
        precision: "fp16" or "bf16" for the noise floor; None is float32.
        replies_end_with: the end token, where free answers are wanted too.
        on_layer: called after each layer of each of `batches`, for progress.

    Raises:
        InputError: logits that are not finite; a weight that is not, by name.
    """
    for batch in batches(lines, checkpoint.config.n_visual_tokens):
        used = sorted({line.picture for line in batch if line.picture is not None})
        index = {picture: i for i, picture in enumerate(used)}
        seen = [torch.from_numpy(embeddings[picture]) for picture in used]
        reader = _Reader(checkpoint, batch, [None if p.picture is None else index[p.picture] for p in batch], precision)
        yield from reader.read(seen, replies_end_with, on_layer)


def batches(lines: Sequence[AskedLine], n_visual_tokens: int) -> list[list[AskedLine]]:
    """Return lines in runs of some thousand positions, pictures counted once a run."""
    found, pictures, positions = list[list[AskedLine]]([[]]), set[int](), 0
    for line in lines:
        new = {line.picture} - pictures - {None}
        size = len(line.tokens) + (n_visual_tokens if new else 0)
        if found[-1] and positions + size > _POSITIONS_AT_ONCE:
            found.append([])
            pictures, positions = set(), 0
            size = len(line.tokens) + (n_visual_tokens if line.picture is not None else 0)
        found[-1].append(line)
        pictures |= {line.picture} if line.picture is not None else set()
        positions += size
    return found


def narrowed(module: nn.Module, precision: str | None) -> nn.Module:
    """Have every product with weights in a module round operands and result to 16 bits; None leaves it as it is."""
    if precision is None:
        return module
    dtype = NARROW[precision]

    def rounded_inputs(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_rounded(i, dtype) for i in inputs)

    for product in module.modules():
        if isinstance(product, nn.Linear | nn.Conv2d):
            product.weight.data = _rounded(product.weight.data, dtype)
            product.register_forward_pre_hook(rounded_inputs)
            product.register_forward_hook(lambda _module, _inputs, output: _rounded(output, dtype))
    return module


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).float()


@dataclass(eq=False)
class _States:
    """One layer's states of several sequences: conv (n, d_inner, d_conv) and ssm (n, d_inner, d_state) float32."""

    conv: Tensor
    ssm: Tensor

    @classmethod
    def zeros(cls, config: MambaConfig, n: int) -> _States:
        return cls(torch.zeros(n, config.d_inner, config.d_conv), torch.zeros(n, config.d_inner, config.d_state))

    def of(self, rows: Sequence[int]) -> _States:
        return _States(self.conv[list(rows)], self.ssm[list(rows)])


class _Reader:
    """One batch of lines on its way through the layers."""

    def __init__(
        self, checkpoint: Checkpoint, lines: list[AskedLine], picture_of: list[int | None], precision: str | None
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config.mamba
        self.lines, self.picture_of, self.precision = lines, picture_of, precision
        self.table = checkpoint.decoder["backbone.embedding.weight"]

    def read(self, seen: list[Tensor], end: int | None, on_layer: Callable[[], None]) -> Iterator[FloatReading]:
        """Yield the reading of each line; `seen` are the pictures' embeddings."""
        lines, n = self.lines, len(self.lines)
        prompts = [self._embed(line.prompt) for line in lines]
        answers = [self._embed(line.answer[:-1]) for line in lines]
        sketches, after_prompt = list[np.ndarray](), list[_States]()
        for block in self._blocks():
            blind = _States.zeros(self.config, 1)  # the state of who sees nothing, behind the pictures'
            looked = _through(block, seen, _States.zeros(self.config, len(seen)))
            start = _States(torch.cat([looked.conv, blind.conv]), torch.cat([looked.ssm, blind.ssm]))
            asked = _through(block, prompts, start.of([len(seen) if p is None else p for p in self.picture_of]))
            told = _through(block, answers, asked)
            sketches.append(sketched(told.ssm.numpy()))
            if end is not None:
                after_prompt.append(asked)
            on_layer()
        heads = [self._logits(torch.cat([p, a])) for p, a in zip(prompts, answers, strict=True)]
        logits = [h.numpy() for h in heads]
        if self.precision is None and not all(np.isfinite(values).all() for values in logits):
            raise InputError("the float model itself gives logits that are not finite; the checkpoint is damaged or overflows")
        replies = [()] * n if end is None else self._replies(logits, after_prompt, end)
        for i in range(n):
            yield FloatReading(logits[i], np.stack([layer[i] for layer in sketches]), replies[i])

    def _replies(self, logits: list[np.ndarray], states: list[_States], end: int) -> list[tuple[int, ...]]:
        """Return greedy answers; where the given one is what the model says, teacher-forcing has already shown it."""
        replies = [tuple(line.answer[:-1]) for line in self.lines]
        said = [values[len(line.prompt) - 1 :].argmax(-1) for values, line in zip(logits, self.lines, strict=True)]
        open_ = [i for i, line in enumerate(self.lines) if line.answer != said[i].tolist()]
        if not open_:
            return replies
        rows = [layer.of(open_) for layer in states]
        new = {i: [int(said[i][0])] for i in open_}
        growing = [i for i in open_ if new[i][-1] != end]
        while growing:
            rows = [layer.of([open_.index(i) for i in growing]) for layer in rows]
            open_ = growing
            hidden = [self._embed([new[i][-1]]) for i in open_]
            rows = [_through(block, hidden, layer) for block, layer in zip(self._blocks(), rows, strict=True)]
            for i, row in zip(open_, hidden, strict=True):
                new[i].append(int(self._logits(row)[0].argmax()))
            growing = [i for i in open_ if new[i][-1] != end and len(new[i]) < reply_limit(self.lines[i])]
        for i, tokens in new.items():
            replies[i] = tuple(tokens[:-1] if tokens[-1] == end else tokens)
        return replies

    def _blocks(self) -> Iterator[Block]:
        for block in stream_blocks(self.checkpoint):
            narrowed(block, self.precision)
            yield block

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        rows = self.table[torch.tensor(list(tokens))].float()
        return rows if self.precision is None else _rounded(rows, NARROW[self.precision])

    def _logits(self, residual: Tensor) -> Tensor:
        if not hasattr(self, "_head"):
            norm = RMSNorm(self.config.d_model, self.config.norm_eps)
            norm.weight.data = self.checkpoint.decoder["backbone.norm_f.weight"].float()
            name = "backbone.embedding.weight" if self.config.tied else "lm_head.weight"
            head = nn.Linear(self.config.d_model, self.config.vocab, bias=False)
            head.weight.data = self.checkpoint.decoder[name].float()
            self._head = nn.Sequential(norm, narrowed(head, self.precision))
        return self._head(residual)


def _through(block: Block, hidden: list[Tensor], states: _States) -> _States:
    """Run sequences through a block, those of one length together.

    Args:
        block: norm and mixer.
        hidden: of each sequence (seq, d_model) float32; replaced by what comes out.
        states: before each of them.

    Returns:
        The states after each of them.
    """
    after = _States(torch.empty_like(states.conv), torch.empty_like(states.ssm))
    for length in sorted({len(h) for h in hidden}):
        rows = [i for i, h in enumerate(hidden) if len(h) == length]
        before, residual = states.of(rows), torch.stack([hidden[i] for i in rows])
        out, after.conv[rows], after.ssm[rows] = block.mixer(block.norm(residual), before.conv, before.ssm)
        for i, values in zip(rows, residual + out, strict=True):
            hidden[i] = values
    return after
