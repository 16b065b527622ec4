"""One solver per objective: search, then (or beside it, on another core) proof.

Each takes a `Task` and returns a `Solution`; `planner.plan` evaluates what comes back with the dispatcher's own rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coterie.placement import balance, bounds, chain, copies, exact, ilp, local
from coterie.placement.baselines import Assignment
from coterie.placement.capacity import open_slots
from coterie.placement.cost import destinations
from coterie.placement.deadline import Deadline
from coterie.placement.homes import Homes
from coterie.placement.plan import PlacementPlan, holders, slots_from_holders
from coterie.placement.problem import Limit, Problem, dispatch_problem, held_by, hops_problem
from coterie.placement.scenarios import Scenario, summarised
from coterie.placement.spread import Child, World
from coterie.placement.timing import LayerTime
from coterie.routing.affinity import Patterns
from coterie.routing.errors import CoterieError, InputError

if TYPE_CHECKING:
    from coterie.placement.planner import PlanRequest

Array = NDArray[np.float64]
SEARCH_SHARE, EXACT_SHARE = 0.45, 0.6  # of the time that is left; the rest is for the proof, if it has no core of its own
SEED_STRIDE = 1_000_003
PLAIN = 20  # descents of a placement without copies that one with copies is compared with
SMALL = 60  # anneals or bursts after which a problem that an integer program can take over is handed on

Progress = Callable[[float | None, float | None, int], None]  # value, bound (both as evaluated), iterations


@dataclass(frozen=True)
class Task:
    """What a solver is given.

    weights: of the scenarios in the mixture that is minimised, sum 1; limits: see `problem.Limit`; prove: also state a bound.
    """

    request: PlanRequest
    scenarios: tuple[Scenario, ...]
    weights: tuple[float, ...]
    slots: int
    limits: tuple[Limit, ...]
    deadline: Deadline
    world: World = field(default_factory=World)
    progress: Progress = lambda value, bound, iterations: None
    prove: bool = True

    @property
    def ranks(self) -> int:
        """Ranks over all nodes."""
        return self.request.topology.ranks

    @property
    def copied(self) -> bool:
        """Whether there are slots beyond the experts."""
        return bool(self.ranks * self.slots > self.scenarios[0].load.shape[1])

    @property
    def short_of_memory(self) -> bool:
        """Whether memory limits what ranks hold."""
        return any(limit.memory for limit in self.limits)

    @property
    def open_slots(self) -> NDArray[np.int64]:
        """The slots of every rank that memory lets be used, `[L, ranks]`."""
        layers, experts = self.scenarios[0].load.shape
        return open_slots(self.request.topology, layers, experts, self.slots)

    def evaluated(self, holds: NDArray[np.bool_]) -> float:
        """What `evaluate` prints for the objective, over all scenarios."""
        topology, first = self.request.topology, self.scenarios[0]
        layers = tuple(range(len(first.load))) if first.trace is None else first.trace.layer_ids
        if first.statistics is not None:
            layers = first.statistics.layer_ids
        slots = slots_from_holders(holds, self.slots)
        shape = PlacementPlan(slots, first.load.shape[1], layers, topology, strategy=self.request.strategy)
        return summarised(shape, self.scenarios, self.request.objective_name, self.request.robust)

    def transitions(self) -> list[Array]:
        """Of every scenario, `[L-1, E, E]`."""
        return [s.transitions for s in self.scenarios]

    def patterns(self, by_home: bool = False) -> list[tuple[Patterns, ...]]:
        """Of every scenario, by layer; `by_home`: also split by the homes of the traces."""
        return [s.patterns_by_home(self.ranks) if by_home else s.patterns for s in self.scenarios]


@dataclass(frozen=True)
class Solution:
    """holds: bool `[L, E, ranks]`; lower_bound: on the evaluated objective of the mixture, None if none is stated.

    homes: where they were planned.
    """

    holds: NDArray[np.bool_]
    lower_bound: float | None
    iterations: int = 0
    homes: Homes | None = None


Solver = Callable[[Task], Solution]


@dataclass
class _Spread:
    """A search in this process and others like it in children, and over MPI; the best of all is kept.

    Deterministic for a seed, the numbers of workers and processes, and the number of iterations.
    """

    task: Task
    function: str
    arguments: dict[str, Any]
    children: list[Child] = field(default_factory=list)

    def run(self, search: Callable[..., Any], deadline: Deadline, helpers: int, **own: Any) -> list[tuple[Any, int]]:
        """Every worker's (result, iterations), this process's first."""
        base = self.task.request.seed + SEED_STRIDE * self.task.world.rank * 64
        for number in range(helpers):
            arguments = {**self.arguments, "seed": base + SEED_STRIDE * (number + 1)}
            self.children.append(Child(self.function, arguments, deadline).start())
        mine = search(**self.arguments, seed=base, deadline=deadline, **own)
        found = [mine, *(answer for child in self.children if (answer := _answer(child)) is not None)]
        return [pair for pairs in self.task.world.gather(found) for pair in pairs]


def _answer(child: Child) -> Any:
    """What a worker found; a worker that is lost costs its share of the search only, and is warned about."""
    try:
        return child.result()
    except CoterieError as error:
        warnings.warn(f"{error}; the other processes' best is kept", RuntimeWarning, stacklevel=2)
        return None


def hops(task: Task) -> Solution:
    """ExFlow's objective: dynamic programming where it fits, else annealed chains, an ILP where it fits, and a certificate."""
    problem = hops_problem(task.transitions(), task.weights, task.ranks, task.slots, task.limits)
    if exact.fits(problem):
        solved = task.world.gather(exact.solve(problem, task.deadline.share(EXACT_SHARE)))
        if (optimum := next((s for s in solved if s is not None), None)) is not None:
            return Solution(copies.held(optimum, task.ranks), problem.cost(optimum) * problem.scale, 1)
    proof = _Proof(task, problem)
    searching = task.deadline if proof.child else task.deadline.share(SEARCH_SHARE)
    arguments = {"problem": problem, "iterations": _iterations(task, problem)}
    own = {"target": proof.cheap, "report": lambda cost, made: task.progress(cost * problem.scale, proof.bound, made)}
    spread = _Spread(task, "coterie.placement.chain:search", arguments)
    found = spread.run(chain.search, searching, max(0, task.request.workers - 1 - (proof.child is not None)), **own)
    best, made = min((a for a, _ in found), key=_rank(problem)), sum(n for _, n in found)
    if len(found) > 1 and problem.interchangeable:
        best = min(best, chain.recombined(problem, [a for a, _ in found]), key=_rank(problem))
    _check(problem, best, task)
    best, bound = proof.finish(best)
    holds = copies.held(best, task.ranks)
    if task.copied:
        holds = within_caps(task, holds, copies.for_hops(np.asarray(problem.transitions), holds, task.open_slots))
        bound = bounds.hops_with_copies(problem)
    return Solution(holds, bound * problem.scale, made)


def _iterations(task: Task, problem: Problem) -> int | None:
    if task.request.iterations is None and ilp.fits(problem):
        return SMALL
    return task.request.iterations


def _rank(problem: Problem) -> Callable[[Assignment], tuple[bool, float]]:
    return lambda assignment: (not problem.feasible(assignment), problem.cost(assignment))


def _check(problem: Problem, found: Assignment, task: Task) -> None:
    if not problem.feasible(found):
        given = task.request.max_load
        what = "the experts' memory" if given is None else f"--max-load {given:g}"
        raise InputError(f"{what}: no placement within it was found; give more slots, more memory or a larger --max-load")


class _Proof:
    """The certificate of a `hops` problem: in a child while the search goes on, if there is a worker for it, else after it."""

    def __init__(self, task: Task, problem: Problem) -> None:
        self.task, self.problem = task, problem
        self.cheap = 0.0 if task.copied else bounds.lower_bound(problem, task.deadline.share(0.2))
        self.bound: float | None = None
        self.child: Child | None = None
        self.wanted = task.prove and not task.copied and problem.layers > 1 and task.world.rank == 0
        if self.wanted and task.request.workers > 1:
            self.child = Child("coterie.placement.bounds:chain_bound", {"problem": problem}, task.deadline, self._hear).start()

    def _hear(self, bound: float) -> None:
        self.bound = bound * self.problem.scale

    def finish(self, best: Assignment) -> tuple[Assignment, float]:
        """A placement at least as good, and the bound, in counts."""
        problem, task, bound = self.problem, self.task, self.cheap
        program = self.wanted and ilp.fits(problem)
        if self.child is not None:
            if problem.cost(best) <= bound + 1e-9 or program:  # a small problem's bound has settled by now
                self.child.stop()
            bound = max(bound, self.child.result())
        elif problem.cost(best) > bound + 1e-9 and self.wanted:
            hear = lambda b: task.progress(problem.cost(best) * problem.scale, b * problem.scale, 0)  # noqa: E731
            bound = max(bound, bounds.chain_bound(problem, task.deadline.share(0.4 if program else 1.0), hear))
        if program and problem.cost(best) > _whole(problem, bound) + 1e-9:
            best, proven = _by_program(problem, best, task)
            bound = max(bound, proven)
        bound = max(task.world.gather(bound))
        best = min(task.world.gather(best), key=_rank(problem))
        return best, min(_whole(problem, bound), problem.cost(best))


def _by_program(problem: Problem, found: Assignment, task: Task) -> tuple[Assignment, float]:
    """What the integer program makes of `found` in the time that is left, with its bound."""
    proof = ilp.solve(problem, found, task.deadline, task.request.workers)
    proven = proof.assignment
    if proven is not None and problem.feasible(proven) and problem.cost(proven) < problem.cost(found):
        found = proven
    return found, proof.lower_bound


def _whole(problem: Problem, bound: float) -> float:
    """Costs that count tokens make whole bounds; with a margin for the solver's tolerance."""
    return max(0.0, float(np.ceil(bound - 1e-5))) if problem.integral else bound


def dispatch(task: Task) -> Solution:
    """Distinct ranks: tabu search on the true patterns, homes equally likely (or, with `exact`, those of the traces)."""
    known = _dispatch(task, True) if _homes_matter(task) else None
    problem = known if task.request.exact and known is not None else _dispatch(task, False)
    small = ilp.fits(problem) and not task.copied and task.prove
    best, made = _local(task, problem, task.deadline.share(SEARCH_SHARE if small else 0.8 if task.prove else 1.0))
    if small and known is not None:
        best, bound = _by_program(problem, best, replaced(task, task.deadline.share(1 if problem is known else 0.5)))
        if problem is not known:
            best = at_home(known, best)
            proof = ilp.solve(known, best, task.deadline.share(0.8), task.request.workers)  # of the evaluated number
            bound = max(proof.lower_bound, bounds.patterns_bound(known, best, task.deadline))
        return Solution(copies.held(best, task.ranks), _whole(known, bound) * known.scale, made)
    target = problem if known is None else known
    if task.copied or known is None:  # what a copy saves, or a home that is not the expected one, only this bound knows of
        bound = bounds.rows_with_copies(target)
    else:
        bound = bounds.patterns_bound(target, best, task.deadline) if task.prove else bounds.lower_bound(target)
    if known is not None:
        best = at_home(known, best)
    holds = copies.held(best, task.ranks)
    if task.copied:
        allowed = _allowed_share(task)
        rows = lambda layer, sent, pairs: _rows_within(sent, pairs, float(allowed[layer]))  # noqa: E731
        holds = copies.for_rows(task.patterns(), task.weights, holds, task.open_slots, task.request.topology, rows)
    return Solution(holds, _whole(target, bound) * target.scale, made)


def _allowed_share(task: Task) -> Array:
    """The largest share of a layer's load that one rank may carry, `[L]`: the tightest load cap; memory is `open_slots`."""
    caps = [limit for limit in task.limits if not limit.memory]
    shares = [limit.caps.max(1) / np.maximum(limit.weights.sum(1), 1e-300) for limit in caps]
    shares.append(np.full(len(task.scenarios[0].load), 1.0))
    return np.asarray(np.min(shares, axis=0))


def within_caps(task: Task, plain: NDArray[np.bool_], filled: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`filled`, but `plain` in every layer in which the copies, as the dispatcher uses them, break a load cap."""
    kept = filled.copy()
    for layer, holds in enumerate(filled):
        table = destinations(holds, task.request.topology)  # [home, E]
        for limit in task.limits:
            weights = np.broadcast_to(limit.weights[layer] / task.ranks, table.shape)
            held = np.bincount(table.ravel(), weights.ravel(), minlength=task.ranks)
            if not limit.memory and (held > limit.caps[layer] * (1 + 1e-9)).any():
                kept[layer] = plain[layer]
    return kept


def _rows_within(sent: Array, pairs: Array, allowed: float) -> float:
    """Rows per token of a layer; infinite if a rank carries more than it may."""
    return float(sent.sum()) if pairs.max() <= allowed * pairs.sum() * (1 + 1e-9) else float("inf")


def _homes_matter(task: Task) -> bool:
    """Whether patterns by home fit in memory: `[patterns, ranks]` in float64, for every layer."""
    size = sum(len(p.weight) * task.ranks * 8 for patterns in task.patterns() for p in patterns)
    return size < 2e9


def replaced(task: Task, deadline: Deadline, prove: bool = True) -> Task:
    """The same with another deadline."""
    return replace(task, deadline=deadline, prove=task.prove and prove)


def _dispatch(task: Task, known_homes: bool) -> Problem:
    return dispatch_problem(task.patterns(known_homes), task.weights, task.ranks, task.slots, task.limits, known_homes)


def _local(
    task: Task, problem: Problem, deadline: Deadline, score: Any = None, begin: Assignment | None = None
) -> tuple[Assignment, int]:
    arguments: dict[str, Any] = {"problem": problem, "iterations": _iterations(task, problem), "begin": begin}
    report = lambda cost, made: task.progress(None if score else cost * problem.scale, None, made)  # noqa: E731
    if score is not None:
        arguments["score"] = score
    spread = _Spread(task, "coterie.placement.local:search", arguments)
    found = spread.run(local.search, deadline, max(0, task.request.workers - 1), report=report)
    value = _layer_costs if score is None else lambda p, a: score.of(p, a)
    costs = np.array([value(problem, a) for a, _ in found])  # [worker, layer]
    best = np.stack([found[w][0][layer] for layer, w in enumerate(costs.argmin(0))])
    _check(problem, best, task)
    return best, sum(n for _, n in found)


def _layer_costs(problem: Problem, assignment: Assignment) -> list[float]:
    """Of every layer; infinite beyond a limit."""
    return [problem.layer_cost(n, row) if problem.keeps(n, row) else np.inf for n, row in enumerate(assignment)]


def at_home(problem: Problem, assignment: Assignment) -> Assignment:
    """Names each layer's groups so that as many rows as can be stay at home; their number does not change."""
    if not problem.interchangeable:
        return assignment
    named = assignment.copy()
    for layer in range(problem.layers):
        hosts = problem.held(layer, assignment[layer]) > 0
        cost: Array = hosts.T.astype(np.float64) @ problem.prices[layer]  # [group, rank]
        _, order = linear_sum_assignment(cost)
        named[layer] = order[assignment[layer]]
    return named


@dataclass(frozen=True)
class TimeScore:
    """`local.Score` of the time objective for a problem whose prices are rows: picklable, for the workers."""

    time: LayerTime
    per_token: float

    def __call__(self, layer: int, rows: Array, load: Array) -> Array:
        """Seconds of the layer `[n]`."""
        return self.time.score(layer, rows * self.per_token, load)

    def of(self, problem: Problem, assignment: Assignment) -> list[float]:
        """Seconds of every layer of a placement; infinite beyond a limit."""
        seconds = []
        for layer, row in enumerate(assignment):
            rows = (problem.prices[layer] * (problem.held(layer, row) > 0)).sum(0)
            load = held_by(row, self.time.weight[layer], problem.ranks)
            seconds.append(float(self(layer, rows[None], load[None])[0]) if problem.keeps(layer, row) else np.inf)
        return seconds


def timed(task: Task, base: Problem) -> tuple[Problem, TimeScore]:
    """A dispatch problem as the local search minimises time on it: its first limit holds the experts' work; and the score."""
    model = LayerTime(task.request.topology, task.scenarios, task.weights)
    weighed = Limit(model.weight, np.full((base.layers, task.ranks), np.inf))
    return replace(base, limits=(weighed, *task.limits), integral=False), TimeScore(model, base.scale * base.layers)


def time(task: Task) -> Solution:
    """The minimax of links and experts: dispatch first, then tabu search on the predicted time itself."""
    base = _dispatch(task, False)
    problem, score = timed(task, base)
    begin, first = _local(task, base, task.deadline.share(0.4))
    best, second = _local(task, problem, task.deadline.share(0.9), score, begin)
    holds = copies.held(best, task.ranks)
    if task.copied:
        holds = copies.for_rows(
            task.patterns(), task.weights, holds, task.open_slots, task.request.topology, score.time.of_copies
        )
        holds = within_caps(task, copies.held(best, task.ranks), holds)
    return Solution(holds, bounds.time_bound(task.request.topology, task.scenarios, task.slots), first + second)


def load(task: Task) -> Solution:
    """The evenest load, with copies, over all scenarios; for the mean, also over parts of each trace.

    Among placements that are even on the whole, one that is even on its parts is more even on other text.
    """
    loads = np.stack([s.load for s in task.scenarios])
    worst = task.request.robust == "worst"
    parts = [] if worst or task.request.exact else [part for s in task.scenarios for part in s.parts()]
    arguments = {
        "loads": np.stack([*loads, *parts]),
        "ranks": task.ranks,
        "slots": task.slots,
        "iterations": task.request.iterations,
        "worst": worst,
    }
    if task.short_of_memory:
        arguments["room"] = task.open_slots
    spread = _Spread(task, "coterie.placement.balance:search", arguments)
    report = lambda value, made: task.progress(value, None, made)  # noqa: E731
    found = spread.run(balance.search, task.deadline, max(0, task.request.workers - 1), report=report)
    candidates = [holders(slots, loads.shape[2], task.ranks) for slots, _ in found]
    if (
        task.copied and "room" not in arguments and task.scenarios[0].trace is not None
    ):  # the dispatcher's copies do not take quite equal shares
        plain = {**arguments, "slots": -(-loads.shape[2] // task.ranks), "iterations": PLAIN}
        slots, _ = balance.search(**plain, seed=task.request.seed, deadline=Deadline(0.1 * task.request.time_limit))
        candidates.append(holders(slots, loads.shape[2], task.ranks))
    holds = min(candidates, key=task.evaluated)
    _check_even(task, holds)
    bound = bounds.load_bound(loads, task.ranks, task.slots, worst)
    return Solution(holds, bound, sum(n for _, n in found))


def _check_even(task: Task, holds: NDArray[np.bool_]) -> None:
    """A load cap is what this objective minimises: it is met, or cannot be as far as the search knows."""
    most = task.request.max_load
    share = holds / np.maximum(holds.sum(2, keepdims=True), 1)
    for s in task.scenarios:
        held = np.einsum("le,ler->lr", s.load, share)
        worst = float((held.max(1) / np.maximum(held.mean(1), 1e-300)).max())
        if most is not None and worst > most * (1 + 1e-9):
            raise InputError(
                f"--max-load: found {most:g}, but the evenest layer found in {s.name} has {worst:.4f}; give that or more"
            )


def coherent(task: Task) -> Solution:
    """Rows at any top-k when tokens stay with their experts: dispatch with the anchors of the moment as homes, in turns."""
    from coterie.placement.anchors import alternate

    if all(s.trace is not None and s.trace.top_k == 1 and (s.trace.expert_ids >= 0).all() for s in task.scenarios):
        return hops(task)  # the same number then
    return alternate(task)


SOLVERS: dict[str, Solver] = {"hops": hops, "coherent": coherent, "dispatch": dispatch, "load": load, "time": time}
