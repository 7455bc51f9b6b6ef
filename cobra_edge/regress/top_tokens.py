"""Next-token distributions truncated to their most probable tokens, with the tail as one probability.

Of the 50,280 tokens of a published model, only a handful have a noticeable probability. A distribution keeps its most probable
tokens, as many as are needed for a tail of at most TAIL_MASS (at least LEAST, at most MOST, and always the target), and the
probability of the tail. KLD then treats the tail as a single token. By the chain rule of relative entropy it omits

    tail · KL(reference's tail ‖ build's tail) ≥ 0        both tails normalized

so it never overestimates.
Source: Cover and Thomas, "Elements of Information Theory", 2006, theorem 2.5.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TAIL_MASS = 1e-5
LEAST, MOST = 8, 64


@dataclass(frozen=True, eq=False)
class TopTokens:
    """Truncated distributions at consecutive positions; their tokens are concatenated, most probable first.

    Attributes:
        offsets: (positions + 1,) int64, start of each position's tokens.
        ids: (kept,) int32, tokens.
        log_probs: (kept,) float32, natural logarithms.
        tails: (positions,) float32, probability of all other tokens.
    """

    offsets: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    tails: np.ndarray

    @classmethod
    def of(cls, log_probs: np.ndarray, targets: np.ndarray) -> TopTokens:
        """Truncate log-probabilities (positions, vocab) float64; the targets (positions,) int are always kept."""
        rows = [_kept(row, int(target)) for row, target in zip(log_probs, targets, strict=True)]
        return cls(
            np.cumsum([0, *(len(ids) for ids, _, _ in rows)]).astype(np.int64),
            np.concatenate([ids for ids, _, _ in rows]).astype(np.int32),
            np.concatenate([kept for _, kept, _ in rows]).astype(np.float32),
            np.array([tail for _, _, tail in rows], np.float32),
        )

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.tails)

    def part(self, first: int, end: int) -> TopTokens:
        """Return positions `first` to `end`, exclusive."""
        start, stop = self.offsets[first], self.offsets[end]
        offsets = self.offsets[first : end + 1] - start
        return TopTokens(offsets, self.ids[start:stop], self.log_probs[start:stop], self.tails[first:end])

    def most_probable(self) -> np.ndarray:
        """Return the most probable token of each position, (positions,) int32."""
        return self.ids[self.offsets[:-1]]

    def log_probs_of(self, targets: np.ndarray) -> np.ndarray:
        """Return log p, (positions,) float64, of the targets (positions,) int that were kept."""
        rows = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        found = np.flatnonzero(self.ids == targets[rows])
        assert len(found) == len(self)
        return self.log_probs[found].astype(np.float64)

    def divergence_of(self, log_probs: np.ndarray) -> np.ndarray:
        """Return KL(these ‖ build) in nats with the tail as one token, (positions,) float64.

        Args:
            log_probs: of the build, (positions, vocab) float64.
        """
        rows = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        reference, build = self.log_probs.astype(np.float64), log_probs[rows, self.ids]
        kept = np.bincount(rows, np.exp(reference) * (reference - build), len(self))
        probs = np.exp(log_probs)
        probs[rows, self.ids] = 0
        tails, rest = self.tails.astype(np.float64), np.maximum(probs.sum(-1), np.finfo(np.float64).tiny)
        tail = np.where(tails > 0, tails * (np.log(np.maximum(tails, np.finfo(np.float64).tiny)) - np.log(rest)), 0.0)
        return np.maximum(kept + tail, 0.0)


def _kept(log_probs: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the kept ids and log-probabilities of one distribution (vocab,) float64, and the probability of the tail."""
    most = min(MOST, len(log_probs))
    order = np.argpartition(-log_probs, most - 1)[:most]
    order = order[np.lexsort((order, -log_probs[order]))]  # of equal ones the first, as in argmax
    left = 1 - np.cumsum(np.exp(log_probs[order]))
    order = order[: max(min(LEAST, most), int(np.searchsorted(-left, -TAIL_MASS)) + 1)]
    if target not in order:
        order = np.append(order, target)
    others = np.ones(len(log_probs), bool)
    others[order] = False
    return order, log_probs[order], float(np.exp(log_probs[others]).sum())
