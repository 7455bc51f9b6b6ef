"""Argument checks of all decoders: tokens and embeddings. The contract is that of `decoder.Decoder`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np

from ..errors import InputError
from ..formats.model_config import MambaConfig


def checked_tokens(tokens: Sequence[SupportsIndex], config: MambaConfig) -> np.ndarray:
    """Return tokens as (seq,) int64. Raises InputError for one that is not an integer or outside the vocabulary."""
    try:
        ids = [token.__index__() for token in tokens]
    except (AttributeError, TypeError) as error:
        raise InputError("expected tokens as integers, one per position; got something else among them") from error
    wrong = next((i for i in ids if not 0 <= i < config.vocab), None)
    if wrong is not None:
        raise InputError(
            f"token {wrong} is outside the vocabulary, expected 0 to {config.vocab - 1}; use the tokenizer of this bundle"
        )
    return np.array(ids, np.int64)


def checked_embeddings(embeddings: np.ndarray, config: MambaConfig) -> np.ndarray:
    """Return embeddings as contiguous (seq, d_model) float32.

    Raises:
        InputError: another shape, a dtype that is not float, or no positions.
    """
    rows = np.asarray(embeddings)
    if rows.dtype.kind != "f":
        raise InputError(f"embeddings are {rows.dtype}, expected float32")
    require_positions(rows.shape, config)
    return np.ascontiguousarray(rows, np.float32)


def require_positions(shape: tuple[int, ...], config: MambaConfig) -> None:
    """Raise InputError unless the shape is (seq, d_model) with seq at least 1."""
    if len(shape) != 2 or shape[1] != config.d_model:
        raise InputError(f"embeddings have shape {tuple(shape)}, expected (seq, {config.d_model})")
    if shape[0] == 0:
        raise InputError("no embeddings, so there are no logits; give at least one position")
