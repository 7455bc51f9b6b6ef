"""Sequential guided GPTQ: each matrix is quantized with the inputs that the matrices quantized so far give it.

Two models are run side by side, a layer in memory at a time: the float one, whose streams are on disk, and the quantized one.
For inputs x of the former and x̂ of the latter, both in the basis of the stored matrix, and weights w of the guidance,

* H = Σ w x̂ x̂ᵀ is what GPTQ and the descent minimize over, and
* W + W (Σ w (x - x̂) x̂ᵀ) H⁻¹ is what they approximate: the matrix that maps x̂ closest to W x.

Sources: Frantar et al. 2023 (GPTQ); Kim et al., ICML 2025 (GuidedQuant, weights of groups of outputs); Li et al., 2025 (GPTAQ,
the asymmetric correction).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..formats.packing import QuantizedTensor
from ..formats.recipe import Recipe, StoredTensor, quantized_scheme, stored_tensors
from .gptq import DAMPING, EMBEDDING_DAMPING, gptq
from .gradients import CalibrationPass
from .guidance import Guidance
from .moments import WeightedMoments
from .resume import Resume
from .rtn import round_to_nearest
from .scales import least_error_scales
from .statistics import LAYER_PROJECTIONS, projection_name
from .streams import Span, quick_products, rotated, rows_of, run_family
from .transforms import transformed_tensor

EMBEDDING = "backbone.embedding.weight"
_SWEEPS = 2
# Share of the mean weight that every position gets. Where the model is certain the gradient is almost 0, which says nothing of
# errors that are not small: at 3.5 bits a few answers turned without it (docs/log.md).
_FLOOR = 0.1
_ROWS_AT_ONCE = 2048
_ROWS_TO_SHARE = 8  # a group has at least an eighth as many rows as inputs: fewer are not worth a moment of their own

Stored = np.ndarray | QuantizedTensor


def quantize_sequentially(run: CalibrationPass, guidance: Guidance, recipe: Recipe, resume: Resume) -> dict[str, Stored]:
    """Return every matrix of the decoder as the recipe stores it, by name.

    Args:
        run: over the calibration set of the guidance, with the streams of `stream_forward`.
        guidance: of the same set, with the recipe's rotations.
        recipe: with a storage for each matrix.
        resume: keeps finished layers: part 0 holds the embedding, and the head if it has its own matrix.

    Raises:
        InputError: weights or activations that are not finite, or a matrix that does not fit its scheme.
    """
    config = run.checkpoint.config.mamba
    names = [EMBEDDING] if config.tied else [EMBEDDING, "lm_head.weight"]
    work = _Sequential(run, guidance, recipe)
    kept = resume.read_streams((run.positions, config.d_model))
    if kept is None:
        rows = {name: work.rows(name) for name in names}
        stream = work.first_stream(_dense(rows[EMBEDDING]))
        resume.keep(0, _tensors(rows))
        resume.keep_streams(1, stream.numpy())
    else:
        stream = torch.from_numpy(kept)
    for part in range(max(1, resume.finished()), config.n_layer + 1):
        resume.keep(part, _tensors(work.layer(part - 1, stream)))
        resume.keep_streams(part + 1, stream.numpy())
    by_part = {0: names} | {
        i + 1: [f"{projection_name(i, p)}.weight" for p in LAYER_PROJECTIONS] for i in range(config.n_layer)
    }
    plan = stored_tensors(config, recipe)
    tensors = resume.tensors({part: [t for n in found for t in _without_clips(plan[n])] for part, found in by_part.items()})
    return {name: _from_tensors(name, recipe, tensors) for found in by_part.values() for name in found}


def _without_clips(entries: list[StoredTensor]) -> list[StoredTensor]:
    return [e for e in entries if not e.name.endswith(".clips")]


def _tensors(values: dict[str, Stored]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in values.items():
        found |= (
            {name: value} if isinstance(value, np.ndarray) else {f"{name}.codes": value.codes, f"{name}.scales": value.scales}
        )
    return found


def _from_tensors(name: str, recipe: Recipe, tensors: dict[str, np.ndarray]) -> Stored:
    scheme = quantized_scheme(recipe, name)
    return tensors[name] if scheme is None else QuantizedTensor(tensors[f"{name}.codes"], tensors[f"{name}.scales"], scheme)


def _dense(value: Stored) -> Tensor:
    return torch.from_numpy(value.astype(np.float32) if isinstance(value, np.ndarray) else value.dequantize())


@dataclass(frozen=True, eq=False)
class _Model:
    """One layer of either model: its stored matrices by projection, and the basis of what they read and write."""

    matrices: dict[str, Tensor]
    in_basis: Callable[[Tensor], Tensor]  # of the residual stream, to in_proj's input
    out_basis: Callable[[Tensor], Tensor]  # of the gated output, to out_proj's input


class _Sequential:
    """The steps of one quantization."""

    def __init__(self, run: CalibrationPass, guidance: Guidance, recipe: Recipe) -> None:
        self.run, self.guidance, self.recipe, self.config = run, guidance, recipe, run.checkpoint.config.mamba
        self.families = run.families()

    def value(
        self,
        name: str,
        target: np.ndarray,
        moments: np.ndarray | None,
        shifts: np.ndarray | None = None,
        damping: float = DAMPING,
    ) -> Stored:
        """Return a matrix as the recipe stores it: GPTQ for integer codes with moments, rounding to nearest without."""
        scheme = quantized_scheme(self.recipe, name)
        if scheme is None:
            return np.ascontiguousarray(target, self.recipe.storage(name))
        try:
            if moments is None:
                return round_to_nearest(target, scheme, least_error_scales(target, scheme))
            return gptq(target, moments, scheme, damping, _SWEEPS, shifts)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    def rows(self, name: str) -> Stored:
        """Return the embedding or the head."""
        moment = self.guidance.row_moment(head=name != EMBEDDING)
        return self.value(name, transformed_tensor(name, self.run.tensor, self.recipe), moment, damping=EMBEDDING_DAMPING)

    def first_stream(self, table: Tensor) -> Tensor:
        """Return the quantized model's stream before the first layer, (positions, d_model) float32."""
        stream = self.run.streams.read(0)
        stream = rotated(stream) if self.recipe.rotates_residual else stream
        tokens = torch.tensor([t for line in self.run.suite.lines for t in line.inputs])
        stream[self.run.positions - len(tokens) :] = table[tokens]
        return stream

    @torch.inference_mode()
    def layer(self, index: int, stream: Tensor) -> dict[str, Stored]:
        """Quantize a layer, and turn the quantized model's stream before it into the one after it.

        Args:
            index: of the layer.
            stream: (positions, d_model) float32, in the basis of what is stored; overwritten.
        """
        work = _LayerWork(self, index, stream)
        self.run.on_progress(f"quantizing layer {index + 1} of {self.config.n_layer}", 0, 4)
        found: dict[str, Stored] = {}
        for step, projection in enumerate(LAYER_PROJECTIONS):
            name = f"{projection_name(index, projection)}.weight"
            target = transformed_tensor(name, self.run.tensor, self.recipe)
            moments = shifts = None
            if projection != "dt_proj" and quantized_scheme(self.recipe, name) is not None:
                with quick_products():
                    moments, shifts = work.moments(projection, target)
            found[name] = self.value(name, target, moments, shifts)
            with quick_products():
                work.advance(projection, _dense(found[name]))
            self.run.on_progress(f"quantizing layer {index + 1} of {self.config.n_layer}", step + 1, 4)
        if not torch.isfinite(stream).all():
            raise InputError(f"backbone.layers.{index}: its quantized output holds NaN or infinity; use more bits")
        return found


class _LayerWork:
    """One layer of the float and of the quantized model, run over every position as far as its matrices are known."""

    def __init__(self, work: _Sequential, index: int, stream: Tensor) -> None:
        self.work, self.index, self.config = work, index, work.config
        prefix = f"backbone.layers.{index}."
        names = ("norm.weight", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.A_log", "mixer.D", "mixer.dt_proj.bias")
        self.small = {n: torch.from_numpy(work.run.tensor(prefix + n)) for n in names}
        self.float_matrices = {p: torch.from_numpy(work.run.tensor(f"{prefix}mixer.{p}.weight")) for p in LAYER_PROJECTIONS}
        self.float_stream, self.stream = work.run.streams.read(index), stream
        self.rotates_in, self.rotates_out = work.recipe.rotates_residual, work.recipe.rotates_out_proj
        self.u: dict[str, Tensor] = {}
        self.z: dict[str, Tensor] = {}
        self.low: dict[str, Tensor] = {}

    def inputs(self, projection: str, rows: slice) -> tuple[Tensor, Tensor]:
        """Return a projection's inputs in the float and the quantized model, (rows, in), in the basis of the stored matrix."""
        if projection == "in_proj":
            wide = _unit(self.float_stream[rows], self.config.norm_eps)
            narrow = _unit(self.stream[rows], self.config.norm_eps)
            if self.rotates_in:
                return rotated(wide), narrow
            return wide * self.small["norm.weight"], narrow * self.small["norm.weight"]
        wide, narrow = self.u["float"][rows], self.u["quantized"][rows]
        return (rotated(wide), rotated(narrow)) if projection == "out_proj" and self.rotates_out else (wide, narrow)

    def moments(self, projection: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the second moments (groups, in, in) to quantize by, and the shifts (out, in) to make up for, as `gptq` says.

        Args:
            projection: whose inputs are known.
            weight: (out, in) float32, as stored.
        """
        out, width = weight.shape
        weights = torch.from_numpy(np.array(self.work.guidance.weights(self.index, projection)))
        weights += _FLOOR * weights.mean(0)
        if out * _ROWS_TO_SHARE < width * weights.shape[1]:
            weights = weights.mean(1, keepdim=True)
        groups, own = weights.shape[1], torch.from_numpy(weight)
        moments, shifts = WeightedMoments(groups, width), torch.zeros(out, width)
        for start in range(0, len(weights), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            wide, narrow = self.inputs(projection, rows)
            moments.add(narrow, weights[rows])
            errors = (wide - narrow) @ own.T
            shifts.addmm_((errors.reshape(len(errors), groups, -1) * weights[rows, :, None]).flatten(1).T, narrow)
        return moments.tensor().numpy(), shifts.numpy()

    def advance(self, projection: str, stored: Tensor) -> None:
        """Run both models up to the next projection, with a projection's stored matrix (out, in) float32."""
        {"in_proj": self._convolve, "x_proj": self._keep_low, "dt_proj": self._scan, "out_proj": self._finish}[projection](
            stored
        )

    def _convolve(self, stored: Tensor) -> None:
        conv = self.small["mixer.conv1d.weight"][:, 0].contiguous(), self.small["mixer.conv1d.bias"]
        for model in ("float", "quantized"):
            self.u[model], self.z[model] = (torch.empty(self.work.run.positions, self.config.d_inner) for _ in range(2))

            def layer(xz: Tensor, state: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                x = xz[..., : self.config.d_inner].contiguous()
                u = self.work.run.operations.conv(x, state, *conv)
                seen = torch.cat([state, x[:, -self.config.d_conv :].transpose(1, 2)], dim=2)
                return u, seen[..., -self.config.d_conv :], ssm

            def read(batch: list[Span], model: str = model) -> Tensor:
                if model == "quantized":
                    x = _unit(self.stream[rows_of(batch)], self.config.norm_eps)
                    return F.linear(x if self.rotates_in else x * self.small["norm.weight"], stored)
                x = _unit(self.float_stream[rows_of(batch)], self.config.norm_eps) * self.small["norm.weight"]
                return F.linear(x, self.float_matrices["in_proj"])

            for batch, xz, u in self._run(layer, read):
                self.u[model][rows_of(batch)] = u
                self.z[model][rows_of(batch)] = xz[..., self.config.d_inner :]

    def _keep_low(self, stored: Tensor) -> None:
        self.low = {"float": self.float_matrices["x_proj"], "quantized": stored}

    def _scan(self, stored: Tensor) -> None:
        A, D, bias = -torch.exp(self.small["mixer.A_log"]), self.small["mixer.D"], self.small["mixer.dt_proj.bias"]
        rank, d_state = self.config.dt_rank, self.config.d_state
        for model, wide in (("float", self.float_matrices["dt_proj"]), ("quantized", stored)):

            def layer(
                at: Tensor, conv: Tensor, h: Tensor, model: str = model, wide: Tensor = wide
            ) -> tuple[Tensor, Tensor, Tensor]:
                u, z = self.u[model][at], self.z[model][at]
                low, B, C = torch.split(F.linear(u, self.low[model]), [rank, d_state, d_state], -1)
                y, h = self.work.run.operations.scan(u, F.linear(low, wide), A, B, C, D, z, bias, h)
                return y, conv, h

            for batch, _, y in self._run(layer, rows_of):
                self.u[model][rows_of(batch)] = y

    def _finish(self, stored: Tensor) -> None:
        for start in range(0, len(self.stream), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            y = self.u["quantized"][rows]
            self.stream[rows] += F.linear(rotated(y) if self.rotates_out else y, stored)

    def _run(
        self, layer: Callable[..., tuple[Tensor, Tensor, Tensor]], read: Callable[[list[Span]], Tensor]
    ) -> Iterator[tuple[list[Span], Tensor, Tensor]]:
        for family in self.work.families:
            yield from run_family(layer, family, self.config, read)


def _unit(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
