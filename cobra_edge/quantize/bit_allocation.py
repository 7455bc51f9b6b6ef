"""Bit allocation: choose a scheme for each matrix under a budget of bits, with the least KLD of the whole model.

Minimizing Σ KLD of single matrices subject to Σ bits ≤ budget is a multiple-choice knapsack problem, which is solved exactly.
But the errors of several matrices do not add up (those of the embedding and of a tied head interact, for example), so the best
solution, its neighbours and the uniform recipes within the budget are measured as whole models, and the best of them is taken.
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

_MOST_MEASURED = 32  # allocations
_UNITS = 1 << 16  # granularity of a budget

# By matrix and storage: bits in the file.
Sizes = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class BitAllocation:
    """How each matrix is stored.

    Attributes:
        tensors: scheme by matrix, or "float16".
        bits_per_weight: of all matrices, as `recipe.matrix_bits` counts.
        kld: mean KLD of the whole model from the float model, nats; None if it was not measured.
        kld_alone: sum of the KLDs of single matrices, or of their expected costs, nats; NaN where one is unknown.
    """

    tensors: dict[str, str]
    bits_per_weight: float
    kld: float | None
    kld_alone: float


def option_bits(config: MambaConfig, recipe: Recipe) -> dict[str, dict[str, int]]:
    """Return the bits of each matrix in the file, by each storage that fits it."""
    return {
        name: {s: matrix_bits(config, of_tensors(recipe, {name: s}))[name] for s in fits}
        for name, fits in candidates(config).items()
    }


def smallest_allocation(config: MambaConfig, recipe: Recipe) -> dict[str, str]:
    """Return the storage with the fewest bits, by matrix."""
    return {name: min(bits, key=bits.__getitem__) for name, bits in option_bits(config, recipe).items()}


def least_bits(config: MambaConfig, recipe: Recipe) -> float:
    """Return the bits per weight of the smallest allocation."""
    return sum(min(bits.values()) for bits in option_bits(config, recipe).values()) / matrix_weights(config)


def require_reachable(config: MambaConfig, recipe: Recipe, bits_per_weight: float) -> None:
    """Raise InputError if no allocation has as few bits per weight."""
    smallest, least = smallest_allocation(config, recipe), least_bits(config, recipe)
    if bits_per_weight < least:
        by_storage: dict[str, set[str]] = {}
        for name, storage in smallest.items():
            by_storage.setdefault(storage, set()).add(name.removesuffix(".weight").rpartition(".")[2])
        bounds = ", ".join(f"{s} ({', '.join(sorted(kinds))})" for s, kinds in sorted(by_storage.items()))
        raise InputError(
            f"{bits_per_weight:g} bits per weight is not possible: this model needs at least "
            f"{math.ceil(least * 1000) / 1000:g}, scales included, with its matrices as {bounds}; allow more bits"
        )


def solve(costs: Table, sizes: Sizes, budget_bits: float) -> dict[str, str] | None:
    """Solve the multiple-choice knapsack problem: one storage for each matrix, minimal Σ cost with Σ bits ≤ budget.

    Dynamic programming over the bits spent. It is exact if the budget is at most 2^16 times the greatest common divisor of all
    sizes; otherwise sizes are rounded up to 2^-16 of the budget, and the budget is still kept.

    Args:
        costs: by matrix and storage.
        sizes: bits, for at least those storages.
        budget_bits: of all matrices together.

    Returns:
        Storage by matrix, or None if nothing fits.
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
    """Return the storage by matrix of each uniform recipe of a candidate scheme."""
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
    """Find the allocation within a budget with the least KLD.

    Args:
        config: sizes of the decoder.
        recipe: method, rotations and activations; its tensors are ignored.
        table: KLD of each matrix alone.
        bits_per_weight: budget over all matrices, as `recipe.matrix_bits` counts.
        measure: returns the mean KLD (nats) of a recipe from the float model.
        on_measured: called with the number of measured allocations and their maximum.

    Raises:
        InputError: the budget is too small for any allocation, or none within it gives finite answers.
    """
    require_reachable(config, recipe, bits_per_weight)
    sizes, weights = option_bits(config, recipe), matrix_weights(config)
    budget = bits_per_weight * weights
    measured = dict[tuple[str, ...], BitAllocation]()

    def full() -> bool:
        return len(measured) >= _MOST_MEASURED

    def evaluate(tensors: dict[str, str]) -> BitAllocation | None:
        """Measure an allocation; None if it is over the budget, already measured, or one too many."""
        bits = sum(matrix_bits(config, of_tensors(recipe, tensors)).values())
        key = tuple(tensors[name] for name in sizes)
        if key in measured or bits > budget or full():
            return None
        on_measured(len(measured), _MOST_MEASURED)
        alone = sum(table[name].get(storage, math.inf) for name, storage in tensors.items())
        found = measured[key] = BitAllocation(tensors, bits / weights, measure(of_tensors(recipe, tensors)), alone)
        log.info("%.3f bits per weight: KLD %.3e, sum of single-matrix KLDs %.3e", found.bits_per_weight, found.kld, alone)
        return found

    for tensors in uniform_allocations(config):
        if all(storage in sizes[name] for name, storage in tensors.items()):
            evaluate(tensors)
    _search(table, sizes, budget, evaluate, full)
    on_measured(_MOST_MEASURED, _MOST_MEASURED)
    best = min(measured.values(), key=lambda a: (_measured_kld(a), a.bits_per_weight), default=None)
    if best is None or not math.isfinite(_measured_kld(best)):
        raise InputError(f"no allocation of {bits_per_weight:g} bits per weight gives finite answers; allow more bits")
    return best


def _measured_kld(allocation: BitAllocation) -> float:
    assert allocation.kld is not None
    return allocation.kld


def allocate_by_costs(config: MambaConfig, recipe: Recipe, costs: Table, bits_per_weight: float | None) -> BitAllocation:
    """Return the allocation within a budget with the least sum of expected costs (`costs.expected_costs`).

    Args:
        config: sizes of the decoder.
        recipe: method, rotations and activations; its storages are ignored with a budget.
        costs: nats, by matrix and storage.
        bits_per_weight: budget over all matrices, as `recipe.matrix_bits` counts; None for the storages of the recipe.

    Raises:
        InputError: the budget is too small for any allocation.
    """
    tensors: dict[str, str] | None
    if bits_per_weight is None:
        tensors = {name: recipe.storage(name) for name in matrix_names(config)}
    else:
        require_reachable(config, recipe, bits_per_weight)
        tensors = solve(costs, option_bits(config, recipe), bits_per_weight * matrix_weights(config))
        if tensors is None:
            raise InputError(f"no allocation of {bits_per_weight:g} bits per weight is finite; allow more bits")
    total = sum(costs[name].get(storage, math.nan) for name, storage in tensors.items())
    bits = sum(matrix_bits(config, of_tensors(recipe, tensors)).values())
    return BitAllocation(tensors, bits / matrix_weights(config), None, total)


def _search(
    table: Table,
    sizes: Sizes,
    budget: float,
    evaluate: Callable[[dict[str, str]], BitAllocation | None],
    full: Callable[[], bool],
) -> None:
    """Evaluate the knapsack's solution, then neighbours of the best one so far, until none is new or `full`.

    A node is a table and its solution. Each child excludes one of the solution's choices (as in Lawler 1972, for the k best
    solutions of a discrete problem), but nodes are expanded in the order of their measured KLD.
    """
    opened, count = list[tuple[float, int, Table, dict[str, str]]](), itertools.count()

    def visit(tables: list[Table]) -> None:
        solutions = [(costs, s) for costs in tables if all(costs.values()) and (s := solve(costs, sizes, budget)) is not None]
        for costs, solution in sorted(solutions, key=lambda pair: sum(table[n][s] for n, s in pair[1].items())):
            if (allocation := evaluate(solution)) is not None:
                heapq.heappush(opened, (_measured_kld(allocation), next(count), costs, solution))

    visit([table])
    while opened and not full():
        _, _, costs, solution = heapq.heappop(opened)
        visit([{**costs, n: {s: c for s, c in costs[n].items() if s != solution[n]}} for n in table])
