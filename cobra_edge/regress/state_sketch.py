"""Count sketches of recurrent states: SKETCH_SIZE numbers per layer, from which the distance of two states is estimated.

The state of a 3.5B Cobra is 21 MB; a golden line keeps a state sketch instead. Each entry of a layer's state is added, with a
sign, to one number of the sketch; sign and position are a hash of the entry's index. This preserves squared norms in
expectation, and the sketch of a difference is the difference of the sketches. The squared distance of two sketches therefore
estimates that of the states with a relative standard deviation of at most sqrt(2 / SKETCH_SIZE), 4.4 % of the distance
itself, for one line; averaging over lines reduces it.
Source: Charikar, Chen, Farach-Colton 2002, "Finding frequent items in data streams"; Thorup and Zhang 2012, "Tabulation-based
5-independent hashing", section 4, for the second moment.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SKETCH_SIZE = 256


def state_sketch(states: np.ndarray) -> np.ndarray:
    """Return the sketch of each layer, (n_layer, SKETCH_SIZE) float32, of states (n_layer, …) float32."""
    flat = states.reshape(len(states), -1)
    if flat.shape[1] <= SKETCH_SIZE:
        return np.pad(flat, ((0, 0), (0, SKETCH_SIZE - flat.shape[1]))).astype(np.float32)
    order, starts, signs = _places(flat.shape[1])
    return np.add.reduceat((flat.astype(np.float64) * signs)[:, order], starts, axis=1).astype(np.float32)


@lru_cache(maxsize=2)
def _places(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return entries ordered by place (size,), the start of each place (SKETCH_SIZE,), and signs (size,)."""
    hashed = _hash(np.arange(size, dtype=np.uint64))
    places = (hashed >> np.uint64(8)) % np.uint64(SKETCH_SIZE)
    places[np.argsort(hashed, kind="stable")[:SKETCH_SIZE]] = np.arange(SKETCH_SIZE)  # no place is empty
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(SKETCH_SIZE, dtype=np.uint64))
    return order, starts, np.where(hashed & np.uint64(1), 1.0, -1.0)


def _hash(index: np.ndarray) -> np.ndarray:
    """Hash uint64 indices (size,) (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 19)."""
    with np.errstate(over="ignore"):
        z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
