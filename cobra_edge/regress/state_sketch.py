"""Sketches of recurrent states: a few hundred numbers from which the distance of two states is told.

A 3.5B Cobra's state is 21 MB; a golden line keeps SKETCH numbers of each layer instead. Every entry of a layer's state is
added, with a sign, to one of these numbers; sign and place come from a hash of its index. Sums of that kind keep squared
lengths, and the sketch of a difference is the difference of sketches, so the distance of two states is the distance of their
sketches up to a relative error whose standard deviation is at most sqrt(2 / SKETCH) of the square, 4.4 % of the distance
itself, for one line; lines average it out.
Source: Charikar, Chen, Farach-Colton 2002, "Finding frequent items in data streams"; Thorup and Zhang 2012, "Tabulation-based
5-independent hashing", section 4, for the second moment.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SKETCH_SIZE = 256


def state_sketch(states: np.ndarray) -> np.ndarray:
    """Return the sketch of each layer, (n_layer, SKETCH) float32, of states (n_layer, …)."""
    flat = states.reshape(len(states), -1)
    if flat.shape[1] <= SKETCH_SIZE:
        return np.pad(flat, ((0, 0), (0, SKETCH_SIZE - flat.shape[1]))).astype(np.float32)
    order, starts, signs = _places(flat.shape[1])
    return np.add.reduceat((flat.astype(np.float64) * signs)[:, order], starts, axis=1).astype(np.float32)


@lru_cache(maxsize=2)
def _places(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return entries in the order of their places (size,), where each place begins in it (SKETCH,), and signs (size,)."""
    hashed = _mixed(np.arange(size, dtype=np.uint64))
    places = (hashed >> np.uint64(8)) % np.uint64(SKETCH_SIZE)
    places[np.argsort(hashed, kind="stable")[:SKETCH_SIZE]] = np.arange(SKETCH_SIZE)  # none is empty
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(SKETCH_SIZE, dtype=np.uint64))
    return order, starts, np.where(hashed & np.uint64(1), 1.0, -1.0)


def _mixed(index: np.ndarray) -> np.ndarray:
    """Hash uint64 numbers (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 19)."""
    with np.errstate(over="ignore"):
        z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
