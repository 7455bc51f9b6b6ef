"""Mix: which scheme each matrix gets under a budget of bits, so that the whole model drifts least.

Σ KLD of each matrix alone under Σ bits ≤ budget is a multiple-choice knapsack, and a solver finds its best solutions. But
errors of several matrices do not just add up: the best solutions, and the uniform recipes that fit, are measured as a whole,
and the best measured one is taken.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, MachineError
from ..model.config import MambaConfig
from ..recipe import FLOAT16, Recipe, matrix_bits, matrix_names, matrix_weights, uniform_recipe
from ..scheme import SCHEMES
from .sensitivity import SCHEMES_OF_A_MIX, Table, candidates, of_tensors

log = logging.getLogger(__name__)

_SOLUTIONS = 8  # of the knapsack, that are measured
_SOLVER_SECONDS = 60.0
_SCALE = 1e6  # of the costs: the solver takes differences below 1e-6 for none

# By matrix and storage: bits in the file.
Sizes = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Mix:
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


def require_reachable(config: MambaConfig, recipe: Recipe, bits_per_weight: float) -> None:
    """Raise InputError where no mix takes as few bits a weight."""
    sizes = option_bits(config, recipe)
    smallest = {name: min(tried, key=tried.__getitem__) for name, tried in sizes.items()}
    least = sum(sizes[name][s] for name, s in smallest.items()) / matrix_weights(config)
    if bits_per_weight < least:
        by_storage: dict[str, set[str]] = {}
        for name, storage in smallest.items():
            by_storage.setdefault(storage, set()).add(name.removesuffix(".weight").rpartition(".")[2])
        bounds = ", ".join(f"{s} ({', '.join(sorted(kinds))})" for s, kinds in sorted(by_storage.items()))
        raise InputError(
            f"{bits_per_weight:g} bits a weight cannot be reached: this model takes at least {math.ceil(least * 1000) / 1000:g}, "
            f"scales counted; the smallest that matrices can be stored by is {bounds}; ask for more"
        )


def best_solutions(costs: Table, sizes: Sizes, budget_bits: float, wanted: int = 1) -> list[dict[str, str]]:
    """Solve the multiple-choice knapsack: one storage for each matrix, least Σ cost with Σ bits ≤ budget.

    Args:
        costs: by matrix and storage, not negative.
        sizes: bits of at least those storages.
        budget_bits: for all matrices together.
        wanted: how many solutions, each the best of those not yet given.

    Returns:
        Storages by matrix, best first; fewer than wanted, or none, where there are no more.

    Raises:
        MachineError: scipy is not installed.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise MachineError(f"mixing schemes needs {error.name}; install it with: pip install 'cobra-edge[export]'") from error
    pairs = [(name, storage) for name, row in costs.items() for storage in row]
    names = list(costs)
    cost = np.array([costs[n][s] for n, s in pairs])
    bits = np.array([sizes[n][s] for n, s in pairs], np.float64)
    rows = [names.index(n) for n, _ in pairs]
    one_each = csr_array((np.ones(len(pairs)), (rows, range(len(pairs)))), (len(names), len(pairs)))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(bits[None] / budget_bits, -np.inf, 1)]
    found = list[dict[str, str]]()
    while len(found) < wanted:
        # Without presolve: HiGHS' writes to stdout.
        options = {"presolve": False, "mip_rel_gap": 0.0, "time_limit": _SOLVER_SECONDS}
        solved = milp(
            cost * (_SCALE / (cost.max() or 1)), integrality=np.ones(len(pairs)), bounds=Bounds(0, 1), constraints=constraints,
            options=options,
        )  # fmt: skip
        if solved.x is None:
            break
        if solved.status != 0:
            log.warning("the best mix was not proven best after %.0f s; going on with the best found", _SOLVER_SECONDS)
        taken = solved.x > 0.5
        if bits[taken].sum() <= budget_bits:  # the solver allows itself a rounding error
            found.append({n: s for (n, s), t in zip(pairs, taken, strict=True) if t})
        constraints.append(LinearConstraint(taken[None].astype(float), -np.inf, len(names) - 1))
    return found


def uniform_mixes(config: MambaConfig) -> list[dict[str, str]]:
    """Return the storages by matrix of the uniform recipes of a mix's schemes."""
    found = []
    for scheme in SCHEMES_OF_A_MIX:
        try:
            recipe, _ = uniform_recipe(config, SCHEMES[scheme])
        except InputError:  # fits no matrix of this model
            continue
        found.append({name: recipe.storage(name) for name in matrix_names(config)})
    return found


def choose_mix(
    config: MambaConfig,
    recipe: Recipe,
    table: Table,
    bits_per_weight: float,
    measure: Callable[[Recipe], float],
    on_mix: Callable[[int, int], None] = lambda done, total: None,
) -> Mix:
    """Find the mix within a budget with which the model drifts least.

    Args:
        config: sizes of the decoder.
        recipe: method, rotations and activations; its tensors do not count.
        table: what each matrix costs alone.
        bits_per_weight: budget of all matrices, as `recipe.matrix_bits` counts.
        measure: returns the mean KLD (nats) of a recipe from the float model.
        on_mix: told how many of the mixes are measured, and how many there are.

    Raises:
        InputError: the budget is below what any mix takes, or nothing within it gives finite answers. MachineError: scipy is
            not installed.
    """
    require_reachable(config, recipe, bits_per_weight)
    sizes, weights = option_bits(config, recipe), matrix_weights(config)
    budget = bits_per_weight * weights

    def bits(tensors: Mapping[str, str]) -> int:
        return sum(matrix_bits(config, of_tensors(recipe, dict(tensors))).values())

    tried = _distinct([*best_solutions(table, sizes, budget, _SOLUTIONS), *uniform_mixes(config)])
    tried = [t for t in tried if bits(t) <= budget]
    measured = []
    for done, tensors in enumerate(tried):
        on_mix(done, len(tried))
        alone = sum(table[n].get(s, math.inf) for n, s in tensors.items())
        measured.append(Mix(tensors, bits(tensors) / weights, measure(of_tensors(recipe, tensors)), alone))
        log.info("mix of %.3f bits: KLD %.3e, %.3e expected", measured[-1].bits_per_weight, measured[-1].kld, alone)
    on_mix(len(tried), len(tried))
    best = min(measured, key=lambda m: (m.kld, m.bits_per_weight), default=None)
    if best is None or not math.isfinite(best.kld):
        raise InputError(f"no mix of {bits_per_weight:g} bits a weight gives finite answers; ask for more bits")
    return best


def _distinct(mixes: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return list({tuple(sorted(m.items())): m for m in mixes}.values())
