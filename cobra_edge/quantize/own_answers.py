"""Answers of the float model to calibration lines that have none: greedy, many lines at once, one layer in memory at a time.

A group of lines is read layer by layer, as in `streams`; each line keeps its states of all layers. Then every token step runs
through all layers again, with the lines that have not ended. The memory of the states bounds the lines of a group.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from ..errors import InputError
from ..inputs.text import TextCodec
from ..model.checkpoint import Checkpoint
from ..model.cobra import stream_blocks
from ..model.mamba import Block, Operations, RMSNorm
from ..model.weight_files import require_finite
from ..suite.line_set import LineSet
from ..suite.tokenized import TokenizedLine
from ..terminal.output import tell
from ..version import __version__
from .calibration_data import EmbeddingCache, OnProgress, calibration_suite, data_sha256, no_progress
from .streams import Span, families, rows_of, run_family

LONGEST_ANSWER = 48  # tokens
_POSITIONS_AT_ONCE = 2048
_STATE_BYTES = 4 << 30  # of the states of a group, unless a single image has more lines
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Greedy:
    """How answers are generated.

    Attributes:
        operations: sequential operations of a mixer.
        device: runs the layers and holds the states.
        on_progress: called with the name of the step, and how many positions of images, prompts and answers are done.
        limit: tokens of the longest answer.
    """

    operations: Operations
    device: torch.device = _CPU
    on_progress: OnProgress = no_progress
    limit: int = LONGEST_ANSWER


def with_own_answers(
    checkpoint: Checkpoint, lines: LineSet, cache: EmbeddingCache, greedy: Greedy, kept: Path | None = None
) -> LineSet:
    """Return the lines with answers: those given, and the float model's own where there are none.

    Lines whose answer is empty are left out; how many, and how many answers were cut at the limit, is said in one line.

    Args:
        checkpoint: with its float decoder and vision model.
        lines: some of them without answers; if all have one, they are returned unchanged.
        cache: visual embeddings that other steps share.
        greedy: how answers are generated.
        kept: file that holds finished groups, so that an interrupted run resumes; left at the end, for the caller to remove.

    Raises:
        InputError: every answer is empty, an image cannot be read, or weights or logits are not finite.
    """
    asked = [line for line in lines.lines if not line.answer]
    if not asked:
        return lines
    codec = TextCodec.open(checkpoint.tokenizer_file(), checkpoint.config.mamba.vocab)
    tokens = own_answers(checkpoint, replace(lines, lines=asked), cache, greedy, kept)
    texts = [codec.decode(answer).rstrip("\ufffd").strip() for answer in tokens]  # a cut may split a character
    empty, cut = sum(not text for text in texts), sum(len(answer) == greedy.limit for answer in tokens)
    if empty == len(lines.lines):
        raise InputError(
            f"{lines.name}: the float model's answers to all {empty} lines are empty, it ends at once; give lines with "
            "answers, or check the checkpoint"
        )
    left_out = f", {empty} of them empty and left out" if empty else ""
    were_cut = f", {cut} cut at {greedy.limit} tokens" if cut else ""
    tell(f"{lines.name}: {len(texts)} answers by the float model, {sum(map(len, tokens))} tokens{left_out}{were_cut}")
    own = iter(texts)
    found = [line if line.answer else msgspec.structs.replace(line, answer=next(own)) for line in lines.lines]
    return replace(lines, lines=[line for line in found if line.answer])


@torch.inference_mode()
def own_answers(
    checkpoint: Checkpoint, lines: LineSet, cache: EmbeddingCache, greedy: Greedy, kept: Path | None = None
) -> list[list[int]]:
    """Return the tokens of the float model's greedy answer to each line, without the end token; as `with_own_answers`."""
    suite = calibration_suite(checkpoint, lines.lines, lines.directory, answered=False)
    inputs = __version__, checkpoint.sha256(), data_sha256(suite), greedy.limit
    identity = hashlib.sha256(msgspec.json.encode(inputs)).hexdigest()
    answers = _Answers.resumed(kept, identity)
    model = _Model(checkpoint, greedy)
    groups = _groups(suite.lines, max(1, _STATE_BYTES // model.state_bytes))
    for number, group in enumerate(groups):
        if all(line.number in answers.tokens for line in group):
            continue
        name = "answers of the float model" + (f", group {number + 1} of {len(groups)}" if len(groups) > 1 else "")
        files = [lines.directory / suite.images[i] for i in _images(group)]
        visual = cache.get(files, greedy.on_progress).to(greedy.device) if files else None
        found = model.answer(group, visual, name)
        answers.keep({line.number: tokens for line, tokens in zip(group, found, strict=True)}, kept)
    return [answers.tokens[line.number] for line in suite.lines]


class _Answers(msgspec.Struct):
    """Finished answers, token ids by line number, of the inputs with a hash."""

    identity: str
    tokens: dict[int, list[int]]

    @classmethod
    def resumed(cls, file: Path | None, identity: str) -> _Answers:
        """Return what a file holds, or nothing if it is of other inputs."""
        if file is not None and file.is_file():
            try:
                found = msgspec.json.decode(file.read_bytes(), type=cls)
            except msgspec.DecodeError:
                found = cls("", {})
            if found.identity == identity:
                return found
        return cls(identity, {})

    def keep(self, found: dict[int, list[int]], file: Path | None) -> None:
        self.tokens |= found
        if file is not None:
            staged = file.with_name(f"{file.name}.new")
            staged.write_bytes(msgspec.json.encode(self))
            os.replace(staged, file)


def _groups(lines: Sequence[TokenizedLine], most: int) -> list[list[TokenizedLine]]:
    """Group lines, all those of an image together, into groups of about `most` lines at most."""
    groups = [list[TokenizedLine]()]
    for _, alike in itertools.groupby(sorted(lines, key=_image), _image):
        of_image = list(alike)
        for part in [of_image] if of_image[0].image is not None else [[line] for line in of_image]:
            if groups[-1] and len(groups[-1]) + len(part) > most:
                groups.append([])
            groups[-1] += part
    return groups


def _image(line: TokenizedLine) -> int:
    return -1 if line.image is None else line.image


def _images(group: Sequence[TokenizedLine]) -> list[int]:
    return sorted({line.image for line in group if line.image is not None})


class _Layer:
    """A layer for `run_family` that keeps the states after the last batch."""

    def __init__(self, block: Block) -> None:
        self._block, self.states = block, list[Tensor]()

    def __call__(self, x: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, *self.states = self._block(x, conv, ssm)
        return out, *self.states


class _Model:
    """The float decoder, streamed, with the states of a group of lines."""

    def __init__(self, checkpoint: Checkpoint, greedy: Greedy) -> None:
        self._checkpoint, self._greedy, self._config = checkpoint, greedy, checkpoint.config.mamba
        c = self._config
        self._shapes = [(c.d_inner, c.d_conv), (c.d_inner, c.d_state)]
        self.state_bytes = 4 * c.n_layer * sum(rows * columns for rows, columns in self._shapes)
        self._end = TextCodec.open(checkpoint.tokenizer_file(), c.vocab).end_id
        self._table = self._tensor("backbone.embedding.weight")
        self._head = self._table if c.tied else self._tensor("lm_head.weight")
        self._norm = RMSNorm(c.d_model, c.norm_eps)
        self._norm.weight.data = self._tensor("backbone.norm_f.weight")

    def _tensor(self, name: str) -> Tensor:
        return require_finite(name, self._checkpoint.decoder[name].float()).to(self._greedy.device)

    def answer(self, group: Sequence[TokenizedLine], visual: Tensor | None, name: str) -> list[list[int]]:
        """Return the answer of each line of a group.

        Args:
            group: lines, all of an image together.
            visual: embeddings (images · n_visual_tokens, d_model) float32 of their images, in order; None for no image.
            name: of the step, for progress.
        """
        n_layer, device, limit = self._config.n_layer, self._greedy.device, self._greedy.limit
        states = [torch.empty(n_layer, len(group), *shape, device=device) for shape in self._shapes]
        read = sum(len(line.prompt) for line in group) + (0 if visual is None else len(visual))

        def on_done(done: float) -> None:
            self._greedy.on_progress(name, int(done), read + limit * len(group))

        tokens = self._next(self._read(group, visual, states, lambda layers: on_done(read * layers / n_layer)))
        answers, active = [list[int]() for _ in group], torch.arange(len(group), device=device)
        for step in range(1, limit + 1):
            goes_on = tokens != self._end
            active, tokens = active[goes_on], tokens[goes_on]
            for line, token in zip(active.tolist(), tokens.tolist(), strict=True):
                answers[line].append(token)
            on_done(read + (step if len(active) else limit) * len(group))
            if step == limit or not len(active):
                break
            tokens = self._next(self._step(tokens, active, states))
        return answers

    def _read(
        self,
        group: Sequence[TokenizedLine],
        visual: Tensor | None,
        states: list[Tensor],
        on_layers: Callable[[int], None],
    ) -> Tensor:
        """Read images and prompts; fills the states and returns each line's last stream, (lines, d_model) float32."""
        spans, line_at = self._spans(group)
        tokens = torch.tensor([token for line in group for token in line.prompt])
        stream = torch.cat([*([] if visual is None else [visual]), self._table[tokens]])

        def read(batch: list[Span]) -> Tensor:
            return stream[rows_of(batch)]

        for index, block in self._blocks():
            on_layers(index)
            layer = _Layer(block)
            for family in families(spans, _POSITIONS_AT_ONCE):
                for batch, _, out in run_family(layer, family, self._config, read, self._greedy.device):
                    stream[rows_of(batch)] = out
                    if not batch[0].is_image:
                        at = torch.tensor([line_at[span.start] for span in batch])
                        for state, new in zip(states, layer.states, strict=True):
                            state[index, at] = new
        return stream[torch.tensor([start + len(group[line].prompt) - 1 for start, line in line_at.items()])]

    def _spans(self, group: Sequence[TokenizedLine]) -> tuple[list[Span], dict[int, int]]:
        """Return spans of images and prompts, and the index of the line by the start of its span."""
        n = self._checkpoint.config.n_visual_tokens
        spans = [Span(i * n, n, image, is_image=True) for i, image in enumerate(_images(group))]
        start, line_at = len(spans) * n, dict[int, int]()
        for index, line in enumerate(group):
            line_at[start] = index
            spans.append(Span(start, len(line.prompt), line.image, is_image=False))
            start += len(line.prompt)
        return spans, line_at

    def _step(self, tokens: Tensor, active: Tensor, states: list[Tensor]) -> Tensor:
        """Read one token of each active line; returns their streams, (active, d_model) float32."""
        x = self._table[tokens][:, None]
        for index, block in self._blocks(for_a_token=True):
            x, *new = block(x, *(state[index, active] for state in states))
            for state, values in zip(states, new, strict=True):
                state[index, active] = values
        return x[:, 0]

    def _blocks(self, *, for_a_token: bool = False) -> Iterator[tuple[int, Block]]:
        blocks = stream_blocks(self._checkpoint, self._greedy.operations, for_a_token=for_a_token)
        for index, block in enumerate(blocks):
            yield index, block.to(self._greedy.device)

    def _next(self, stream: Tensor) -> Tensor:
        """Return the most probable token of each line, (lines,) int64, from its last stream (lines, d_model) float32."""
        logits = self._norm(stream) @ self._head.T
        if not torch.isfinite(logits).all():
            raise InputError("the float model gives logits that are not finite; the checkpoint is damaged or overflows")
        return logits.argmax(-1)
