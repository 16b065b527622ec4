"""The integer programs, in PuLP with HiGHS or, where highspy is not installed, with CBC, and what they prove.

hops: binary x[l,e,g]; y[l,e,f,g] <= both x's says that the pair is together on g. The capacity rows multiplied by x
(reformulation-linearisation: sum_f y <= slots * x) make the relaxation strong. ExFlow's chain program, kept exact.
dispatch: per layer, d[p,g] >= x[e,g] for every expert e of pattern p: a row is paid once per rank and pattern; with the
pair variables of the same kind, d[p,g] >= x[e,g] + x[f,g] - y[e,f,g], which alone is exact for top-2 routing.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

from coterie.placement.baselines import Assignment
from coterie.placement.bounds import dispatch_bound, lower_bound
from coterie.placement.deadline import Deadline
from coterie.placement.problem import Problem

GAPS = (0.0, 1e-6)  # relative and absolute: costs are counts
MAX_VARIABLES = 150_000  # beyond this the model takes longer to build than a search to converge
Cell = dict[tuple[int, ...], pulp.LpVariable]
Layers = list[NDArray[np.int64]]  # a group number per expert, one array per layer


@dataclass(frozen=True)
class Proof:
    """assignment: int64 `[L, E]` or None if none was found; lower_bound: on the cost, in the problem's counts."""

    assignment: Assignment | None
    lower_bound: float


@dataclass(frozen=True)
class Outcome:
    """found: the model's variables hold an integer solution; bound: on its objective, None if nothing was proven."""

    found: bool
    bound: float | None


class WarmHiGHS(pulp.HiGHS):  # type: ignore[misc]
    """PuLP's HiGHS, started from a known solution, which PuLP's own interface does not offer."""

    def __init__(self, start: dict[str, float], deadline: Deadline, **options: Any) -> None:
        super().__init__(**options)
        self.start, self.deadline = start, deadline

    def callSolver(self, lp: pulp.LpProblem) -> None:  # noqa: D102 (PuLP's name)
        import highspy

        if self.start:
            solution = highspy.HighsSolution()
            solution.col_value = [self.start.get(v.name, 0.0) for v in lp.variables()]
            lp.solverModel.setSolution(solution)
        _run_interruptibly(lp.solverModel, self.deadline)


def _run_interruptibly(solver: Any, deadline: Deadline) -> None:
    """HiGHS in a thread of its own, so that ctrl-C is heard at once; it is cancelled at its next check."""
    solver.HandleUserInterrupt = True
    thread = threading.Thread(target=solver.run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
            if deadline.stop.is_set():
                solver.cancelSolve()
    except KeyboardInterrupt:
        solver.cancelSolve()
        raise


def highs_is_installed() -> bool:
    """Whether PuLP could import highspy."""
    return bool(pulp.HiGHS().available())


def run(model: pulp.LpProblem, start: dict[str, float], deadline: Deadline, threads: int, gaps: tuple[float, float]) -> Outcome:
    """Solve from `start` until `deadline`, at least for a tenth of a second.

    start: a solution, by variable name, zeros left out; gaps: relative and absolute, at which a solution is good enough.
    CBC states a bound only for what it proved optimal. A solver that gives up before the deadline without a solution,
    though it was given one, is warned about (RuntimeWarning); one that cannot be run raises PulpSolverError.
    """
    limit = max(0.1, deadline.left())
    options = dict(msg=False, timeLimit=limit, threads=threads, gapRel=gaps[0], gapAbs=gaps[1])
    if highs_is_installed():
        model.solve(WarmHiGHS(start, deadline, **options))
        bound = model.sense * float(model.solverModel.getInfo().mip_dual_bound)  # HiGHS is given a minimisation
    else:
        for variable in model.variables():
            variable.setInitialValue(start.get(variable.name, 0.0), check=False)
        model.solve(pulp.PULP_CBC_CMD(warmStart=True, **options))
        bound = float(model.objective.value()) if model.sol_status == pulp.LpSolutionOptimal else math.nan
    found = model.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    if not found and not deadline.passed():
        status = pulp.LpSolution[model.sol_status]
        warnings.warn(f"{model.name}: the solver ended with {status!r}; its start is kept", RuntimeWarning, stacklevel=2)
    return Outcome(found, bound if math.isfinite(bound) else None)


def equal_groups(model: pulp.LpProblem, layers: Layers, span: range, parts: int) -> Cell:
    """Binary x[l,e,g] for the layers of `span`: expert e in one group g, group sizes floor or ceil of E_l / parts."""
    x: Cell = {}
    for layer in span:
        experts = range(len(layers[layer]))
        for e in experts:
            for g in range(parts):
                x[layer, e, g] = model.add_variable(f"x_{layer}_{e}_{g}", cat="Binary")
            model += pulp.lpSum(x[layer, e, g] for g in range(parts)) == 1
        for g in range(parts):
            size = pulp.lpSum(x[layer, e, g] for e in experts)
            model += size >= len(experts) // parts
            model += size <= -(-len(experts) // parts)
    return x


def read_groups(x: Cell, layers: Layers, span: range, parts: int) -> Layers:
    """The groups that solved variables of `equal_groups` state."""
    return [
        np.array([[x[l, e, g].varValue for g in range(parts)] for e in range(len(layers[l]))]).reshape(-1, parts).argmax(1)
        for l in span  # noqa: E741
    ]


def over_windows(
    start: Layers,
    width: int,
    deadline: Deadline,
    improve: Callable[[Layers, int, int, Deadline], Layers | None],
    cost: Callable[[Layers], float],
) -> Layers:
    """Re-solve runs of `width` neighbouring layers, overlapping by half, until a whole pass gains nothing or time is up.

    improve(layers, first, end, deadline): a solution with layers first to end - 1 chosen anew, None if it found none.
    One window over all layers is the whole program and is solved once.
    """
    best, best_cost, last = start, cost(start), max(0, len(start) - width)
    firsts = [*range(0, last, max(1, width // 2)), last]
    gained = True
    while gained:
        gained = False
        for i, first in enumerate(firsts):
            if deadline.passed():
                return best
            found = improve(best, first, min(first + width, len(start)), deadline.share(1 / (len(firsts) - i)))
            if found is not None and cost(found) < best_cost - 1e-9 * abs(best_cost):
                best, best_cost, gained = found, cost(found), len(firsts) > 1
    return best


def fits(problem: Problem) -> bool:
    """Whether the models are small enough to be tried."""
    if problem.transitions is not None:
        return _hops_size(problem.transitions, problem.ranks) <= MAX_VARIABLES
    return all(_dispatch_size(members, problem.ranks) <= MAX_VARIABLES for members in problem.members)


def _hops_size(transitions: NDArray[np.float64], ranks: int) -> int:
    return ranks * (int((transitions > 0).sum()) + (len(transitions) + 1) * int(transitions.shape[1]))


def _dispatch_size(members: NDArray[np.bool_], ranks: int) -> int:
    picks = members.sum(1).astype(np.int64)
    return int(ranks * (1 + picks * (picks - 1) // 2).sum())


def solve(problem: Problem, start: Assignment, deadline: Deadline, threads: int = 1) -> Proof:
    """Improve `start` and bound the optimum until `deadline`.

    Layers of a dispatch problem are independent and share the time that is left. A layer or chain for which the model
    would be too large, or no time is left, keeps its start and the bound of `bounds.py`.
    """
    if problem.transitions is not None:
        return _solve_hops(problem, start, deadline, threads)
    best, bound = start.copy(), 0.0
    for layer in range(problem.layers):
        share = deadline.share(1 / (problem.layers - layer))
        proof = _solve_dispatch_layer(problem, layer, start[layer], share, threads)
        bound += proof.lower_bound
        if proof.assignment is not None:
            best[layer] = proof.assignment[0]
    return Proof(best, bound)


def _solve_hops(problem: Problem, start: Assignment, deadline: Deadline, threads: int) -> Proof:
    weights = problem.transitions
    assert weights is not None
    cheap, pairs = lower_bound(problem), np.argwhere(weights > 0)
    if _hops_size(weights, problem.ranks) > MAX_VARIABLES or deadline.passed():
        return Proof(None, cheap)
    model = pulp.LpProblem("hops", pulp.LpMinimize)
    x = _placement_variables(model, problem, range(problem.layers))
    y: Cell = {}
    for layer, e, f in pairs.tolist():
        for g in range(problem.ranks):
            y[layer, e, f, g] = model.add_variable(f"y_{layer}_{e}_{f}_{g}", 0, 1)
    model += pulp.lpSum(-float(weights[k[:3]]) * v for k, v in y.items())
    _products(model, problem, x, y)
    named = start
    if problem.interchangeable:
        _interchangeable(model, problem, x, layer=0)
        named = _canonical(start)
    values = {v.name: float(named[layer, e] == g) for (layer, e, g), v in x.items()}
    values |= {v.name: float(named[k[0], k[1]] == k[3] and named[k[0] + 1, k[2]] == k[3]) for k, v in y.items()}
    outcome = run(model, values, deadline, threads, GAPS)
    proven = cheap if outcome.bound is None else max(cheap, float(weights.sum()) + outcome.bound)
    return Proof(_read(problem, x, range(problem.layers)) if outcome.found else None, proven)


def _products(model: pulp.LpProblem, problem: Problem, x: Cell, y: Cell) -> None:
    by_first: dict[tuple[int, int, int], list[pulp.LpVariable]] = {}
    by_second: dict[tuple[int, int, int], list[pulp.LpVariable]] = {}
    for (layer, e, f, g), variable in y.items():
        model += variable <= x[layer, e, g]
        model += variable <= x[layer + 1, f, g]
        by_first.setdefault((layer, e, g), []).append(variable)
        by_second.setdefault((layer + 1, f, g), []).append(variable)
    for rows in (by_first, by_second):
        for key, variables in rows.items():
            if len(variables) > problem.slots:
                model += pulp.lpSum(variables) <= problem.slots * x[key]


def _solve_dispatch_layer(problem: Problem, layer: int, start: NDArray[np.int64], deadline: Deadline, threads: int) -> Proof:
    members, prices = problem.members[layer], problem.prices[layer]
    trivial = dispatch_bound(members, prices, problem.slots)
    if _dispatch_size(members, problem.ranks) > MAX_VARIABLES or deadline.passed():
        return Proof(None, trivial)
    model = pulp.LpProblem("dispatch", pulp.LpMinimize)
    x = _placement_variables(model, problem, [layer])
    y = _pair_variables(model, problem, x, layer)
    d = _pattern_variables(model, problem, x, y, layer)
    model += pulp.lpSum(float(prices[k]) * v for k, v in d.items())
    if problem.interchangeable and (prices == prices[:, :1]).all():
        _interchangeable(model, problem, x, layer)
        start = _canonical(start[None])[0]
    values = {v.name: float(start[e] == g) for (_, e, g), v in x.items()}
    values |= {v.name: float(start[e] == g and start[f] == g) for (e, f, g), v in y.items()}
    hosts = {g: np.asarray(members[:, start == g].any(1)) for g in range(problem.ranks)}
    values |= {v.name: float(hosts[g][p]) for (p, g), v in d.items()}
    outcome = run(model, values, deadline, threads, GAPS)
    proven = trivial if outcome.bound is None else max(trivial, outcome.bound)
    return Proof(_read(problem, x, [layer]) if outcome.found else None, proven)


def _pair_variables(model: pulp.LpProblem, problem: Problem, x: Cell, layer: int) -> Cell:
    """y[e,f,g]: both on g, for pairs that some pattern holds; at most slots - 1 companions share an expert's rank."""
    together = problem.members[layer].T.astype(np.int64) @ problem.members[layer].astype(np.int64)
    y: Cell = {}
    companions: dict[tuple[int, int], list[pulp.LpVariable]] = {}
    for e, f in np.argwhere(np.triu(together, 1) > 0).tolist():
        for g in range(problem.ranks):
            y[e, f, g] = variable = model.add_variable(f"y_{e}_{f}_{g}", 0, 1)
            model += variable <= x[layer, e, g]
            model += variable <= x[layer, f, g]
            companions.setdefault((e, g), []).append(variable)
            companions.setdefault((f, g), []).append(variable)
    for (e, g), variables in companions.items():
        model += pulp.lpSum(variables) <= (problem.slots - 1) * x[layer, e, g]
    return y


def _pattern_variables(model: pulp.LpProblem, problem: Problem, x: Cell, y: Cell, layer: int) -> Cell:
    d: Cell = {}
    for p, row in enumerate(problem.members[layer]):
        used = np.flatnonzero(row).tolist()
        for g in range(problem.ranks):
            d[p, g] = variable = model.add_variable(f"d_{p}_{g}", 0, 1)
            if len(used) == 1:
                model += variable >= x[layer, used[0], g]
            for e, f in combinations(used, 2):
                model += variable >= x[layer, e, g] + x[layer, f, g] - y[e, f, g]
        model += pulp.lpSum(d[p, g] for g in range(problem.ranks)) >= math.ceil(len(used) / problem.slots)
    return d


def _placement_variables(model: pulp.LpProblem, problem: Problem, layers: Any) -> Cell:
    x: Cell = {}
    for layer in layers:
        for e in range(problem.experts):
            for g in range(problem.ranks):
                x[layer, e, g] = model.add_variable(f"x_{layer}_{e}_{g}", cat="Binary")
            model += pulp.lpSum(x[layer, e, g] for g in range(problem.ranks)) == 1
        for g in range(problem.ranks):
            model += pulp.lpSum(x[layer, e, g] for e in range(problem.experts)) <= problem.slots
            for limit in problem.limits:
                cap = float(limit.caps[layer, g])
                carried = pulp.lpSum(float(limit.weights[layer, e]) * x[layer, e, g] for e in range(problem.experts))
                if math.isfinite(cap):
                    model += carried <= cap * (1 + 1e-9)
    return x


def _interchangeable(model: pulp.LpProblem, problem: Problem, x: Cell, layer: int) -> None:
    """Ranks have no names here: the first expert lives on rank 0, the second on 0 or 1, and so on."""
    for e in range(min(problem.experts, problem.ranks)):
        for g in range(e + 1, problem.ranks):
            model += x[layer, e, g] == 0


def _canonical(assignment: Assignment) -> Assignment:
    """The same placement with ranks named in the order in which the first layer's experts use them, as above."""
    seen = list(dict.fromkeys(assignment[0].tolist()))
    seen += [g for g in range(int(assignment.max()) + 1) if g not in seen]
    name = np.empty(len(seen), dtype=np.int64)
    name[seen] = np.arange(len(seen))
    return np.asarray(name[assignment])


def _read(problem: Problem, x: Cell, layers: Any) -> Assignment | None:
    """The placement in the solver's variables, None if they hold no integer solution."""
    rows = []
    for layer in layers:
        values = [[x[layer, e, g].varValue or 0.0 for g in range(problem.ranks)] for e in range(problem.experts)]
        if any(max(row) < 0.99 for row in values):
            return None
        rows.append(np.array(values).argmax(1))
    return np.array(rows, dtype=np.int64)
