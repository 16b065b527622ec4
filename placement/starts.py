"""Where the search of chains starts: groups of one layer carried along the chain, and couples of consecutive layers.

A chain whose every layer could follow the one before is found by the first. Where what ties a layer to the one before and what
ties it to the one after are at odds, a placement that half follows both is a local optimum which annealing leaves slowly, since
what is to change is a long stretch of layers at once. There every second pair of layers is placed by itself (as multilevel
partitioning contracts a matching of the heaviest edges first: Karypis and Kumar 1998), and which pairs, changing along the
chain, is left to the recombination of both ways (`recombine.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coterie.placement.baselines import Assignment
from coterie.placement.problem import Problem

Array = NDArray[np.float64]

TURNS = 3  # how often the layers of a couple are placed anew, each given the other


def grown(problem: Problem) -> Assignment:
    """A chain grown from one layer's groups: experts that send to the same experts are grouped, then layer follows layer.

    Tried from several layers; the best is returned. Finds planted groups at once, where annealing from scratch is slow.
    """
    layers = problem.layers
    tried = sorted({0, layers // 4, layers // 2, 3 * layers // 4, layers - 1})
    return min((_grown_from(problem, layer) for layer in tried), key=problem.cost)


def _grown_from(problem: Problem, seed_layer: int) -> Assignment:
    weights = problem.transitions
    assert weights is not None
    found = np.zeros((problem.layers, problem.experts), dtype=np.int64)
    near = np.zeros((problem.experts, problem.experts))
    for matrix in (*weights[seed_layer : seed_layer + 1], *weights[seed_layer - 1 : seed_layer].transpose(0, 2, 1)):
        near += _alike(matrix)
    found[seed_layer] = groups_of(near, problem.slots)
    for layer in range(seed_layer + 1, problem.layers):
        found[layer] = _following(problem, weights[layer - 1].T, found[layer - 1])
    for layer in range(seed_layer - 1, -1, -1):
        found[layer] = _following(problem, weights[layer], found[layer + 1])
    return found


def coupled(problem: Problem, first: int) -> Assignment:
    """Layers `first` (0 or 1) and the next placed best together, then the two after them, and so on, each couple by itself.

    A layer without a partner, at an end of the chain, follows its only neighbour; there must be three layers at least. Ranks
    of different couples have nothing to do with each other.
    """
    weights = problem.transitions
    assert weights is not None
    found = np.zeros((problem.layers, problem.experts), dtype=np.int64)
    for layer in range(first, problem.layers - 1, 2):
        found[layer], found[layer + 1] = _couple(problem, weights[layer])
    if first == 1:
        found[0] = _following(problem, weights[0], found[1])
    if (problem.layers - first) % 2:
        found[-1] = _following(problem, weights[-1].T, found[-2])
    return found


def _couple(problem: Problem, weights: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ranks of two layers' experts: groups that send to the same experts, then each layer best given the other."""
    one = groups_of(_alike(weights), problem.slots)
    two = _following(problem, weights.T, one)
    for _ in range(TURNS):
        before, one = one, _following(problem, weights, two)
        if (before == one).all():
            break
        two = _following(problem, weights.T, one)
    return one, two


def _alike(weights: Array) -> Array:
    """How much any two experts send to the same experts: the cosine of their rows, `[E, E]`."""
    shares = weights / np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-12)
    return np.asarray(shares @ shares.T)


def _following(problem: Problem, weights: Array, neighbour: NDArray[np.int64]) -> NDArray[np.int64]:
    """A layer best given one neighbour's ranks `[E]`, every slot used; weights: traffic with its experts, `[E, E]`."""
    by_rank = weights[:, np.argsort(neighbour, kind="stable")].reshape(-1, problem.ranks, problem.slots)
    return transport(by_rank.sum(2), problem.slots)


def transport(kept: Array, slots: int) -> NDArray[np.int64]:
    """The rank of every expert `[E]` that keeps most together, `slots` experts on each; kept `[E, ranks]`, E ranks * slots."""
    _, position = linear_sum_assignment(np.repeat(kept, slots, axis=1), maximize=True)
    return np.asarray(position // slots)


def groups_of(near: Array, size: int) -> NDArray[np.int64]:
    """Groups of exactly `size` experts, int64 `[E]`, by merging the nearest groups that fit; near `[E, E]`, symmetric."""
    count = len(near)
    group = np.arange(count)
    members = np.ones(count, dtype=np.int64)
    link = near.astype(np.float64).copy()
    np.fill_diagonal(link, -np.inf)
    mean = link.copy() if size > 1 else np.full_like(link, -np.inf)
    while True:
        i, j = np.unravel_index(mean.argmax(), mean.shape)
        if not np.isfinite(mean[i, j]):
            break
        group[group == j] = i
        members[i] += members[j]
        members[j] = size + 1
        link[i] += link[j]
        link[:, i] = link[i]
        link[i, i] = -np.inf
        link[j] = link[:, j] = -np.inf
        mean[i] = mean[:, i] = np.where(members[i] + members > size, -np.inf, link[i] / (members[i] * members))
        mean[j] = mean[:, j] = -np.inf
    return _filled(group, size)


def _filled(group: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Groups numbered anew, full ones first; the experts of those that had no partner that fits fill up the rest in order."""
    full = [g for g in np.unique(group) if np.sum(group == g) == size]
    result = np.full(len(group), -1, dtype=np.int64)
    for number, g in enumerate(full):
        result[group == g] = number
    rest = np.flatnonzero(result < 0)
    rest = rest[np.argsort(group[rest], kind="stable")]
    result[rest] = len(full) + np.arange(len(rest)) // size
    return result
