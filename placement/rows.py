"""Rows of tokens that return home: the solvers of `dispatch` and `time`, and how ranks are named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coterie.placement import bounds, copies, ilp, limits, local, nodes, replicas
from coterie.placement.baselines import Assignment
from coterie.placement.deadline import Deadline
from coterie.placement.prices import Prices
from coterie.placement.problem import Limit, Problem, dispatch_problem, held_by, on_nodes
from coterie.placement.task import Solution, Spread, Task, by_program, check_feasible, iterations_for, replaced, whole
from coterie.placement.timing import LayerTime

Array = NDArray[np.float64]
SEARCH_SHARE = 0.45  # of the time that is left; the rest is for the proof


def dispatch(task: Task) -> Solution:
    """Distinct ranks: tabu search on the true patterns, homes equally likely (or, with `exact`, those of the traces).

    Where links differ, what is searched for is rows at their prices (`prices.Prices`); bounds are on the evaluated number.
    """
    known = _dispatch(task, True) if _homes_fit(task) else None
    if task.copied:
        proves = task.prove and known is not None and task.world.rank == 0
        part = replaced(task, task.deadline.share(replicas.SEARCHED if proves else 1.0))
        holds, made = replicas.with_copies(part, dispatch, fill_dispatch, thins=True)
        target = _dispatch(task, False) if known is None else known
        bound = bounds.rows_with_copies(target)
        if proves:
            bound = bounds.rows_with_few_copies(target, task.spare, holds.argmax(2), task.deadline)
        return Solution(holds, whole(target, bound) * target.scale, made)
    problem = known if task.request.exact and known is not None else _dispatch(task, False)
    small = ilp.fits(problem) and task.prove
    searching = task.deadline.share(SEARCH_SHARE if small else 0.8 if task.prove else 1.0)
    best, made = _on_nodes(task, searching) if task.prices.tiered else _local(task, problem, searching, goes_on=small)
    if small and known is not None:
        best, bound = _proven(task, problem, known, best)
        return Solution(copies.held(best, task.ranks), whole(known, bound) * known.scale, made)
    target = problem if known is None else known
    if known is None:  # of a home that is not the expected one only this bound knows
        bound = bounds.rows_with_copies(target)
    else:
        bound = bounds.patterns_bound(target, best, task.deadline) if task.prove else bounds.lower_bound(target)
    if known is not None:
        best = _named(task, known, best)
    return Solution(copies.held(best, task.ranks), whole(target, bound) * target.scale, made)


def _proven(task: Task, problem: Problem, known: Problem, best: Assignment) -> tuple[Assignment, float]:
    """A small problem by integer programs: a placement at least as good, and a bound in counts on the evaluated number."""
    bound = 0.0
    if not task.prices.tiered:
        best, bound = by_program(problem, best, replaced(task, task.deadline.share(1 if problem is known else 0.5)))
    if problem is known:
        return best, bound
    best = _named(task, known, best)
    proof = ilp.solve(known, best, task.deadline.share(0.8), task.request.workers)
    return best, max(proof.lower_bound, bounds.patterns_bound(known, best, task.deadline))


def _on_nodes(task: Task, deadline: Deadline) -> tuple[Assignment, int]:
    """Nodes first, then ranks; and ranks first, put on nodes; each searched on with both priced. The better of every layer."""
    problem = _dispatch(task, False, task.prices)
    by_node = nodes.of_nodes(problem)
    begin = limits.start(problem.padded())[:, : problem.experts] // problem.per_node
    placed, first = _local(task, by_node, deadline.share(0.25), begin=begin)
    plain, second = _local(task, replace(problem, node_prices=()), deadline.share(0.33))
    ranks_first = nodes.regrouped(problem, plain)
    nodes_first = nodes.into_ranks(problem, placed, ranks_first)
    one, third = _local(task, problem, deadline.share(0.5), begin=nodes_first)
    other, fourth = _local(task, problem, deadline, begin=ranks_first)
    costs = np.array([_layer_costs(problem, found) for found in (one, other)])
    best = np.where((costs[0] <= costs[1])[:, None], one, other)
    return best, first + second + third + fourth


class Filling(Protocol):
    """Fills free slots with copies of what is on the ranks, `[L, E, ranks]`; allowed: None for what is within the limits."""

    def __call__(self, task: Task, holds: NDArray[np.bool_], allowed: copies.Allowed | None = None) -> NDArray[np.bool_]:
        """Until the task's deadline."""
        ...


def fill_dispatch(task: Task, holds: NDArray[np.bool_], allowed: copies.Allowed | None = None) -> NDArray[np.bool_]:
    """`Filling` by rows at their prices."""
    prices = task.prices

    def paid(layer: int, sent: Array, entered: Array, pairs: Array, touched: Array) -> float:
        return float((sent * prices.by_rank).sum() + (entered * prices.by_node).sum())

    return _filled(task, holds, paid, allowed)


def fill_time(task: Task, holds: NDArray[np.bool_], allowed: copies.Allowed | None = None) -> NDArray[np.bool_]:
    """`Filling` by predicted seconds."""
    model = LayerTime(task.request.topology, task.scenarios, task.weights)
    cost: copies.Cost = lambda layer, sent, entered, pairs, touched: model.of_copies(layer, sent, pairs, touched)  # noqa: E731
    return _filled(task, holds, cost, allowed)


def _filled(task: Task, holds: NDArray[np.bool_], cost: copies.Cost, allowed: copies.Allowed | None) -> NDArray[np.bool_]:
    patterns = task.patterns(task.request.exact and _homes_fit(task))
    within = allowed or replicas.within_limits(task)
    weights = task.row_weights, task.weights
    return copies.for_rows(patterns, *weights, holds, task.open_slots, task.request.topology, cost, within, task.deadline)


def _named(task: Task, known: Problem, found: Assignment) -> Assignment:
    return at_home(_dispatch(task, True, task.prices) if task.prices.matter else known, found)


def _homes_fit(task: Task) -> bool:
    """Whether patterns by home fit in memory: `[patterns, ranks]` in float64, for every layer."""
    size = sum(len(p.weight) * task.ranks * 8 for patterns in task.patterns() for p in patterns)
    return size < 2e9


def _dispatch(task: Task, known_homes: bool, prices: Prices | None = None) -> Problem:
    patterns = task.patterns(known_homes)
    return dispatch_problem(patterns, task.row_weights, task.ranks, task.slots, task.limits, known_homes, prices)


def _local(
    task: Task, problem: Problem, deadline: Deadline, score: Any = None, begin: Assignment | None = None, goes_on: bool = False
) -> tuple[Assignment, int]:
    arguments: dict[str, Any] = {"problem": problem, "iterations": iterations_for(task, problem, goes_on), "begin": begin}
    cheap = None if score else whole(problem, bounds.rows_with_copies(problem)) * problem.scale
    scale = None if problem.node_prices else problem.scale if score is None else 1 / problem.layers
    report = lambda cost, made: task.progress(None if scale is None else cost * scale, cheap, made)  # noqa: E731
    if score is not None:
        arguments["score"] = score
    spread = Spread(task, "coterie.placement.local:search", arguments)
    found = spread.run(local.search, deadline, max(0, task.request.workers - 1), report=report)
    value = _layer_costs if score is None else lambda p, a: score.of(p, a)
    costs = np.array([value(problem, a) for a, _ in found])  # [worker, layer]
    best = np.stack([found[w][0][layer] for layer, w in enumerate(costs.argmin(0))])
    check_feasible(problem, best, task)
    return best, sum(n for _, n in found)


def _layer_costs(problem: Problem, assignment: Assignment) -> list[float]:
    """Of every layer; infinite beyond a limit."""
    return [problem.layer_cost(n, row) if problem.keeps(n, row) else np.inf for n, row in enumerate(assignment)]


def at_home(problem: Problem, assignment: Assignment) -> Assignment:
    """Names each layer's groups so that as many rows as can be stay at home; the number of ranks and nodes does not change."""
    if problem.node_prices and not problem.interchangeable:
        return assignment
    named = assignment.copy()
    for layer in range(problem.layers):
        hosts = problem.held(layer, assignment[layer]) > 0
        cost: Array = hosts.T.astype(np.float64) @ problem.prices[layer]  # [group, rank]
        if problem.node_prices:
            entered = on_nodes(hosts, problem.per_node).T.astype(np.float64) @ problem.node_prices[layer]
            order = nodes.named(cost, entered)
        else:
            for limit in problem.limits:  # a group goes where there is room for it, as where it is now
                held = held_by(assignment[layer], limit.weights[layer], problem.ranks)
                cost[held[:, None] > np.maximum(limit.caps[layer][None], np.diag(held)) * (1 + 1e-9)] = np.inf
            _, order = linear_sum_assignment(cost)
        named[layer] = order[assignment[layer]]
    return named


@dataclass(frozen=True)
class TimeScore:
    """`local.Score` of the time objective for a problem whose prices are rows: picklable, for the workers."""

    time: LayerTime
    per_token: float

    def __call__(self, rows: Array, load: Array) -> Array:
        """Seconds of a layer `[n]`."""
        return self.time.score(rows * self.per_token, load)

    def of(self, problem: Problem, assignment: Assignment) -> list[float]:
        """Seconds of every layer of a placement; infinite beyond a limit."""
        seconds = []
        for layer, row in enumerate(assignment):
            rows = (problem.prices[layer] * (problem.held(layer, row) > 0)).sum(0)
            load = held_by(row, self.time.weight[layer], problem.ranks)
            seconds.append(float(self(rows[None], load[None])[0]) if problem.keeps(layer, row) else np.inf)
        return seconds


def timed(task: Task, base: Problem) -> tuple[Problem, TimeScore]:
    """A dispatch problem as the local search minimises time on it: its first limit holds the experts' work; and the score."""
    model = LayerTime(task.request.topology, task.scenarios, task.weights)
    weighed = Limit(model.weight, np.full((base.layers, task.ranks), np.inf))
    return replace(base, limits=(weighed, *task.limits), integral=False), TimeScore(model, base.scale * base.layers)


def time(task: Task) -> Solution:
    """The minimax of links and experts: dispatch first, then tabu search on the predicted time itself."""
    bound = bounds.time_bound(task.request.topology, task.scenarios, task.slots, task.request.robust)
    if task.copied:
        holds, made = replicas.with_copies(task, time, fill_time, thins=True)
        return Solution(holds, bound, made)
    base = _dispatch(task, False)
    problem, score = timed(task, base)
    begin, first = _local(task, base, task.deadline.share(0.4))
    best, second = _local(task, problem, task.deadline.share(0.9), score, begin)
    found = [best, at_home(_dispatch(task, True), best)] if _homes_fit(task) else [best]
    return Solution(min((copies.held(a, task.ranks) for a in found), key=task.evaluated), bound, first + second)
