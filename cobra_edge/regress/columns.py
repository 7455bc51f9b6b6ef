"""Columns of numbers and the one way they are grouped: by image, and by task or position."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np


class Columns:
    """Rows of float64, each with two keys: the image, and the task of a line or the position of a token."""

    def __init__(self, width: int) -> None:
        """Begin with no rows, of `width` columns."""
        self.width = width
        self._images, self._keys, self._values = array("q"), array("q"), array("d")

    def add(self, image: int, keys: Sequence[int], values: Iterable[float]) -> None:
        """Add a row for each second key; `values` are those of the first row, then those of the second, and so on."""
        self._images.extend([image] * len(keys))
        self._keys.extend(keys)
        self._values.extend(values)

    @property
    def images(self) -> np.ndarray:
        """The image of each row, (rows,) int64; a view, as `keys` and `values`."""
        return np.asarray(self._images)

    @property
    def keys(self) -> np.ndarray:
        """The second key of each row, (rows,) int64."""
        return np.asarray(self._keys)

    @property
    def values(self) -> np.ndarray:
        """All columns, (rows, width) float64."""
        return np.asarray(self._values).reshape(-1, self.width)

    def resampled(self, images: Sequence[int]) -> Columns:
        """Return the rows of these images, which are numbered anew; an image may come several times."""
        found, rows = Columns(self.width), grouped(np.arange(len(self.keys)), self.images)
        for number, image in enumerate(images):
            found.add(number, self.keys[rows[image]].tolist(), self.values[rows[image]].ravel())
        return found


def sums(values: np.ndarray, groups: np.ndarray, n: int) -> np.ndarray:
    """Return the sum of values (rows,) in each of n groups, (n,) float64; `groups` (rows,) int64 counts from 0."""
    return np.bincount(groups, values, n)


def grouped(values: np.ndarray, groups: np.ndarray) -> list[np.ndarray]:
    """Return the values (rows,) of each group, (size of the group,) each, in order; `groups` (rows,) int64 counts from 0."""
    return np.split(values[np.argsort(groups, kind="stable")], np.cumsum(np.bincount(groups))[:-1])
