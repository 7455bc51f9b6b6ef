"""Collect guidance: stream a calibration set forward through the float model, then gradients backward, layer by layer.

Forward, the residual stream before each layer is kept on disk. Backward, each layer is run again from there with gradients,
image by image with the lines that continue from it, and the gradient of the stream goes on to the layer below. A streamed
gradient is that of the whole model, up to the rounding of the stored streams.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..formats.recipe import MIXED, Recipe, storages
from ..model.checkpoint import Checkpoint
from ..model.cobra import load_block, stream_blocks
from ..model.mamba import Block, Operations, RMSNorm
from ..model.weight_files import require_finite
from ..suite.tokenized import TokenizedSuite
from .calibration_data import EmbeddingCache, OnProgress
from .costs import expected_costs, unexplained
from .fisher import fisher_rows
from .gptq import EMBEDDING_DAMPING
from .guidance import (
    HEAD,
    HEAD_ROWS,
    TABLE,
    Guidance,
    Header,
    costs_name,
    head_tensors,
    layer_tensors,
    table_tensors,
    weights_name,
)
from .moments import WeightedMoments
from .resume import Resume
from .sensitivity import CANDIDATE_SCHEMES
from .statistics import LAYER_PROJECTIONS, projection_name, projection_width
from .stream_files import StreamFiles
from .streams import Family, Span, families, quick_products, rotated, rows_of, run_family
from .transforms import transformed_tensor

_POSITIONS_AT_ONCE = 2048
_LOGITS_AT_ONCE = 512  # positions


@dataclass(frozen=True, eq=False)
class CalibrationPass:
    """A calibration set as every pass over the layers reads it.

    Attributes:
        checkpoint: with its float decoder.
        suite: tokenized lines.
        spans: of the suite, without the last token of each line.
        streams: between the layers of the float model.
        operations: sequential operations of a mixer; `collect_guidance` needs their derivatives.
        on_progress: called with the name of the step, and how many positions are done.
    """

    checkpoint: Checkpoint
    suite: TokenizedSuite
    spans: list[Span]
    streams: StreamFiles
    operations: Operations
    on_progress: OnProgress

    @property
    def positions(self) -> int:
        """Number of positions."""
        return self.spans[-1].start + self.spans[-1].length

    def families(self) -> list[Family]:
        """Return the spans that are run together."""
        return list(families(self.spans, _POSITIONS_AT_ONCE))

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor of the decoder by name, of its shape, float32; raises InputError if it is not finite."""
        return require_finite(name, self.checkpoint.decoder[name].float()).numpy()


@torch.inference_mode()
def stream_forward(run: CalibrationPass, images: Path, cache: EmbeddingCache) -> None:
    """Run the float model over the set and keep the stream before each layer; streams that exist are kept.

    Raises:
        InputError: an image cannot be read, or weights or activations are not finite.
    """
    config, first = run.checkpoint.config.mamba, run.streams.last()
    if first is None:
        parts = [cache.get([images / name for name in run.suite.images], run.on_progress)] if run.suite.images else []
        tokens = torch.tensor([t for line in run.suite.lines for t in line.inputs])
        table = torch.from_numpy(run.tensor("backbone.embedding.weight"))
        run.streams.write(0, torch.cat([*parts, table[tokens]]))
        first = 0
    stream, all_families = run.streams.read_last(), run.families()
    for index, block in enumerate(stream_blocks(run.checkpoint, run.operations, first), first):
        step, done = f"float layer {index + 1} of {config.n_layer}", 0

        def read(batch: list[Span], stream: Tensor = stream) -> Tensor:
            return stream[rows_of(batch)]

        run.on_progress(step, 0, run.positions)
        for family in all_families:
            with quick_products():
                for batch, _, out in run_family(block, family, config, read):
                    stream[rows_of(batch)] = out
                    done += rows_of(batch).numel()
            run.on_progress(step, done, run.positions)
        if not torch.isfinite(stream).all():
            raise InputError(
                f"backbone.layers.{index}: its output holds NaN or infinity; the checkpoint is damaged or overflows"
            )
        run.streams.write(index + 1, stream)


def collect_guidance(run: CalibrationPass, header: Header, resume: Resume) -> Guidance:
    """Collect guidance from the streams of `stream_forward`.

    Args:
        run: whose operations have derivatives.
        header: of the result; its rotations are those of the recipe that will be guided.
        resume: keeps finished layers: part 0 is the head, part 1 the last layer, the last part the embedding.

    Raises:
        InputError: weights or gradients that are not finite; the message names the tensor or layer.
    """
    config = run.checkpoint.config.mamba
    n, backward = config.n_layer, _Backward(run, header)
    kept = resume.read_streams((run.positions, config.d_model))
    if kept is None:
        gradient, found = backward.head()
        resume.keep(0, found)
        resume.keep_streams(1, gradient.numpy())
    else:
        gradient = torch.from_numpy(kept)
    for part in range(max(1, resume.finished()), n + 1):
        resume.keep(part, backward.layer(n - part, gradient))
        resume.keep_streams(part + 1, gradient.numpy())
    head = resume.tensors({0: head_tensors(config)})
    resume.keep(n + 1, backward.embedding(gradient, head if config.tied else {}))
    expected = {0: head_tensors(config), n + 1: table_tensors(config)}
    expected |= {part: layer_tensors(header, n - part) for part in range(1, n + 1)}
    return Guidance(header, config, resume.tensors(expected))


class _Backward:
    """The parts of a backward pass, from the head down to the embedding."""

    def __init__(self, run: CalibrationPass, header: Header) -> None:
        self.run, self.header, self.config = run, header, run.checkpoint.config.mamba
        self.recipe = Recipe(MIXED, "guided", {}, rotations=header.rotations)  # type: ignore[arg-type] # of a recipe
        self.families = run.families()

    def head(self) -> tuple[Tensor, dict[str, np.ndarray]]:
        """Return the gradient of the last stream, (positions, d_model) float32, and the head's moment (and costs if untied)."""
        config, tied = self.config, self.config.tied
        name = "backbone.embedding.weight" if tied else "lm_head.weight"
        head = torch.from_numpy(self.run.tensor(name))
        norm = RMSNorm(config.d_model, config.norm_eps)
        norm.weight.data = torch.from_numpy(self.run.tensor("backbone.norm_f.weight"))
        stream, signs = self.run.streams.read(config.n_layer), torch.Generator().manual_seed(self.header.seed)
        gradient, moments, rows = torch.zeros_like(stream), WeightedMoments(1, config.d_model), torch.zeros(config.vocab)
        answers = [row for span in self.run.spans for row in span.answer_rows]
        for at in torch.split(torch.tensor(answers), _LOGITS_AT_ONCE):
            x = stream[at].requires_grad_()
            hidden = norm(x)
            v = fisher_rows((hidden @ head.T).detach(), signs)
            hidden.backward(v @ head)
            assert x.grad is not None
            gradient[at] = x.grad
            stored = hidden.detach()
            stored = rotated(stored) if self.recipe.rotates_residual else stored
            squares = v.square() / self.header.answers
            moments.add(stored, squares.mean(1, keepdim=True))
            rows += stored.square().sum(1) @ squares
        self._require_finite(gradient, "the head")
        found = {HEAD: moments.tensor()[0].numpy(), HEAD_ROWS: rows.numpy()}
        if not tied:
            found |= self._row_costs(name, found[HEAD], found[HEAD_ROWS])
        return gradient, found

    def embedding(self, gradient: Tensor, head: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the moment and costs of the embedding.

        Args:
            gradient: of the first stream, (positions, d_model) float32.
            head: the head's tensors, if the embedding is the head as well.
        """
        tokens = torch.tensor([t for line in self.run.suite.lines for t in line.inputs])
        text = gradient[self.run.positions - len(tokens) :]
        text = (rotated(text) if self.recipe.rotates_residual else text) / math.sqrt(self.header.answers)
        moment = (text.T @ text / self.config.vocab).numpy()
        rows = torch.zeros(self.config.vocab).index_add_(0, tokens, text.square().sum(1)).numpy()
        total = moment + head.get(HEAD, 0.0), rows + head.get(HEAD_ROWS, 0.0)
        return {TABLE: moment, **self._row_costs("backbone.embedding.weight", *total)}

    def _row_costs(self, name: str, moment: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        variances = unexplained(torch.from_numpy(moment), EMBEDDING_DAMPING)[None]
        return {costs_name(name): self._costs(name, variances, rows / rows.mean())}

    def _costs(self, name: str, variances: np.ndarray, row_weights: np.ndarray | None = None) -> np.ndarray:
        weight = transformed_tensor(name, self.run.tensor, self.recipe)
        fits = storages(self.config, name, CANDIDATE_SCHEMES)
        found = expected_costs(weight, variances, fits, row_weights)
        return np.array([found.get(s, np.nan) for s in CANDIDATE_SCHEMES], np.float32)

    def layer(self, index: int, gradient: Tensor) -> dict[str, np.ndarray]:
        """Turn the gradient of a layer's output, (positions, d_model) float32, into that of its input; return what is kept."""
        run, taps = self.run, _Taps(run_operations=self.run.operations)
        block = load_block(run.checkpoint, index, taps.operations).requires_grad_(False)
        taps.attach(block)
        stream, n, done = run.streams.read(index), self.header.groups, 0
        weights = {p: torch.zeros(run.positions, n) for p in LAYER_PROJECTIONS}
        moments = {p: _MeanMoment(n, projection_width(self.config, p)) for p in LAYER_PROJECTIONS}
        step = f"gradients of layer {index + 1} of {self.config.n_layer}"
        run.on_progress(step, 0, run.positions)
        for family in self.families:
            with quick_products():
                for at, tapped in self._tapped(block, taps, family, stream, gradient):
                    for projection, (inputs, output) in tapped.items():
                        w = weights[projection][at] = self._weights(projection, output)
                        moments[projection].add(self._stored(projection, inputs, block), w)
                    done += len(at)
            run.on_progress(step, done, run.positions)
        self._require_finite(gradient, f"layer {index}")
        found = {}
        for projection in LAYER_PROJECTIONS:
            name = f"{projection_name(index, projection)}.weight"
            # dt_proj is rounded to nearest: no column compensates
            variances = moments.pop(projection).variances(compensated=projection != "dt_proj")
            found[weights_name(index, projection)] = weights[projection].numpy()
            found[costs_name(name)] = self._costs(name, variances)
        return found

    def _tapped(
        self, block: Block, taps: _Taps, family: Family, stream: Tensor, gradient: Tensor
    ) -> Iterator[tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]:
        """Run a block over a family, forward and backward; the gradient of its output becomes that of its input.

        Yields, for each batch, its rows (positions,) int64, and inputs and outputs of each projection, with gradients.
        """

        def read(batch: list[Span]) -> Tensor:
            return stream[rows_of(batch)].requires_grad_()

        batches = list(run_family(block, family, self.config, read))
        torch.autograd.backward([out for _, _, out in batches], [gradient[rows_of(batch)] for batch, _, _ in batches])
        for (batch, x, _), tapped in zip(batches, taps.take(), strict=True):
            at = rows_of(batch).flatten()
            assert x.grad is not None
            gradient[at] = x.grad.flatten(0, 1)
            yield at, tapped

    def _weights(self, projection: str, output: Tensor) -> Tensor:
        """Return the weights of a batch, (positions, groups), from the gradient of a projection's output (batch, seq, out)."""
        gradient = torch.zeros_like(output) if output.grad is None else output.grad
        gradient = gradient.flatten(0, 1)
        if projection == "out_proj" and self.recipe.rotates_residual:
            gradient = rotated(gradient)
        return gradient.square_().reshape(len(gradient), self.header.groups, -1).mean(-1) / self.header.answers

    def _stored(self, projection: str, x: Tensor, block: Block) -> Tensor:
        """Return a projection's inputs (batch, seq, in) in the basis of its stored matrix, (positions, in)."""
        x = x.flatten(0, 1)
        if projection == "in_proj" and self.recipe.rotates_residual:
            unit = torch.where(block.norm.weight == 0, 0.0, x / block.norm.weight)
            return rotated(unit)
        return rotated(x) if projection == "out_proj" and self.recipe.rotates_out_proj else x

    def _require_finite(self, gradient: Tensor, where: str) -> None:
        if not torch.isfinite(gradient).all():
            raise InputError(
                f"gradients below {where} are not finite: activations overflow there on this data; use --method "
                "gptq, which needs no gradients"
            )


class _MeanMoment:
    """The second moment of a projection's inputs with the mean weight of all groups, and each group's share of it.

    Costs are expected with one factorization for all groups: they differ in how much their outputs count, little in where.
    """

    def __init__(self, groups: int, width: int) -> None:
        self._moment, self._energy = WeightedMoments(1, width), torch.zeros(groups, dtype=torch.float64)

    def add(self, x: Tensor, weights: Tensor) -> None:
        """Add positions x (positions, width) float32 with weights (positions, groups) float32."""
        self._moment.add(x, weights.mean(1, keepdim=True))
        self._energy += (x.square().sum(1) @ weights).double()

    def variances(self, *, compensated: bool) -> np.ndarray:
        """Return the variance of each input that counts for each group, (groups, in) float32; see `unexplained`."""
        moment = self._moment.tensor()[0]
        found = unexplained(moment) if compensated else moment.diagonal().numpy()
        shares = self._energy / (float(self._energy.mean()) or 1.0)
        return np.outer(shares.numpy(), found).astype(np.float32)


class _Taps:
    """Keeps inputs and outputs of each projection of a block, so that gradients at the outputs can be read."""

    def __init__(self, run_operations: Operations) -> None:
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {p: [] for p in LAYER_PROJECTIONS}
        self.operations = replace(run_operations, scan=lambda u, dt, *rest: run_operations.scan(u, self._dt(dt), *rest))

    def attach(self, block: Block) -> None:
        """Watch the projections of a block that runs `operations`."""
        for projection in ("in_proj", "x_proj", "out_proj"):

            def keep(_module: Any, inputs: tuple[Tensor], output: Tensor, projection: str = projection) -> None:
                output.retain_grad()
                self._kept[projection].append((inputs[0].detach(), output))

            getattr(block.mixer, projection).register_forward_hook(keep)
        self._rank = block.mixer.dt_rank

    def _dt(self, dt: Tensor) -> Tensor:
        dt.retain_grad()
        low = self._kept["x_proj"][-1][1].detach()[..., : self._rank]
        self._kept["dt_proj"].append((low, dt))
        return dt

    def take(self) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """Return and forget what was kept, by projection, for each batch since the last call."""
        found = [dict(zip(self._kept, row, strict=True)) for row in zip(*self._kept.values(), strict=True)]
        for kept in self._kept.values():
            kept.clear()
        return found
