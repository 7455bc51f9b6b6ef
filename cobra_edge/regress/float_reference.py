"""Predictions of the float model: the reference that every build is compared with.

Plain torch in float32, one layer in memory at a time: first all images, then all questions from the states after them, then all
answers, teacher-forced. In 16 bits (operands and results of matrix products are rounded, as on a GPU; the recurrence stays
float32), it gives the noise floor: the drift without any quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..decode.native_operations import best_operations
from ..errors import InputError
from ..formats.model_config import MambaConfig
from ..model.checkpoint import Checkpoint
from ..model.cobra import load_vision, stream_blocks
from ..model.mamba import REFERENCE, Block, RMSNorm
from ..quantize.calibration_data import visual_embeddings
from ..quantize.streams import quick_products
from ..suite.tokenized import TokenizedLine, TokenizedSuite, reply_limit
from .metrics import log_softmax
from .predictions import Prediction, most_probable
from .state_sketch import state_sketch

NARROW = {"fp16": torch.float16, "bf16": torch.bfloat16}
_POSITIONS_AT_ONCE = 8192
_Module = TypeVar("_Module", bound=nn.Module)
# Embeddings (n_visual_tokens, d_model) float32 of images, by their index in the suite.
See = Callable[[Sequence[int]], Sequence[np.ndarray]]


@torch.inference_mode()
def float_predictions(
    checkpoint: Checkpoint,
    lines: Sequence[TokenizedLine],
    see: See,
    *,
    precision: str | None = None,
    replies_end_with: int | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> Iterator[Prediction]:
    """Yield the prediction of each line, in order; memory does not depend on the number of lines.

    Args:
        checkpoint: with the decoder.
        lines: those about one image should follow each other, so that it is read once.
        see: returns the embeddings (n_visual_tokens, d_model) float32 of images, by `TokenizedLine.image`.
        precision: "fp16" or "bf16" for the noise floor; None is float32.
        replies_end_with: the end token, to generate replies too; None for no replies.
        on_layer: called after each layer of each of `batches`, for progress.

    Raises:
        InputError: logits or weights that are not finite.
    """
    for batch in batches(lines, checkpoint.config.n_visual_tokens):
        used = sorted({line.image for line in batch if line.image is not None})
        looked = dict(zip(used, see(used), strict=True)) if used else {}
        yield from _Batch(checkpoint, batch, looked, precision).read(replies_end_with, on_layer)


def float_vision(checkpoint: Checkpoint, suite: TokenizedSuite, precision: str | None = None) -> See:
    """Return the function `see` of `float_predictions` for a suite, by the float vision tower or in 16 bits."""
    model = narrowed(load_vision(checkpoint), precision) if suite.images else None

    def see(images: Sequence[int]) -> Sequence[np.ndarray]:
        found: Tensor = visual_embeddings(checkpoint, [suite.load(image) for image in images], model=model)
        return list(found.numpy().reshape(len(images), -1, found.shape[-1]))

    return see


def batches(lines: Sequence[TokenizedLine], n_visual_tokens: int) -> list[list[TokenizedLine]]:
    """Split lines into batches of at most _POSITIONS_AT_ONCE positions, each image counted once per batch."""
    found, images, positions = list[list[TokenizedLine]]([[]]), set[int](), 0
    for line in lines:
        new = {line.image} - images - {None}
        size = len(line.tokens) + (n_visual_tokens if new else 0)
        if found[-1] and positions + size > _POSITIONS_AT_ONCE:
            found.append([])
            images, positions = set(), 0
            size = len(line.tokens) + (n_visual_tokens if line.image is not None else 0)
        found[-1].append(line)
        images |= {line.image} if line.image is not None else set()
        positions += size
    return found


def narrowed(module: _Module, precision: str | None) -> _Module:
    """Round operands and results of all linear and convolution layers of a module to 16 bits; None leaves it as it is."""
    if precision is None:
        return module
    dtype = NARROW[precision]

    def rounded_inputs(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_rounded(i, dtype) for i in inputs)

    for product in module.modules():
        if isinstance(product, nn.Linear | nn.Conv2d):
            product.weight = _constant(_rounded(product.weight, dtype))
            product.register_forward_pre_hook(rounded_inputs)
            product.register_forward_hook(lambda _module, _inputs, output: _rounded(output, dtype))
    return module


def _constant(values: Tensor) -> nn.Parameter:
    # Not `weight.data = …`: a module created in inference mode does not accept a tensor that was not.
    return nn.Parameter(values, requires_grad=False)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).float()


@dataclass(eq=False)
class _States:
    """States of one layer, of n sequences: conv (n, d_inner, d_conv) and ssm (n, d_inner, d_state) float32."""

    conv: Tensor
    ssm: Tensor

    @classmethod
    def zeros(cls, config: MambaConfig, n: int) -> _States:
        return cls(torch.zeros(n, config.d_inner, config.d_conv), torch.zeros(n, config.d_inner, config.d_state))

    def of(self, rows: Sequence[int]) -> _States:
        return _States(self.conv[list(rows)], self.ssm[list(rows)])


class _Batch:
    """A batch of lines on its way through the layers."""

    def __init__(
        self, checkpoint: Checkpoint, lines: list[TokenizedLine], embeddings: dict[int, np.ndarray], precision: str | None
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config.mamba
        self.lines, self.embeddings, self.precision = lines, embeddings, precision
        self.table = checkpoint.decoder["backbone.embedding.weight"]
        norm = RMSNorm(self.config.d_model, self.config.norm_eps)
        norm.weight = _constant(checkpoint.decoder["backbone.norm_f.weight"].float())
        head = nn.Linear(self.config.d_model, self.config.vocab, bias=False)
        tied = "backbone.embedding.weight" if self.config.tied else "lm_head.weight"
        head.weight = _constant(checkpoint.decoder[tied].float())
        self.logits = nn.Sequential(norm, narrowed(head, precision))

    def read(self, end: int | None, on_layer: Callable[[], None]) -> Iterator[Prediction]:
        """Yield the prediction of each line."""
        index = {image: i for i, image in enumerate(self.embeddings)}
        images = [torch.from_numpy(embeddings) for embeddings in self.embeddings.values()]
        starts = [len(index) if line.image is None else index[line.image] for line in self.lines]
        prompts = [self._embed(line.prompt) for line in self.lines]
        answers = [self._embed(line.answer[:-1]) for line in self.lines]
        choosing = [i for i, line in enumerate(self.lines) for _ in line.choices]
        choices = [self._embed(choice[:-1]) for line in self.lines for choice in line.choices]
        sketches, after_prompt = list[np.ndarray](), list[_States]()
        for block in self._blocks():
            # Of operands that are rounded to bfloat16 already, products of bfloat16 differ in the order of their sums alone.
            with quick_products() if self.precision == "bf16" else nullcontext():
                looked = _through(block, images, _States.zeros(self.config, len(images)))
                empty = _States.zeros(self.config, 1)  # of lines without an image, after those of the images
                start = _States(torch.cat([looked.conv, empty.conv]), torch.cat([looked.ssm, empty.ssm]))
                after = _through(block, prompts, start.of(starts))
                told = _through(block, answers, after)
                _through(block, choices, after.of(choosing))
            sketches.append(state_sketch(told.ssm.numpy()))
            if end is not None:
                after_prompt.append(after)
            on_layer()
        replies: list[tuple[int, ...]] = [()] * len(self.lines)
        if end is not None:
            forced = [self.logits(torch.cat([p[-1:], a])).argmax(-1).tolist() for p, a in zip(prompts, answers, strict=True)]
            replies = self._replies(forced, after_prompt, end)
            left = iter(choices)
            for i, line in enumerate(self.lines):
                if line.choices:
                    read = [self._log_probability(prompts[i], next(left), choice) for choice in line.choices]
                    replies[i] = most_probable(line.choices, read)
        for i, line in enumerate(self.lines):
            logits = self.logits(torch.cat([prompts[i], answers[i]])).numpy()
            if self.precision is None and not np.isfinite(logits).all():
                raise InputError(
                    f"line {line.number}: the logits of the float model are not finite; the checkpoint is damaged or overflows"
                )
            embeddings = None if line.image is None else self.embeddings[line.image]
            yield Prediction(log_softmax(logits), np.stack([layer[i] for layer in sketches]), replies[i], embeddings)

    def _replies(self, forced: list[list[int]], states: list[_States], end: int) -> list[tuple[int, ...]]:
        """Return greedy replies, without the end token; of lines with choices none are generated.

        Args:
            forced: most probable tokens of each line, teacher-forced; if they equal the given answer, that is the reply.
            states: of each layer, after the questions.
            end: the end token.
        """
        replies = [tuple(line.answer[:-1]) for line in self.lines]
        new = {i: [forced[i][0]] for i, line in enumerate(self.lines) if line.answer != forced[i] and not line.choices}
        going = list(new)
        rows = [layer.of(going) for layer in states]
        in_memory = bool(new) and not self.config.is_large
        kept = list(self._blocks(for_a_token=True)) if in_memory else []  # else read again for every token
        while True:
            left = [i for i in going if new[i][-1] != end and len(new[i]) < reply_limit(self.lines[i])]
            if not left:
                break
            rows = [layer.of([going.index(i) for i in left]) for layer in rows]
            going, hidden = left, [self._embed([new[i][-1]]) for i in left]
            rows = [
                _through(block, hidden, layer)
                for block, layer in zip(kept or self._blocks(for_a_token=True), rows, strict=True)
            ]
            for i, row in zip(going, hidden, strict=True):
                new[i].append(int(self.logits(row)[0].argmax()))
        for i, tokens in new.items():
            replies[i] = tuple(tokens[:-1] if tokens[-1] == end else tokens)
        return replies

    def _log_probability(self, prompt: Tensor, choice: Tensor, tokens: Sequence[int]) -> float:
        """Return the log probability of a choice from the last layer's outputs after prompt and choice, (seq, d_model) each."""
        log_probs = log_softmax(self.logits(torch.cat([prompt[-1:], choice])).numpy())
        return float(log_probs[range(len(tokens)), list(tokens)].sum())

    def _blocks(self, *, for_a_token: bool = False) -> Iterator[Block]:
        for_a_token = for_a_token and self.precision is None  # `narrowed` rounds whole matrices
        # Only the float32 reference must be plain torch.
        operations = REFERENCE if self.precision is None else best_operations()
        for block in stream_blocks(self.checkpoint, operations, for_a_token=for_a_token):
            yield narrowed(block, self.precision)

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        rows = self.table[torch.tensor(list(tokens))].float()
        return rows if self.precision is None else _rounded(rows, NARROW[self.precision])


def _through(block: Block, hidden: list[Tensor], states: _States) -> _States:
    """Run sequences through a block, those of equal length as a batch.

    Args:
        block: norm and mixer.
        hidden: of each sequence, (seq, d_model) float32; replaced by the output.
        states: before each sequence.

    Returns:
        The states after each sequence.
    """
    after = _States(torch.empty_like(states.conv), torch.empty_like(states.ssm))
    for length in sorted({len(h) for h in hidden}):
        rows = [i for i, h in enumerate(hidden) if len(h) == length]
        before, residual = states.of(rows), torch.stack([hidden[i] for i in rows])
        out, after.conv[rows], after.ssm[rows] = block(residual, before.conv, before.ssm)
        for i, values in zip(rows, out, strict=True):
            hidden[i] = values
    return after
