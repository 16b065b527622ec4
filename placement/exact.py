"""Exact dynamic programming for `hops`, where all balanced partitions of a layer's experts can be listed.

Layers form a chain and ranks are interchangeable, so a state is an unlabelled partition; between two layers the best
relabelling of ranks is taken. 8 experts on 4 ranks have 105 states, 16 experts on 2 ranks 6,435.
"""

from __future__ import annotations

from itertools import combinations, permutations
from math import factorial

import numpy as np
from numpy.typing import NDArray

from coterie.placement.baselines import Assignment
from coterie.placement.deadline import Deadline
from coterie.placement.problem import Problem, one_hot

MAX_LABELLED = 14_000  # states x ranks; the work grows with its square
MAX_RANKS = 4
BLOCK = 256  # rows of the state-to-state table in memory at once


def fits(problem: Problem) -> bool:
    """Whether `solve` can do it in seconds: hops, every slot used, few enough partitions."""
    if (
        problem.transitions is None
        or not problem.interchangeable
        or problem.ranks > MAX_RANKS
        or problem.experts != problem.ranks * problem.slots
    ):
        return False
    partitions = factorial(problem.experts) // factorial(problem.slots) ** problem.ranks // factorial(problem.ranks)
    return bool(partitions * problem.ranks <= MAX_LABELLED)


def solve(problem: Problem, deadline: Deadline) -> Assignment | None:
    """An optimal placement, int64 `[L, E]`; None if no partition of some layer keeps to its load cap, or time ran out.

    The deadline is looked at between layers.
    """
    assert problem.transitions is not None
    states = partitions_of(problem.experts, problem.ranks)
    hosts = one_hot(states, problem.ranks).transpose(0, 2, 1).astype(np.float64)  # [state, rank, E]
    kept = [np.flatnonzero(_within_limits(problem, hosts, layer)) for layer in range(problem.layers)]
    if not all(len(k) for k in kept):
        return None
    best = np.zeros(len(kept[0]))
    back: list[NDArray[np.int64]] = []
    for layer in range(problem.layers - 1):
        if deadline.passed():
            return None
        best, origin = _step(hosts[kept[layer]], hosts[kept[layer + 1]], problem.transitions[layer], best)
        back.append(origin)
    path = [int(best.argmax())]
    for origin in reversed(back):
        path.append(int(origin[path[-1]]))
    chosen = [states[kept[layer][s]] for layer, s in enumerate(reversed(path))]
    return _relabelled(np.array(chosen), problem)


def _within_limits(problem: Problem, hosts: NDArray[np.float64], layer: int) -> NDArray[np.bool_]:
    kept = np.ones(len(hosts), dtype=bool)
    for limit in problem.limits:
        kept &= (hosts @ limit.weights[layer]).max(1) <= limit.caps[layer].min() * (1 + 1e-9)
    return kept


def partitions_of(experts: int, ranks: int) -> NDArray[np.int64]:
    """Every way to split `experts` into `ranks` unnamed groups of equal size, int64 `[ways, experts]` of group numbers."""
    size = experts // ranks
    found: list[NDArray[np.int64]] = []

    def fill(assignment: NDArray[np.int64], group: int) -> None:
        free = np.flatnonzero(assignment < 0)
        if not len(free):
            found.append(assignment)
            return
        for others in combinations(free[1:], size - 1):  # the first free expert opens the group: no order among groups
            filled = assignment.copy()
            filled[[free[0], *others]] = group
            fill(filled, group + 1)

    fill(np.full(experts, -1, dtype=np.int64), 0)
    return np.array(found)


def _step(
    here: NDArray[np.float64], following: NDArray[np.float64], weights: NDArray[np.float64], best: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Best total kept together up to each following state, and the state it came from."""
    value = np.full(len(following), -np.inf)
    origin = np.zeros(len(following), dtype=np.int64)
    ranks = here.shape[1]
    flat = following.reshape(-1, following.shape[2]).T
    for first in range(0, len(here), BLOCK):
        block = here[first : first + BLOCK]
        pairs = ((block @ weights).reshape(-1, weights.shape[0]) @ flat).reshape(len(block), ranks, len(following), ranks)
        together = np.full((len(block), len(following)), -np.inf)
        for order in permutations(range(ranks)):
            np.maximum(together, sum(pairs[:, g, :, order[g]] for g in range(ranks)), out=together)
        together += best[first : first + BLOCK, None]
        top = together.argmax(0)
        top_value = together[top, np.arange(len(following))]
        better = top_value > value
        value[better], origin[better] = top_value[better], first + top[better]
    return value, origin


def _relabelled(chosen: Assignment, problem: Problem) -> Assignment:
    """Names the groups of each layer so that they meet the layer before as well as they can."""
    assert problem.transitions is not None
    for layer in range(1, len(chosen)):
        pairs = one_hot(chosen[layer - 1], problem.ranks).T @ problem.transitions[layer - 1]
        pairs = pairs @ one_hot(chosen[layer], problem.ranks)  # [rank before, group]
        order = max(permutations(range(problem.ranks)), key=lambda o: sum(pairs[o[g], g] for g in range(problem.ranks)))
        chosen[layer] = np.array(order)[chosen[layer]]
    return chosen
