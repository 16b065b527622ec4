"""From a trace to a plan: builds the problem, runs a solver, evaluates the result with the dispatcher's own rules.

The seam for further planners is `Solver`: a function from a `Problem` to a placement and a bound, in `SOLVERS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from coterie.placement import exact, ilp
from coterie.placement.baselines import BASELINES, Assignment
from coterie.placement.cost import evaluate, evaluate_load, homes_of
from coterie.placement.plan import STRATEGIES, Objective, PlacementPlan, slots_from_assignment
from coterie.placement.problem import Problem, dispatch_problem, hops_problem, load_caps, one_hot
from coterie.placement.search import search
from coterie.placement.topology import Topology
from coterie.routing.affinity import expert_load, measure
from coterie.routing.errors import InputError
from coterie.routing.files import sha256
from coterie.routing.trace import LoadStatistics, RoutingTrace

PLANNED_OBJECTIVES = ("hops", "dispatch")  # what a solver below can minimise
OBJECTIVE_OF = {"coherent": "hops"}  # by strategy; every other strategy pays for distinct ranks
SEARCH_ROUNDS = 4000
SEARCH_SHARE, EXACT_SHARE = 0.3, 0.6  # of the time that is left; what they leave is for the integer programs


@dataclass(frozen=True)
class PlanRequest:
    """What to plan for. Set by the command line or the caller.

    objective: None takes the strategy's own. max_load: busiest over mean, None as in `problem.load_caps`.
    slots_per_rank: None takes ceil(E / ranks). time_limit: seconds for search and proof together.
    exact: minimise the very number that `evaluate` prints for these traces, homes included (hops know no homes).
    """

    topology: Topology
    strategy: str = "all_to_all"
    objective: str | None = None
    method: str = "auto"
    max_load: float | None = None
    slots_per_rank: int | None = None
    time_limit: float = 60.0
    exact: bool = False
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        checks: list[tuple[str, object, bool, str]] = [
            ("--strategy", self.strategy, self.strategy in STRATEGIES, ", ".join(STRATEGIES)),
            ("--method", self.method, self.method in METHODS, ", ".join(METHODS)),
            (
                "--objective",
                self.objective,
                self.objective in (None, *PLANNED_OBJECTIVES),
                ", ".join(PLANNED_OBJECTIVES),
            ),
            ("--max-load", self.max_load, self.max_load is None or 1 <= self.max_load < float("inf"), "at least 1"),
            ("--time-limit", self.time_limit, 0 < self.time_limit < float("inf"), "more than 0 seconds"),
            ("--seed", self.seed, self.seed >= 0, "0 or more"),
            ("--exact", self.exact, not self.exact or self.method == "auto", "--method auto beside it"),
            ("--max-load", self.max_load, self.max_load is None or self.method == "auto", "--method auto beside it"),
        ]
        for name, found, valid, allowed in checks:
            if not valid:
                raise InputError(f"{name}: found {found!r}, expected {allowed}")

    @property
    def objective_name(self) -> str:
        """The objective asked for, or the strategy's own."""
        return self.objective or OBJECTIVE_OF.get(self.strategy, "dispatch")


@dataclass(frozen=True)
class Solution:
    """assignment: int64 `[L, E]`; lower_bound: on the evaluated objective, None if the solver states none."""

    assignment: Assignment
    lower_bound: float | None


Solver = Callable[[RoutingTrace, PlanRequest, int], Solution]


def plan(trace: RoutingTrace, request: PlanRequest, inputs: tuple[Path, ...] = ()) -> PlacementPlan:
    """Place the experts that `trace` used. inputs: the files it came from, recorded with their digests.

    Raises InputError for more ranks than experts, too few slots or a load cap that cannot be met.
    """
    started = time.perf_counter()
    slots = _slots(trace.num_experts, request)
    solution = SOLVERS[request.method](trace, request, slots)
    made = PlacementPlan(
        physical_to_logical=slots_from_assignment(solution.assignment, request.topology.ranks, slots),
        num_experts=trace.num_experts,
        layer_ids=trace.layer_ids,
        topology=request.topology,
        model=trace.model,
        strategy=request.strategy,
        seed=request.seed,
        inputs=tuple({"file": str(path), "sha256": sha256(path)} for path in inputs),
    )
    value = getattr(evaluate(made, trace), request.objective_name)
    bound = solution.lower_bound
    if bound is not None:
        bound = value if abs(value - bound) <= 1e-9 * max(value, 1e-9) else min(bound, value)
    objective = Objective(request.objective_name, value, bound)
    return replace(made, objective=objective, seconds=time.perf_counter() - started)


def baseline_plan(name: str, routing: RoutingTrace | LoadStatistics, topology: Topology, strategy: str) -> PlacementPlan:
    """The plan called `name` in `BASELINES`, packed with the load of `routing` itself."""
    load = expert_load(routing) if isinstance(routing, RoutingTrace) else routing.expert_load.sum(0).astype(np.float64)
    slots = -(-routing.num_experts // topology.ranks)
    return PlacementPlan(
        physical_to_logical=slots_from_assignment(BASELINES[name](load, topology.ranks), topology.ranks, slots),
        num_experts=routing.num_experts,
        layer_ids=routing.layer_ids,
        topology=topology,
        model=routing.model,
        strategy=strategy,
    )


def compare(
    plan: PlacementPlan, routing: RoutingTrace | LoadStatistics, scenario: int = 0
) -> dict[str, dict[str, float | None]]:
    """`plan` beside the baselines on one recording: `{name: fields of CostReport.to_json}`."""
    plans = {"plan": plan}
    plans |= {name: baseline_plan(name, routing, plan.topology, plan.strategy) for name in BASELINES}
    if isinstance(routing, RoutingTrace):
        return {name: evaluate(p, routing).to_json() for name, p in plans.items()}
    return {name: evaluate_load(p, routing, scenario).to_json() for name, p in plans.items()}


def _slots(experts: int, request: PlanRequest) -> int:
    ranks = request.topology.ranks
    if ranks > experts:
        raise InputError(
            f"--topology: found {ranks} ranks, expected at most {experts}: the model has that many experts a layer"
        )
    slots = -(-experts // ranks) if request.slots_per_rank is None else request.slots_per_rank
    if not -(-experts // ranks) <= slots <= experts:
        raise InputError(f"--slots-per-rank: found {slots}, expected {-(-experts // ranks)} to {experts}")
    return slots


def _by_baseline(name: str) -> Solver:
    def solve(trace: RoutingTrace, request: PlanRequest, slots: int) -> Solution:
        return Solution(BASELINES[name](expert_load(trace), request.topology.ranks), None)

    return solve


def _auto(trace: RoutingTrace, request: PlanRequest, slots: int) -> Solution:
    deadline = time.monotonic() + request.time_limit
    ranks = request.topology.ranks
    affinity = measure(trace, homes_of(trace, ranks), ranks)
    caps = load_caps(affinity.load, ranks, slots, request.max_load)
    if request.objective_name == "hops":
        return _hops(hops_problem(affinity, ranks, slots, caps), request, deadline)
    known = dispatch_problem(affinity, ranks, slots, caps, known_homes=True)
    if request.exact:
        return _improved(known, _at_home(known, _search(known, request, deadline)), request, deadline)
    unknown = dispatch_problem(affinity, ranks, slots, caps, known_homes=False)
    halfway = (time.monotonic() + deadline) / 2
    made = _improved(unknown, _search(unknown, request, halfway), request, halfway).assignment
    found = _at_home(known, made)
    proof = ilp.solve(known, found, deadline, request.threads)  # of the evaluated number; its placement knows the homes
    return Solution(found, _whole(proof.lower_bound) * known.scale)


def _hops(problem: Problem, request: PlanRequest, deadline: float) -> Solution:
    if exact.fits(problem):
        early = time.monotonic() + EXACT_SHARE * (deadline - time.monotonic())
        if (best := exact.solve(problem, early)) is not None:
            return Solution(best, problem.cost(best) * problem.scale)
    return _improved(problem, _search(problem, request, deadline), request, deadline)


def _search(problem: Problem, request: PlanRequest, deadline: float) -> Assignment:
    share = SEARCH_SHARE if ilp.fits(problem) else 1.0
    early = time.monotonic() + share * max(0.0, deadline - time.monotonic())
    found = search(problem, request.seed, SEARCH_ROUNDS if share < 1 else None, early)
    if not problem.feasible(found):
        raise InputError(f"--max-load: found {request.max_load}, but no placement that keeps to it was found; give more")
    return found


def _improved(problem: Problem, found: Assignment, request: PlanRequest, deadline: float) -> Solution:
    """What the integer program makes of `found` until `deadline`, with its bound."""
    proof = ilp.solve(problem, found, deadline, request.threads)
    proven = proof.assignment
    if proven is not None and problem.feasible(proven) and problem.cost(proven) < problem.cost(found):
        found = proven
    return Solution(found, min(_whole(proof.lower_bound), problem.cost(found)) * problem.scale)


def _whole(bound: float) -> float:
    """Costs count tokens, so a bound may be rounded up; with a margin for the solver's tolerance."""
    return float(np.ceil(bound - 1e-5))


def _at_home(problem: Problem, assignment: Assignment) -> Assignment:
    """Names each layer's groups so that as many rows as can be stay at home; their number does not change."""
    named = assignment.copy()
    for layer in range(problem.layers):
        hosts = problem.members[layer].astype(np.int64) @ one_hot(assignment[layer], problem.ranks) > 0
        cost: NDArray[np.float64] = hosts.T.astype(np.float64) @ problem.prices[layer]  # [group, rank]
        _, order = linear_sum_assignment(cost)
        named[layer] = order[assignment[layer]]
    return named


SOLVERS: dict[str, Solver] = {"auto": _auto} | {name: _by_baseline(name) for name in BASELINES}
METHODS = tuple(SOLVERS)
