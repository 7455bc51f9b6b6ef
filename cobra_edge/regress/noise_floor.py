"""The float model's predictions of golden lines, and its noise floor: its drift in 16 bits, without quantization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..errors import DriftError
from ..formats.model_config import CobraConfig
from ..inputs.text import TextCodec
from ..model.checkpoint import Checkpoint
from ..suite.tokenized import TokenizedSuite
from .aggregate import Aggregate
from .budget import FLOOR
from .float_reference import NARROW, float_predictions, float_vision
from .line_metrics import measure_line
from .predictions import Prediction
from .top_tokens import TopTokens

# Measures of teacher forcing; generating replies in 16 bits would double the time.
_MEASURED = ("kld_mean", "kld_median", "kld_p90", "kld_p99", "kld_max", "prompt_kld_mean", "prompt_kld_p99", "top1_agreement",
             "right_change_mean", "right_change_rms", "perplexity_ratio", "state_error", "vision_error")  # fmt: skip


def golden_predictions(
    checkpoint: Checkpoint,
    suite: TokenizedSuite,
    embeddings: np.ndarray,
    codec: TextCodec,
    on_layer: Callable[[], None] = lambda: None,
) -> list[Prediction]:
    """Return the float model's prediction of each line, with distributions as TopTokens.

    Args:
        checkpoint: the float model.
        suite: the golden lines.
        embeddings: (images, n_visual_tokens, d_model) float32, of the float model.
        codec: of the model.
        on_layer: called after each layer, for progress.

    Raises:
        InputError: as `float_predictions`.
    """

    def see(images: Sequence[int]) -> Sequence[np.ndarray]:
        return [embeddings[image] for image in images]

    read = float_predictions(checkpoint, suite.lines, see, replies_end_with=codec.end_id, on_layer=on_layer)
    return [
        replace(prediction, log_probs=TopTokens.of(np.asarray(prediction.log_probs), np.array(tokenized.tokens[1:])))
        for tokenized, prediction in zip(suite.lines, read, strict=True)
    ]


def floor_precisions(config: CobraConfig) -> tuple[str, ...]:
    """Return the precisions of the noise floor: of a large model the one alone that limits refer to, which is the quickest."""
    return (FLOOR,) if config.mamba.is_large else tuple(NARROW)


def noise_floor(
    checkpoint: Checkpoint,
    suite: TokenizedSuite,
    predictions: Sequence[Prediction],
    codec: TextCodec,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Return the measures of the float model in each of `floor_precisions`, compared with float32; none for one that overflows.

    Args:
        checkpoint, suite, codec: as for `golden_predictions`.
        predictions: result of `golden_predictions`.
        on_layer: called after each layer, for progress.
    """
    precisions = floor_precisions(checkpoint.config)
    return {precision: _floor(checkpoint, suite, predictions, codec, precision, on_layer) for precision in precisions}


def _floor(
    checkpoint: Checkpoint,
    suite: TokenizedSuite,
    predictions: Sequence[Prediction],
    codec: TextCodec,
    precision: str,
    on_layer: Callable[[], None],
) -> dict[str, float]:
    see = float_vision(checkpoint, suite, precision)
    aggregate, narrow = Aggregate(), float_predictions(checkpoint, suite.lines, see, precision=precision, on_layer=on_layer)
    try:
        for tokenized, reference, prediction in zip(suite.lines, predictions, narrow, strict=True):
            build = replace(prediction, reply=reference.reply)
            aggregate.add(tokenized, measure_line(tokenized, reference, build, codec.decode))
    except DriftError:
        return {}
    values = aggregate.values()
    return {name: values[name] for name in _MEASURED if name in values}
