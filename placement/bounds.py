"""Lower bounds, valid for every placement of a problem's shape: no plan of this shape does better.

Without copies: the b-matching dual and the semidefinite bound (`semidefinite.py`) for `hops`, the semidefinite bound on shared
ranks for `dispatch`. With copies: weaker ones that hold whatever is copied. For `load` a counting argument, for `time` the
even spread of the least work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import coo_array

from coterie.placement import semidefinite
from coterie.placement.baselines import Assignment
from coterie.placement.cost import expert_seconds, latency
from coterie.placement.deadline import Deadline
from coterie.placement.problem import Problem
from coterie.placement.scenarios import ROBUST, Scenario
from coterie.placement.topology import Topology

Array = NDArray[np.float64]
LARGEST = 24  # experts in a pattern whose partitions are listed
NEIGHBOURS = 3  # entries per row and column, in slots, that the matching's linear program is given; its dual is checked on all


def lower_bound(problem: Problem, deadline: Deadline | None = None) -> float:
    """In the problem's counts, cheaply. Layers (dispatch) or pairs of layers (hops) are bounded one by one and summed."""
    if problem.transitions is None:
        layers = zip(problem.members, problem.prices, strict=True)
        return sum(dispatch_bound(members, prices, problem.slots) for members, prices in layers)
    total = 0.0
    for pairs in problem.transitions:
        if deadline is None or not deadline.passed():
            total += max(0.0, float(pairs.sum()) - most_together(pairs, problem.slots))
    return total


def dispatch_bound(members: NDArray[np.bool_], prices: Array, slots: int) -> float:
    """A pattern of n experts needs at least ceil(n / slots) ranks, at best its cheapest ones; holds with copies, too.

    members: bool `[patterns, E]`; prices: float64 `[patterns, ranks]`.
    """
    needed = -(-members.sum(1) // slots)
    cheapest = np.cumsum(np.sort(prices, axis=1), axis=1)
    used = np.flatnonzero(needed)
    return float(cheapest[used, needed[used] - 1].sum())


def most_together(pairs: Array, slots: int) -> float:
    """The heaviest b-matching of two layers' experts, each matched with at most `slots`: no rank holds more of them.

    pairs: float64 `[E, E]`. The matching polytope of a bipartite graph is integral, so a linear program finds it. It is given
    the heaviest entries of every row and column; its prices are then applied to all entries, which bounds from above
    whatever was left out and whatever the solver's tolerance.
    """
    size = len(pairs)
    kept = min(size, NEIGHBOURS * slots + 2)
    heavy = np.zeros(pairs.shape, dtype=bool)
    np.put_along_axis(heavy, np.argpartition(-pairs, kept - 1, axis=1)[:, :kept], True, axis=1)
    np.put_along_axis(heavy, np.argpartition(-pairs, kept - 1, axis=0)[:kept], True, axis=0)
    rows, cols = np.nonzero(heavy & (pairs > 0))
    if not len(rows):
        return 0.0
    count = np.arange(len(rows))
    sides = (np.concatenate([rows, size + cols]), np.concatenate([count, count]))
    matrix = coo_array((np.ones(2 * len(rows)), sides), shape=(2 * size, len(rows))).tocsr()
    solved = linprog(-pairs[rows, cols], A_ub=matrix, b_ub=np.full(2 * size, slots), bounds=(0, 1), method="highs")
    price = np.maximum(0.0, -solved.ineqlin.marginals) if solved.success else np.zeros(2 * size)
    surplus = np.maximum(0.0, pairs - price[:size, None] - price[None, size:])
    return float(slots * price.sum() + surplus.sum())


def hops_with_copies(problem: Problem) -> float:
    """A bound in counts that holds with copies: a rank brings at most slots x slots pairs of two layers together."""
    assert problem.transitions is not None
    together = problem.ranks * problem.slots**2
    total = 0.0
    for pairs in problem.transitions:
        flat = np.sort(pairs, axis=None)
        total += float(flat[: max(0, flat.size - together)].sum())
    return total


def rows_with_copies(problem: Problem) -> float:
    """A bound in counts on dispatch rows that holds with copies and whatever the homes: of a pattern's ranks, one may be home.

    A token is charged its rows on every rank but its own, so a pattern's prices sum to its tokens times ranks - 1.
    """
    total = 0.0
    for members, prices in zip(problem.members, problem.prices, strict=True):
        needed = -(-members.sum(1) // problem.slots)
        total += float((prices.sum(1) / max(problem.ranks - 1, 1) * np.maximum(0, needed - 1)).sum())
    return total


def rows_with_few_copies(problem: Problem, spare: NDArray[np.int64], found: Assignment, deadline: Deadline) -> float:
    """A bound in counts on dispatch rows where each layer has slots for `spare` `[L]` copies, for homes that are known.

    Without its copies, an expert that has some adds at most one row to each of its tokens: so no placement with copies is
    further below the bound for those without than the rows of the most used experts. found: as of `patterns_bound`.
    """
    plain, relief = replace(problem, limits=()), 0.0
    for members, prices, count in zip(problem.members, problem.prices, spare, strict=True):
        relief += float(np.sort(prices.max(1) @ members)[::-1][:count].sum())
    return max(rows_with_copies(problem), patterns_bound(plain, found, deadline) - relief)


def hops_with_few_copies(problem: Problem, spare: NDArray[np.int64], deadline: Deadline) -> float:
    """The same of a `hops` problem, in counts: only pairs with an expert that has copies are brought together by them."""
    assert problem.transitions is not None
    if problem.layers == 1:
        return 0.0
    traffic = np.zeros((problem.layers, problem.experts))
    traffic[:-1] += problem.transitions.sum(2)
    traffic[1:] += problem.transitions.sum(1)
    relief = sum(float(np.sort(layer)[::-1][:count].sum()) for layer, count in zip(traffic, spare, strict=True))
    return max(hops_with_copies(problem), both_bounds(replace(problem, limits=()), deadline) - relief)


def chain_bound(
    problem: Problem, deadline: Deadline, report: Callable[[float], None] | None = None, cost: float = np.inf
) -> float:
    """The semidefinite bound of a `hops` problem, in counts; report: called with each better bound; it stops at `cost`."""
    padded = problem.padded()
    assert padded.transitions is not None
    pairs, size = padded.transitions, padded.experts
    gain = np.zeros((len(pairs), 2 * size, 2 * size))
    gain[:, :size, size:] = pairs / 2
    gain[:, size:, :size] = pairs.transpose(0, 2, 1) / 2
    loads = np.stack([np.concatenate([load[:-1], load[1:]], axis=1) for load in _capped(padded)]) if _capped(padded) else None
    total = float(pairs.sum())
    hear = None if report is None else (lambda together: report(max(0.0, total - together)))
    empty = np.zeros((0, len(pairs), 2 * size))
    loads, target = empty if loads is None else loads, total - cost
    together = semidefinite.most_together(gain, 2, padded.ranks, loads, deadline, target, hear)
    return max(0.0, total - together)


def both_bounds(problem: Problem, deadline: Deadline, report: Callable[[float], None] | None = None) -> float:
    """The better of the cheap bound and the semidefinite one."""
    cheap = lower_bound(problem, deadline.share(0.2))
    if report is not None:
        report(cheap)
    hear = None if report is None else (lambda bound: report(max(cheap, bound)))
    return max(cheap, chain_bound(problem, deadline, hear))


def _capped(problem: Problem) -> list[Array]:
    """Every limit's weights over the layer's largest cap, `[L, E]`, where there is one."""
    found = []
    for limit in problem.limits:
        cap = limit.caps.max(1, keepdims=True)
        found.append(np.where(np.isfinite(cap) & (cap > 0), limit.weights / np.where(cap > 0, cap, 1), 0.0))
    return found


def patterns_bound(problem: Problem, found: Assignment, deadline: Deadline) -> float:
    """A bound in counts on the rows of a `dispatch` problem without copies.

    A pattern of n experts in groups of sizes s on its ranks saves sum(s - 1) rows and has sum(s (s - 1) / 2) pairs together;
    what can be saved is at most the concave envelope over the partitions of n, one line of which is taken for each
    pattern, the one active in `found`. The pairs together are then bounded by the semidefinite program of the layer.
    With known homes the rows that stay at home are bounded apart, by an assignment of experts to homes.
    """
    padded = problem.padded()
    uniform = all((p == p[:, :1]).all() for p in problem.prices)
    gain, most = np.zeros((padded.layers, padded.experts, padded.experts)), 0.0
    for layer in range(padded.layers):
        members = padded.members[layer].astype(np.float64)
        # With known homes a token pays for every rank but its own: the price is that of the dearest rank, less the home rows.
        price = problem.prices[layer][:, 0] if uniform else problem.prices[layer].max(1)
        intercept, slope, apart = _lines(problem, layer, found[layer])
        most += float((price * (apart - intercept)).sum())
        if not uniform:
            most -= _home_rows(members, price[:, None] - problem.prices[layer], problem.slots)
        both = (members * (price * slope)[:, None]).T @ members / 2
        np.fill_diagonal(both, 0.0)
        gain[layer] = both
    loads = np.stack(_capped(padded)) if padded.limits else np.zeros((0, padded.layers, padded.experts))
    saved = semidefinite.most_together(gain, 1, padded.ranks, loads, deadline, most - problem.cost(found))
    return max(most - saved, lower_bound(problem))


def _lines(problem: Problem, layer: int, found: NDArray[np.int64]) -> tuple[Array, Array, Array]:
    """Of the envelope line active in `found`: intercept and slope; and each pattern's number of experts. All `[patterns]`."""
    members = problem.members[layer]
    held = problem.held(layer, found)
    together = (held * (held - 1) / 2).sum(1)
    size = members.sum(1)
    intercept, slope = np.zeros(len(members)), np.zeros(len(members))
    for n in np.unique(size):
        lines = np.array(_envelope(int(n), problem.slots))
        at = size == n
        best = (lines[:, 0][None] + together[at][:, None] * lines[:, 1][None]).argmin(1)
        intercept[at], slope[at] = lines[best, 0], lines[best, 1]
    return intercept, slope, size.astype(np.float64)


@cache
def _envelope(n: int, slots: int) -> tuple[tuple[float, float], ...]:
    """Lines (intercept, slope) whose least value bounds the rows that a pattern of n saves, given its pairs together."""
    most: dict[int, int] = {}

    def split(left: int, largest: int, pairs: int, saved: int) -> None:
        if left == 0:
            most[pairs] = max(most.get(pairs, 0), saved)
            return
        for size in range(min(left, largest), 0, -1):
            split(left - size, size, pairs + size * (size - 1) // 2, saved + size - 1)

    if n > LARGEST:  # too many partitions to list: every pair saves at most one row
        return ((0.0, 1.0), (float(n - -(-n // slots)), 0.0))
    split(n, slots, 0, 0)
    hull: list[tuple[int, int]] = []
    for point in sorted(most.items()):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        if not hull or point[1] > hull[-1][1]:
            hull.append(point)
    lines = [(b[1] - _slope(a, b) * b[0], _slope(a, b)) for a, b in pairwise(hull)]
    return (*lines, (float(hull[-1][1]), 0.0))


def _slope(a: tuple[int, int], b: tuple[int, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _home_rows(members: Array, by_home: Array, slots: int) -> float:
    """The most rows that can stay at home: every expert on one rank, at most `slots` on each, every token counted once.

    members `[patterns, E]`, by_home `[patterns, ranks]`.
    """
    visits = members.T @ by_home  # [E, ranks]
    rows, columns = linear_sum_assignment(np.repeat(visits, slots, axis=1), maximize=True)
    return min(float(np.repeat(visits, slots, axis=1)[rows, columns].sum()), float(by_home[members.any(1)].sum()))


def load_bound(loads: Array, ranks: int, slots: int, worst: bool) -> float:
    """The least busiest-over-mean that any placement with copies reaches: every copy must fit under it.

    loads: `[scenarios, L, E]`. With a level t an expert of load x (the mean rank's being 1) needs ceil(x / t) copies; the
    least t for which all fit into the slots is a bound, and 1 is one.
    """
    by_scenario = []
    for scenario in loads:
        mean = scenario.sum(1) / ranks
        levels = [_level(row / m, ranks, slots) if m > 0 else 1.0 for row, m in zip(scenario, mean, strict=True)]
        by_scenario.append(float(np.mean(levels)))
    return max(by_scenario) if worst else float(np.mean(by_scenario))


def _level(load: Array, ranks: int, slots: int) -> float:
    """load `[E]`, relative to the mean rank."""
    low, high = 1.0, max(1.0, float(load.max()))

    def fits(level: float) -> bool:
        copies = np.maximum(1, np.ceil(load / level - 1e-12))
        return bool(copies.max() <= ranks and copies.sum() <= ranks * slots)

    if fits(low):
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return low


def time_bound(topology: Topology, scenarios: Sequence[Scenario], slots: int, robust: str) -> float:
    """Seconds per layer that no placement beats: the fewest rows over all links at once, the experts' work over all ranks.

    robust: the mean over the scenarios, or the worst of them.
    """
    t = topology
    speed = t.ranks * t.within.bytes_per_second + (t.nodes * t.between.bytes_per_second if t.nodes > 1 else 0.0)
    least = []
    for scenario in scenarios:
        assert scenario.trace is not None
        compute, read = expert_seconds(t, scenario.trace.phase, len(scenario.load))
        work = np.maximum(scenario.load.sum(1) * compute, (scenario.load > 0).sum(1) * read) / t.ranks
        needed = -(-(scenario.trace.expert_ids >= 0).sum(2) // slots)
        rows = np.maximum(0, needed - 1).sum(0)  # one of the ranks may be home
        least.append(float(np.mean(2 * (latency(t) + rows * t.row_bytes / speed) + work)))
    return ROBUST[robust](least)
