"""Mix: which scheme each matrix gets under a budget of bits, so that the whole model drifts least.

Σ KLD of each matrix alone under Σ bits ≤ budget is a multiple-choice knapsack, and is solved exactly. But errors of several
matrices do not just add up (those of the embedding and of a tied head meet, for one): the best solution, its neighbours and the
uniform recipes that fit are measured as a whole, and the best measured one is taken.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..formats.model_config import MambaConfig
from ..formats.recipe import Recipe, matrix_bits, matrix_names, matrix_weights, uniform_recipe
from ..formats.scheme import SCHEMES
from .sensitivity import CANDIDATE_SCHEMES, Table, candidates, of_tensors

log = logging.getLogger(__name__)

_MEASURED = 32  # mixes, at most
_UNITS = 1 << 16  # that a budget is divided into at most

# By matrix and storage: bits in the file.
Sizes = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class BitAllocation:
    """How each matrix is stored.

    Attributes:
        tensors: storage by matrix.
        bits_per_weight: of all matrices, as `recipe.matrix_bits` counts.
        kld: mean KLD of the whole model from the float one, nats.
        kld_alone: sum of what each matrix costs alone, nats.
    """

    tensors: dict[str, str]
    bits_per_weight: float
    kld: float
    kld_alone: float


def option_bits(config: MambaConfig, recipe: Recipe) -> dict[str, dict[str, int]]:
    """Return the bits that each matrix takes in the file by each storage that fits it."""
    return {
        name: {s: matrix_bits(config, of_tensors(recipe, {name: s}))[name] for s in tried}
        for name, tried in candidates(config).items()
    }


def smallest_allocation(config: MambaConfig, recipe: Recipe) -> dict[str, str]:
    """Return the storage of each matrix that takes the least bits."""
    return {name: min(tried, key=tried.__getitem__) for name, tried in option_bits(config, recipe).items()}


def require_reachable(config: MambaConfig, recipe: Recipe, bits_per_weight: float) -> None:
    """Raise InputError where no mix takes as few bits a weight."""
    sizes, smallest = option_bits(config, recipe), smallest_allocation(config, recipe)
    least = sum(sizes[name][s] for name, s in smallest.items()) / matrix_weights(config)
    if bits_per_weight < least:
        by_storage: dict[str, set[str]] = {}
        for name, storage in smallest.items():
            by_storage.setdefault(storage, set()).add(name.removesuffix(".weight").rpartition(".")[2])
        bounds = ", ".join(f"{s} ({', '.join(sorted(kinds))})" for s, kinds in sorted(by_storage.items()))
        raise InputError(
            f"{bits_per_weight:g} bits a weight cannot be had: this model takes {math.ceil(least * 1000) / 1000:g} at least, "
            f"counting scales; the smallest that matrices can be stored by is {bounds}; ask for more"
        )


def solve(costs: Table, sizes: Sizes, budget_bits: float) -> dict[str, str] | None:
    """Solve the multiple-choice knapsack: one storage for each matrix, least Σ cost with Σ bits ≤ budget.

    Exactly, by dynamic programming over the bits spent, as long as the budget is no more than 2^16 units of what all sizes are
    multiples of; beyond, sizes are rounded up to 2^-16 of the budget, and the budget is still kept.

    Args:
        costs: by matrix and storage.
        sizes: bits of at least those storages.
        budget_bits: for all matrices together.

    Returns:
        Storage by matrix, or None where nothing fits.
    """
    unit = max(math.gcd(*(sizes[n][s] for n, row in costs.items() for s in row)), math.ceil(budget_bits / _UNITS))
    room = int(budget_bits // unit)
    least, choices = np.zeros(room + 1), list[np.ndarray]()  # least[u]: cost of the matrices so far within u units
    for name, row in costs.items():
        spent = np.full((len(row), room + 1), np.inf)
        for i, (storage, cost) in enumerate(row.items()):
            size = -(-sizes[name][storage] // unit)
            if size <= room:
                spent[i, size:] = least[: room + 1 - size] + cost
        choices.append(spent.argmin(axis=0).astype(np.uint8))
        least = spent.min(axis=0)
    if not np.isfinite(least[room]):
        return None
    found = dict[str, str]()
    for name, choice in zip(reversed(costs), reversed(choices), strict=True):
        found[name] = list(costs[name])[choice[room]]
        room -= -(-sizes[name][found[name]] // unit)
    return {name: found[name] for name in costs}


def uniform_allocations(config: MambaConfig) -> list[dict[str, str]]:
    """Return the storages by matrix of the uniform recipes of a mix's schemes."""
    found = []
    for scheme in CANDIDATE_SCHEMES:
        try:
            recipe, _ = uniform_recipe(config, SCHEMES[scheme])
        except InputError:  # fits no matrix of this model
            continue
        found.append({name: recipe.storage(name) for name in matrix_names(config)})
    return found


def allocate_bits(
    config: MambaConfig,
    recipe: Recipe,
    table: Table,
    bits_per_weight: float,
    measure: Callable[[Recipe], float],
    on_measured: Callable[[int, int], None] = lambda done, total: None,
) -> BitAllocation:
    """Find the mix within a budget with which the model drifts least.

    Args:
        config: sizes of the decoder.
        recipe: method, rotations and activations; its tensors do not count.
        table: what each matrix costs alone.
        bits_per_weight: budget of all matrices, as `recipe.matrix_bits` counts.
        measure: returns the mean KLD (nats) of a recipe from the float model.
        on_measured: told how many of the mixes are measured, and how many there are.

    Raises:
        InputError: the budget is below what any allocation takes, or nothing within it gives finite answers.
    """
    require_reachable(config, recipe, bits_per_weight)
    sizes, weights = option_bits(config, recipe), matrix_weights(config)
    budget = bits_per_weight * weights
    measured = dict[tuple[str, ...], BitAllocation]()

    def full() -> bool:
        return len(measured) >= _MEASURED

    def try_out(tensors: dict[str, str]) -> BitAllocation | None:
        bits = sum(matrix_bits(config, of_tensors(recipe, tensors)).values())
        key = tuple(tensors[name] for name in sizes)
        if key in measured or bits > budget or full():
            return None
        on_measured(len(measured), _MEASURED)
        alone = sum(table[name].get(storage, math.inf) for name, storage in tensors.items())
        allocation = measured[key] = BitAllocation(tensors, bits / weights, measure(of_tensors(recipe, tensors)), alone)
        log.info("%.3f bits per weight: KLD %.3e, sum of single-matrix KLDs %.3e", bits / weights, allocation.kld, alone)
        return allocation

    for tensors in uniform_allocations(config):
        if all(storage in sizes[name] for name, storage in tensors.items()):
            try_out(tensors)
    _search(table, sizes, budget, try_out, full)
    on_measured(_MEASURED, _MEASURED)
    best = min(measured.values(), key=lambda m: (m.kld, m.bits_per_weight), default=None)
    if best is None or not math.isfinite(best.kld):
        raise InputError(f"no mix of {bits_per_weight:g} bits a weight gives finite answers; ask for more bits")
    return best


def _search(
    table: Table,
    sizes: Sizes,
    budget: float,
    try_out: Callable[[dict[str, str]], BitAllocation | None],
    full: Callable[[], bool],
) -> None:
    """Try the knapsack's solution, then those that differ from the best one tried in a matrix, until none is new or `full`.

    A node is a table and its solution. Its children lack one of the solution's choices each (as in Lawler 1972, for the k
    best solutions of a discrete problem), but nodes are opened by what was measured.
    """
    opened, count = list[tuple[float, int, Table, dict[str, str]]](), itertools.count()

    def visit(tables: list[Table]) -> None:
        solutions = [(costs, s) for costs in tables if all(costs.values()) and (s := solve(costs, sizes, budget)) is not None]
        for costs, solution in sorted(solutions, key=lambda pair: sum(table[n][s] for n, s in pair[1].items())):
            if (allocation := try_out(solution)) is not None:
                heapq.heappush(opened, (allocation.kld, next(count), costs, solution))

    visit([table])
    while opened and not full():
        _, _, costs, solution = heapq.heappop(opened)
        visit([{**costs, n: {s: c for s, c in costs[n].items() if s != solution[n]}} for n in table])
