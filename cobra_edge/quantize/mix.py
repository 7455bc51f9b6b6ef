"""Mix: which scheme each matrix gets under a budget of bits, so that the whole model drifts least.

Σ KLD of the matrices alone under Σ bits ≤ budget is a multiple-choice knapsack; a solver finds its best solutions exactly. But
errors of several matrices do not just add up: the best solutions, and the uniform recipes that fit, are therefore measured as
a whole, and the best measured one is taken.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, MachineError
from ..model.config import MambaConfig
from ..recipe import Recipe, matrix_bits, matrix_names, matrix_weights, uniform_recipe
from ..scheme import SCHEMES
from .sensitivity import SCHEMES_OF_A_MIX, Table, candidates, of_tensors

log = logging.getLogger(__name__)

MEASURED = 8  # solutions of the knapsack that are measured
_SOLVER_SECONDS = 60.0


@dataclass(frozen=True)
class Option:
    """One way to store one matrix: its bits in the file, and what it costs."""

    storage: str
    bits: int
    kld: float


@dataclass(frozen=True)
class Mix:
    """A recipe's tensors.

    Attributes:
        tensors: storage by matrix.
        bits_per_weight: of all matrices, as `recipe.matrix_bits` counts.
        expected_kld: sum of what each matrix costs alone, nats.
        kld: mean KLD of the whole from the float model, nats.
    """

    tensors: dict[str, str]
    bits_per_weight: float
    expected_kld: float
    kld: float


def least_bits(config: MambaConfig, recipe: Recipe) -> float:
    """Return the least bits a weight that any mix takes."""
    return sum(min(option_bits(config, recipe, name).values()) for name in matrix_names(config)) / matrix_weights(config)


def option_bits(config: MambaConfig, recipe: Recipe, name: str) -> dict[str, int]:
    """Return the bits that a matrix takes in the file by each storage that fits it."""
    none = matrix_bits(config, of_tensors(recipe, dict.fromkeys(matrix_names(config), "float16")))
    plain = matrix_bits(config, of_tensors(recipe, {**dict.fromkeys(matrix_names(config), "float16"), name: "float32"})) - none
    return {
        storage: matrix_bits(config, of_tensors(recipe, {**dict.fromkeys(matrix_names(config), "float16"), name: storage}))
        - none + plain
        for storage in candidates(config)[name]
    }
