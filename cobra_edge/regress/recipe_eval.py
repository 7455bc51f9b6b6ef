"""Evaluation of recipes in memory: the drift of each, before anything is written.

The decoder is that of a bundle, with weights in memory. Visual embeddings are those of the float model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from ..decode.backends import open_weights
from ..decode.decoder import Weights
from ..errors import InputError
from ..formats.model_config import decoder_shapes
from ..formats.packing import QuantizedTensor
from ..formats.recipe import Recipe
from ..model.checkpoint import Checkpoint
from ..model.weight_files import require_finite
from ..quantize.calibration_data import EmbeddingCache, OnProgress, calibration_suite, no_progress
from ..quantize.decoder_file import stored_value
from ..quantize.quantizer import quantizer
from ..quantize.statistics import Statistics
from ..quantize.transforms import input_source
from ..suite.line import Line
from .answer_logits import answer_logits, look_at
from .metrics import kl_divergence

_KEEP_BYTES = 2 << 30  # of quantized matrices, for recipes that share them


class RecipeEvaluation:
    """Measures the drift of any recipe, for one checkpoint and some questions.

    Attributes:
        lines: how many questions.
        positions: how many answer tokens KLD is the mean over.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        statistics: Statistics | None,
        lines: Sequence[Line],
        images: Path,
        on_progress: OnProgress = no_progress,
        cache: EmbeddingCache | None = None,
    ) -> None:
        """Look at the images, and run the float model.

        Args:
            checkpoint: whose decoder and vision; all of it lies in memory as float32.
            recipe: method, rotations and activations of those that will be measured; its tensors do not count.
            statistics: of the checkpoint, where the method looks at activations or they are clipped.
            lines: questions with their answers.
            images: directory that their images are relative to.
            on_progress: called with a step's name, how much of it is done and how much there is.
            cache: visual embeddings that other steps share; None computes them here.

        Raises:
            InputError: a question or image that cannot be read, weights or answers that are not finite.
        """
        self._checkpoint, self._statistics, config = checkpoint, statistics, checkpoint.config
        suite = calibration_suite(checkpoint, lines, images)
        # Text first, then image by image: each image is read once.
        self._lines = sorted(suite.lines, key=lambda line: -1 if line.image is None else line.image)
        self._visual = np.empty((0, config.n_visual_tokens, config.mamba.d_model), np.float32)
        if suite.images:
            files = [images / name for name in suite.images]
            embeddings = (cache or EmbeddingCache(checkpoint)).get(files, on_progress)
            self._visual = embeddings.numpy().reshape(-1, config.n_visual_tokens, config.mamba.d_model)
        on_progress("float model", 0, 1)
        self._kept = dict[tuple[str, str], np.ndarray | QuantizedTensor]()
        self._room = _KEEP_BYTES
        float_recipe = msgspec.structs.replace(recipe, tensors={})
        quantize = quantizer(config.mamba, float_recipe, self._tensor, statistics)
        self._float = {name: stored_value(quantize, name) for name in decoder_shapes(config.mamba)}
        self._reference = list(self._answers(float_recipe, self._float))
        if not all(np.isfinite(logits).all() for logits in self._reference):
            raise InputError("the float model itself gives logits that are not finite; the checkpoint is damaged or overflows")
        self.lines, self.positions = len(lines), sum(len(logits) for logits in self._reference)
        on_progress("float model", 1, 1)

    def kld(self, recipe: Recipe) -> float:
        """Return the mean KLD from the float model over the answers, nats; infinity where an answer is not finite.

        Args:
            recipe: with the method, rotations and activations of this evaluation; what it does not name is float32.

        Raises:
            InputError: a matrix does not fit its scheme.
        """
        found = []
        for expected, logits in zip(self._reference, self._answers(recipe, self._tensors(recipe)), strict=True):
            if not np.isfinite(logits).all():
                return float("inf")
            found.append(kl_divergence(expected, logits))
        return float(np.concatenate(found).mean())

    def _tensor(self, name: str) -> np.ndarray:
        return require_finite(name, self._checkpoint.decoder[name].float()).numpy()

    def _tensors(self, recipe: Recipe) -> dict[str, np.ndarray | QuantizedTensor]:
        quantize = quantizer(self._checkpoint.config.mamba, recipe, self._tensor, self._statistics)
        changed = {*recipe.tensors, *(input_source(name) for name in quantize.scales)}
        found = dict(self._float)
        for name in changed:
            key = name, recipe.storage(name)
            if quantize.scales:  # what is stored depends on neighbours
                found[name] = stored_value(quantize, name, self._statistics)
            elif key in self._kept:
                found[name] = self._kept[key]
            else:
                found[name] = value = stored_value(quantize, name, self._statistics)
                size = value.nbytes if isinstance(value, np.ndarray) else value.codes.nbytes + value.scales.nbytes
                if size <= self._room:
                    self._kept[key], self._room = value, self._room - size
        return found

    def _answers(self, recipe: Recipe, tensors: dict[str, np.ndarray | QuantizedTensor]) -> Iterator[np.ndarray]:
        """Yield for each line the logits before each token of its answer (answer, vocab); lines of an image together."""
        decoder = open_weights(Weights(self._checkpoint.config.mamba, recipe, tensors, "weights in memory"))
        yield from answer_logits(decoder, self._lines, look_at(decoder, self._visual))
