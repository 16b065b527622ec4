"""From recordings to a plan: gathers the scenarios, runs a solver, evaluates the result with the dispatcher's own rules.

The seam for further planners is `task.Solver`: a function from a `Task` to a `Solution`, in `solve.SOLVERS` by objective; for
other methods than our own, a `Method` in `METHODS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.placement import balance, chain, copies, homing
from coterie.placement.baselines import BASELINES, Assignment
from coterie.placement.capacity import memory_limit, open_slots
from coterie.placement.cost import evaluate, evaluate_load
from coterie.placement.deadline import Deadline, interruptible
from coterie.placement.exflow import exflow
from coterie.placement.limits import load_limits, mean_excess
from coterie.placement.moetuner import moetuner
from coterie.placement.nodes import grouped
from coterie.placement.plan import (
    OBJECTIVES,
    STRATEGIES,
    Objective,
    PlacementPlan,
    holders,
    slots_from_assignment,
    slots_from_holders,
)
from coterie.placement.problem import Limit
from coterie.placement.replan import check, from_previous
from coterie.placement.scenarios import ROBUST, Scenario, gathered, summarised
from coterie.placement.solve import SOLVERS
from coterie.placement.spread import World, world
from coterie.placement.task import Progress, Solution, Solver, Task
from coterie.placement.topology import Topology
from coterie.routing.affinity import expert_load
from coterie.routing.errors import InputError
from coterie.routing.files import sha256
from coterie.routing.trace import LoadStatistics, RoutingTrace

# By strategy; every other strategy pays for distinct ranks. Who sends every row everywhere can only be more even.
OBJECTIVE_OF = {"coherent": "coherent", "all_gather": "load", "replicated": "load"}
WORST_ROUNDS = 3  # mixtures tried when the worst scenario is minimised
TILT = 4.0
EXACT = ("hops", "dispatch", "load")  # objectives whose evaluated number can be searched for itself
NEARLY_EVEN = 1.15  # busiest over mean of contiguous placement, up to which a plan has to be even as well
FINISHING = 0.97  # of the time limit is for search and proof, the rest for evaluating what they found


@dataclass(frozen=True)
class PlanRequest:
    """What to plan for. Set by the command line or the caller.

    objective: None takes the strategy's own. max_load: busiest over mean; None: as in `limits.load_caps` where the
    strategy chose dispatch, for time, and where contiguous placement is even (docs/planning.md, Load cap); else no cap.
    slots_per_rank: None takes ceil(E / ranks); what is beyond the experts is for copies.
    robust: of several scenarios, minimise the worst or the mean. time_limit: seconds for search and proof together.
    iterations: of the search, None for as many as fit. exact: minimise the very number that `evaluate` prints for these
    traces, homes included (hops know no homes). workers: processes that search and prove.
    previous and max_moves: the best plan within so many moved experts of an old one. homes: plan home ranks, too.
    """

    topology: Topology
    strategy: str = "all_to_all"
    objective: str | None = None
    method: str = "auto"
    max_load: float | None = None
    slots_per_rank: int | None = None
    robust: str = "mean"
    time_limit: float = 60.0
    iterations: int | None = None
    exact: bool = False
    seed: int = 0
    workers: int = 1
    previous: PlacementPlan | None = None
    max_moves: int | None = None
    homes: bool = False

    def __post_init__(self) -> None:
        own = self.method == "auto"
        checks: list[tuple[str, object, bool, str]] = [
            ("--strategy", self.strategy, self.strategy in STRATEGIES, ", ".join(STRATEGIES)),
            ("--method", self.method, self.method in METHODS, ", ".join(METHODS)),
            ("--objective", self.objective, self.objective in (None, *OBJECTIVES), ", ".join(OBJECTIVES)),
            ("--robust", self.robust, self.robust in ROBUST, ", ".join(ROBUST)),
            ("--max-load", self.max_load, self.max_load is None or 1 <= self.max_load < float("inf"), "at least 1"),
            ("--time-limit", self.time_limit, 0 < self.time_limit < float("inf"), "more than 0 seconds"),
            ("--iterations", self.iterations, self.iterations is None or self.iterations >= 0, "0 or more"),
            ("--seed", self.seed, 0 <= self.seed < 1 << 63, "0 or more, below 2^63"),
            ("--workers", self.workers, self.workers >= 1, "1 or more"),
            ("--exact", self.exact, not self.exact or own, "--method auto beside it"),
            ("--exact", self.exact, not self.exact or self.objective_name in EXACT, f"--objective {' or '.join(EXACT)}"),
            ("--homes", self.homes, not self.homes or own, "--method auto beside it"),
            ("--homes", self.homes, not (self.homes and self.exact), "no --exact beside it, which takes homes as they are"),
            ("--max-load", self.max_load, self.max_load is None or own, "--method auto beside it"),
            ("--max-moves", self.max_moves, self.max_moves is None or self.max_moves >= 0, "0 or more"),
            ("--max-moves", self.max_moves, (self.max_moves is None) == (self.previous is None), "--from and it together"),
            ("--from", "a plan", self.previous is None or own, "--method auto beside it"),
        ]
        for name, found, valid, allowed in checks:
            if not valid:
                raise InputError(f"{name}: found {found!r}, expected {allowed}")

    @property
    def objective_name(self) -> str:
        """The objective asked for, or the strategy's own."""
        return self.objective or OBJECTIVE_OF.get(self.strategy, "dispatch")


Method = Callable[[NDArray[np.float64], Callable[[], NDArray[np.float64]], PlanRequest, Deadline], Assignment]
"""(load `[L, E]`, transitions `[L-1, E, E]` when called, request, deadline) -> the rank of every expert `[L, E]`."""


def _baseline(name: str) -> Method:
    return lambda load, transitions, request, deadline: BASELINES[name](load, request.topology.ranks)


def _exflow(load, transitions, request, deadline):  # type: ignore[no-untyped-def]
    t = request.topology
    return exflow(transitions(), t.nodes, t.ranks_per_node, deadline, request.workers)


def _moetuner(load, transitions, request, deadline):  # type: ignore[no-untyped-def]
    t = request.topology
    return moetuner(load, transitions(), t.nodes, t.ranks_per_node, deadline, request.workers)


PEERS: dict[str, Method] = {name: _baseline(name) for name in BASELINES} | {"exflow": _exflow, "moetuner": _moetuner}
METHODS = ("auto", *PEERS)

Routings = RoutingTrace | LoadStatistics | Sequence[RoutingTrace | LoadStatistics]


def plan(
    routing: Routings, request: PlanRequest, inputs: Sequence[Path] = (), progress: Progress | None = None, prove: bool = True,
    keep_on_interrupt: bool = True,
) -> PlacementPlan:  # fmt: skip
    """Place the experts that the recordings used. inputs: the files they came from, recorded with their digests.

    Several recordings are scenarios. prove: also state a lower bound.
    progress: called with value, bound (either may be None) and iterations while it searches.
    Ctrl-C ends the search; what it has found by then is returned, unless `keep_on_interrupt` is off.
    Under mpirun every process searches, and all return
    the same plan. Raises InputError for what cannot be planned: too few slots, memory or load cap too small, an
    objective that needs single tokens where only loads are known, ranks of another shape than the old plan's.
    """
    started = time.perf_counter()
    routings = [routing] if isinstance(routing, RoutingTrace | LoadStatistics) else list(routing)
    scenarios = gathered(routings, [str(path) for path in inputs])
    if request.previous is not None:
        check(request.previous, scenarios, request.topology.ranks, request.slots_per_rank)
    layers, experts = scenarios[0].load.shape
    slots = _slots(layers, experts, request)
    _check_known(scenarios, request)
    deadline = Deadline(FINISHING * request.time_limit)
    shown = progress or (lambda value, bound, iterations: None)
    with interruptible(deadline) if keep_on_interrupt else nullcontext():
        if request.method == "auto":
            solution = _auto(scenarios, request, slots, deadline, shown, prove)
        else:
            solution = _peer(scenarios, request, slots, deadline)
    made = PlacementPlan(
        physical_to_logical=slots_from_holders(grouped(solution.holds, scenarios, request), slots),
        num_experts=scenarios[0].load.shape[1],
        layer_ids=routings[0].layer_ids,
        topology=request.topology,
        model=next((r.model for r in routings if r.model), ""),
        strategy=request.strategy,
        seed=request.seed,
        iterations=solution.iterations,
        workers=request.workers,
        inputs=tuple({"file": str(path), "sha256": sha256(path)} for path in inputs),
        homes=solution.homes,
    )
    return replace(_valued(made, solution.lower_bound, scenarios, request), seconds=time.perf_counter() - started)


plan_whole = partial(plan, keep_on_interrupt=False)
"""As `plan`, for callers that half a search is of no use to: ctrl-C interrupts them as always."""


def _valued(made: PlacementPlan, bound: float | None, scenarios: Sequence[Scenario], request: PlanRequest) -> PlacementPlan:
    value = summarised(made, scenarios, request.objective_name, request.robust)
    if bound is not None:
        if bound > value * (1 + 1e-6) + 1e-12:
            raise AssertionError(f"a lower bound of {bound} on {request.objective_name} {value}")
        bound = value if value - bound <= 1e-9 * max(value, 1e-9) else bound
    return replace(made, objective=Objective(request.objective_name, value, bound))


def _auto(
    scenarios: tuple[Scenario, ...],
    request: PlanRequest,
    slots: int,
    deadline: Deadline,
    progress: Progress,
    prove: bool,
) -> Solution:
    here = world()
    even = tuple(1 / len(scenarios) for _ in scenarios)
    task = Task(request, scenarios, even, slots, _limits(scenarios, request, slots), deadline, here, progress, prove)
    if request.homes:
        return _agreed(homing.alternate(task, _solved(replace(task, deadline=deadline.share(0.5), prove=False))), here)
    return _solved(task)


def _solved(task: Task) -> Solution:
    request = task.request
    if request.objective_name == "load" or request.robust == "mean" or len(task.scenarios) == 1:
        return _agreed(_solver(request)(task), task.world)
    return _worst(task)


def _solver(request: PlanRequest) -> Solver:
    return SOLVERS[request.objective_name] if request.previous is None else from_previous


def _agreed(solution: Solution, here: World) -> Solution:
    """The first process's solution in all of them: they have exchanged their best already."""
    first: Solution = here.gather(solution)[0]
    return first


def _worst(task: Task) -> Solution:
    """Minimise the worst scenario: mixtures that weigh it up, each planned for the mean; any mixture's bound is a bound."""
    best, least, bound, made = None, np.inf, 0.0, 0
    weights = np.array(task.weights)
    for turn in range(WORST_ROUNDS):
        share = task.deadline.share(1 / (WORST_ROUNDS - turn))
        found = _agreed(_solver(task.request)(replace(task, weights=tuple(weights), deadline=share)), task.world)
        values = np.array([replace(task, scenarios=(s,)).minimised(found.holds) for s in task.scenarios])
        made += found.iterations
        bound = max(bound, found.lower_bound or 0.0)
        if values.max() < least:
            best, least = found, float(values.max())
        weights = weights * np.exp(TILT * (values / values.max() - 1)) if values.max() > 0 else weights
        weights /= weights.sum()
    assert best is not None
    return Solution(best.holds, None if best.lower_bound is None else bound, made)  # None: it is beyond a default load cap


def _peer(scenarios: tuple[Scenario, ...], request: PlanRequest, slots: int, deadline: Deadline) -> Solution:
    """Another's method, on the mean over scenarios, each divided by its size."""
    load = _mixed_load(scenarios)

    def transitions() -> NDArray[np.float64]:
        _require_tokens(scenarios, f"--method {request.method}")
        return np.asarray(sum(s.transitions / max(s.transitions.sum(), 1) for s in scenarios))

    experts, ranks = scenarios[0].load.shape[1], request.topology.ranks
    if request.method == "packed" and ranks * slots > experts and request.slots_per_rank is not None:
        greedy, _ = balance.search(load[None], ranks, slots, request.seed, 0, deadline, worst=False)
        holds = holders(greedy, experts, ranks)  # replication and packing without any search: EPLB's
    else:
        holds = copies.held(PEERS[request.method](load, transitions, request, deadline), ranks)
    _check_memory(holds, request, slots)
    return Solution(holds, None)


def _check_memory(holds: NDArray[np.bool_], request: PlanRequest, slots: int) -> None:
    """The methods of others know no memory: what they place must fit all the same."""
    limit = memory_limit(request.topology, len(holds), holds.shape[1], slots)
    if limit is None:
        return
    held = np.einsum("le,ler->r", limit.weights, holds.astype(np.float64))
    memory = np.broadcast_to(np.asarray(request.topology.memory_bytes, dtype=np.float64), held.shape)
    if (over := held - memory).max() > 0:
        rank = int(over.argmax())
        found = f"{held[rank]:.0f} bytes of experts on rank {rank}"
        raise InputError(f"--method {request.method}: {found}, which has {memory[rank]:.0f}; --method auto keeps to the memory")


def _limits(scenarios: tuple[Scenario, ...], request: PlanRequest, slots: int) -> tuple[Limit, ...]:
    """The load cap, on the mixture or (robust to the worst) on every scenario, and memory."""
    layers, experts = scenarios[0].load.shape
    memory = memory_limit(request.topology, layers, experts, slots)
    limits: tuple[Limit, ...] = ()
    ranks, objective = request.topology.ranks, request.objective_name
    if objective != "load" and (request.max_load is not None or _capped_by_default(scenarios, request)):
        loads = [_mixed_load(scenarios)] if request.robust == "mean" else [s.load for s in scenarios]

        def with_copies(load: NDArray[np.float64]) -> NDArray[np.float64]:
            room = open_slots(request.topology, layers, experts, slots)
            late = Deadline(float("inf"))  # one descent, which must end alike on every process
            found, _ = balance.search(load[None], ranks, slots, request.seed, 1, late, worst=False, room=room)
            return np.asarray(balance.peaks(found, load) * load.sum(1) / ranks)

        limits = load_limits(loads, ranks, slots, request.max_load, memory, with_copies if ranks * slots > experts else None)
    return limits if memory is None else (*limits, memory)


def _mixed_load(scenarios: Sequence[Scenario]) -> NDArray[np.float64]:
    """The scenarios' loads, each divided by its size, in token counts of the first, float64 `[L, E]`."""
    return np.asarray(sum(s.load / max(s.load.sum(), 1) for s in scenarios)) * float(scenarios[0].load.sum())


def _capped_by_default(scenarios: tuple[Scenario, ...], request: PlanRequest) -> bool:
    """Who names an objective gets that number alone, but not at the price of evenness where doing nothing is even.

    Not so in a chain too long to be searched within limits; and time is lost to whichever rank other text makes the busiest.
    """
    if request.objective_name == "time" or (request.objective is None and request.objective_name == "dispatch"):
        return True
    layers, experts = scenarios[0].load.shape
    even = all(mean_excess(s.load, request.topology.ranks) <= NEARLY_EVEN for s in scenarios)
    return even and chain.sweeps(layers, experts, request.topology.ranks) >= chain.LONG


def _check_known(scenarios: Sequence[Scenario], request: PlanRequest) -> None:
    if request.previous is not None and request.previous.homes is not None:
        raise InputError("--from: found a plan with homes, expected one without: they would no longer fit; plan anew")
    if request.objective_name != "load":
        _require_tokens(scenarios, f"--objective {request.objective_name}")
    if request.homes:
        homing.check_objective(request.objective_name)
    if request.objective_name == "time" and request.strategy != "all_to_all":
        found = f"--strategy {request.strategy}"
        raise InputError(f"--objective time: found {found}, expected all_to_all, the only one whose time is modelled")


def _require_tokens(scenarios: Sequence[Scenario], what: str) -> None:
    for s in scenarios:
        if s.trace is None:
            raise InputError(
                f"{s.name}: holds load statistics only, but {what} needs single tokens; "
                "--objective load with --method auto, packed, contiguous or round_robin does not"
            )


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
    if plan.homes is not None and isinstance(routing, RoutingTrace):
        plans["plan_without_homes"] = replace(plan, homes=None)
    plans |= {name: baseline_plan(name, routing, plan.topology, plan.strategy) for name in BASELINES}
    if isinstance(routing, RoutingTrace):
        return {name: evaluate(p, routing).to_json() for name, p in plans.items()}
    return {name: evaluate_load(p, routing, scenario).to_json() for name, p in plans.items()}


def _slots(layers: int, experts: int, request: PlanRequest) -> int:
    ranks = request.topology.ranks
    if ranks > experts:
        raise InputError(
            f"--topology: found {ranks} ranks, expected at most {experts}: the model has that many experts a layer"
        )
    given = request.slots_per_rank
    if given is None and request.previous is not None:
        given = request.previous.slots_per_rank
    slots = _default_slots(experts, request.topology, layers) if given is None else given
    if not -(-experts // ranks) <= slots <= experts:
        least = f"{-(-experts // ranks)} ({experts} experts on {ranks} ranks)"
        raise InputError(f"--slots-per-rank: found {slots}, expected {least} to {experts}")
    return slots


def _default_slots(experts: int, topology: Topology, layers: int) -> int:
    """Just enough for all experts; where a rank's memory is too small for its share, what the largest rank has room for."""
    enough = -(-experts // topology.ranks)
    size = topology.bytes_of_experts(layers).sum()
    memory = np.broadcast_to(np.asarray(topology.memory_bytes, dtype=np.float64), (topology.ranks,))
    if size == 0 or (memory >= enough * size).all():
        return enough
    return int(min(experts, max(enough, -(-memory.max() // size))))
