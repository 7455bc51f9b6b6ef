"""Drift between two sets of next-token distributions."""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities (…, vocab) float64 of logits (…, vocab) float."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def kl_divergence(reference: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    """Return KL(reference ‖ quantized) in nats, (positions,) float64, of logits (positions, vocab) float.

    Clipped at 0, below which only rounding could take it.
    """
    return divergence(log_softmax(reference), log_softmax(quantized))


def divergence(reference: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    """Return KL(reference ‖ quantized) in nats, (positions,) float64, of log-probabilities (positions, vocab) float64."""
    return np.maximum((np.exp(reference) * (reference - quantized)).sum(-1), 0.0)


def top1_agreement(reference: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    """Return where both have the same most probable token, (positions,) bool, of logits (positions, vocab) float."""
    return reference.argmax(-1) == quantized.argmax(-1)


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return -log p(target) in nats, (positions,) float64, of logits (positions, vocab) float and targets (positions,) int."""
    return -np.take_along_axis(log_softmax(logits), targets[:, None].astype(np.int64), -1)[:, 0]
