"""Lower bounds that cost next to nothing, valid for every placement of a problem's shape without copies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from coterie.placement.problem import Problem


def lower_bound(problem: Problem) -> float:
    """In the problem's counts. Layers (dispatch) or pairs of layers (hops) are bounded one by one and summed."""
    if problem.transitions is None:
        layers = zip(problem.members, problem.prices, strict=True)
        return sum(dispatch_bound(members, prices, problem.slots) for members, prices in layers)
    return sum(float(pairs.sum()) - most_together(pairs, problem.slots) for pairs in problem.transitions)


def dispatch_bound(members: NDArray[np.bool_], prices: NDArray[np.float64], slots: int) -> float:
    """A pattern of n experts needs at least ceil(n / slots) ranks, at best its cheapest ones.

    members: bool `[patterns, E]`; prices: float64 `[patterns, ranks]`.
    """
    needed = -(-members.sum(1) // slots)
    cheapest = np.cumsum(np.sort(prices, axis=1), axis=1)
    return float(sum(cheapest[p, n - 1] for p, n in enumerate(needed) if n > 0))


def most_together(pairs: NDArray[np.float64], slots: int) -> float:
    """The heaviest b-matching of two layers' experts, each matched with at most `slots`: no rank holds more of them.

    pairs: float64 `[E, E]`. The matching polytope of a bipartite graph is integral, so a linear program finds it; its dual
    value is returned, which bounds from above whatever the solver's tolerance.
    """
    rows, cols = np.nonzero(pairs)
    if not len(rows):
        return 0.0
    size, count = len(pairs), np.arange(len(rows))
    sides = (np.concatenate([rows, size + cols]), np.concatenate([count, count]))
    matrix = coo_array((np.ones(2 * len(rows)), sides), shape=(2 * size, len(rows))).tocsr()
    weight = pairs[rows, cols]
    solved = linprog(-weight, A_ub=matrix, b_ub=np.full(2 * size, slots), bounds=(0, 1), method="highs")
    price = np.maximum(0.0, -solved.ineqlin.marginals) if solved.success else np.zeros(2 * size)
    surplus = np.maximum(0.0, weight - price[rows] - price[size + cols])
    return float(slots * price.sum() + surplus.sum())
