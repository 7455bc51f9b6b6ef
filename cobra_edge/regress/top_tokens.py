"""Next-token distributions of which the likely part is kept, and the rest as one probability.

Of the 50,280 words of a published model a trained one considers a handful. What is kept of a distribution are the fewest
likeliest tokens that leave at most TAIL_MASS to all others (at least LEAST, at most MOST, the right token always among them),
and how much they do leave. KLD is then taken with all tokens that are not kept as one: by the chain rule of relative entropy
it lacks

    tail · KL(reference's tail ‖ build's tail) ≥ 0        both tails scaled to sum 1

so it never overstates, and lacks at most `tail` times how differently the two share out what they both find unlikely.
Source: Cover and Thomas, "Elements of Information Theory", 2006, theorem 2.5.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TAIL_MASS = 1e-5
LEAST, MOST = 8, 64


@dataclass(frozen=True, eq=False)
class TopTokens:
    """Distributions at consecutive positions; the kept tokens of all of them lie one after the other, likeliest first.

    Attributes:
        offsets: (positions + 1,) int64, where each position's tokens begin.
        ids: (kept,) int32.
        log_probs: (kept,) float32, natural logarithms.
        tails: (positions,) float32, probability of all other tokens.
    """

    offsets: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    tails: np.ndarray

    @classmethod
    def of(cls, log_probs: np.ndarray, targets: np.ndarray) -> TopTokens:
        """Keep the likely part of log-probabilities (positions, vocab) float64, and the right tokens (positions,) int."""
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
        """Return positions from `first` up to `end`."""
        start, stop = self.offsets[first], self.offsets[end]
        offsets = self.offsets[first : end + 1] - start
        return TopTokens(offsets, self.ids[start:stop], self.log_probs[start:stop], self.tails[first:end])

    def likeliest(self) -> np.ndarray:
        """Return the likeliest token of each position, (positions,) int32."""
        return self.ids[self.offsets[:-1]]

    def log_probs_of(self, targets: np.ndarray) -> np.ndarray:
        """Return log p of the right tokens (positions,) that were kept, float64."""
        rows = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        found = np.flatnonzero(self.ids == targets[rows])
        assert len(found) == len(self)
        return self.log_probs[found].astype(np.float64)

    def divergence_of(self, log_probs: np.ndarray) -> np.ndarray:
        """Return KL(these ‖ build) in nats with the tokens not kept as one, (positions,) float64.

        Args:
            log_probs: the build's, (positions, vocab) float64.
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
    """Return ids and log-probabilities that are kept of one distribution (vocab,), and the probability of the rest."""
    most = min(MOST, len(log_probs))
    order = np.argpartition(-log_probs, most - 1)[:most]
    order = order[np.lexsort((order, -log_probs[order]))]  # the first of equals leads, as in argmax
    left = 1 - np.cumsum(np.exp(log_probs[order]))
    order = order[: max(min(LEAST, most), int(np.searchsorted(-left, -TAIL_MASS)) + 1)]
    if target not in order:
        order = np.append(order, target)
    others = np.ones(len(log_probs), bool)
    others[order] = False
    return order, log_probs[order], float(np.exp(log_probs[others]).sum())
