"""What a solver is given and what it returns, and how its search is spread over processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coterie.placement import ilp
from coterie.placement.baselines import Assignment
from coterie.placement.capacity import open_slots
from coterie.placement.deadline import Deadline
from coterie.placement.homes import Homes
from coterie.placement.plan import PlacementPlan, slots_from_holders
from coterie.placement.prices import Prices, minimised, prices_of
from coterie.placement.problem import Limit, Problem
from coterie.placement.scenarios import Scenario, short, summarised
from coterie.placement.spread import Child, LostWorker, World, ended
from coterie.routing.affinity import Patterns
from coterie.routing.errors import InputError

if TYPE_CHECKING:
    from coterie.placement.planner import PlanRequest

Array = NDArray[np.float64]
SEED_STRIDE = 1_000_003
SMALL = 60  # anneals or bursts after which a problem that an integer program can take over is handed on

Progress = Callable[[float | None, float | None, int], None]  # value, bound (both as evaluated), iterations


@dataclass(frozen=True)
class Task:
    """What a solver is given.

    weights: of the scenarios in the mixture that is minimised, sum 1; limits: see `problem.Limit`; prove: also state a bound;
    fills: slots beyond the experts with copies.
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
    fills: bool = True

    @property
    def row_weights(self) -> tuple[float, ...]:
        """Of the scenarios in a mixture of tokens; for `time` a batch is all of a recording: a longer one sends more."""
        if self.request.objective_name != "time":
            return self.weights
        tokens = [w * s.trace.tokens for w, s in zip(self.weights, self.scenarios, strict=True) if s.trace is not None]
        return tuple(t / max(sum(tokens), 1e-300) for t in tokens)

    @property
    def ranks(self) -> int:
        """Ranks over all nodes."""
        return self.request.topology.ranks

    @property
    def prices(self) -> Prices:
        """What rows cost by where they go."""
        return prices_of(self.request)

    @property
    def copied(self) -> bool:
        """Whether there are slots beyond the experts, for copies."""
        return self.fills and bool(self.ranks * self.slots > self.scenarios[0].load.shape[1])

    @property
    def spare(self) -> NDArray[np.int64]:
        """Slots of each layer beyond its experts, `[L]`."""
        return np.asarray(self.open_slots.sum(1) - self.scenarios[0].load.shape[1])

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
        return summarised(self.planned(holds), self.scenarios, self.request.objective_name, self.request.robust)

    def minimised(self, holds: NDArray[np.bool_]) -> float:
        """What the search minimises, as evaluated: see `prices.minimised`."""
        return minimised(self.planned(holds), self.scenarios, self.request)

    def planned(self, holds: NDArray[np.bool_]) -> PlacementPlan:
        """A plan that is to be evaluated, without homes."""
        topology, first = self.request.topology, self.scenarios[0]
        layers = tuple(range(len(first.load))) if first.trace is None else first.trace.layer_ids
        if first.statistics is not None:
            layers = first.statistics.layer_ids
        slots = slots_from_holders(holds, self.slots)
        return PlacementPlan(slots, first.load.shape[1], layers, topology, strategy=self.request.strategy)

    def transitions(self) -> list[Array]:
        """Of every scenario, `[L-1, E, E]`."""
        return [s.transitions for s in self.scenarios]

    @property
    def shares_out(self) -> bool:
        """Whether `likely_transitions` are not those that were recorded."""
        return short(self.scenarios) and not self.request.exact

    def likely_transitions(self) -> list[Array]:
        """What to search a chain by, `[L-1, E, E]` of every scenario: as recorded, or of short recordings shared out."""
        return [s.shared_transitions for s in self.scenarios] if self.shares_out else self.transitions()

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
class Spread:
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
        with ended(self.children):
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
    except LostWorker as error:
        warnings.warn(f"{error}; the other processes' best is kept", RuntimeWarning, stacklevel=2)
        return None


def iterations_for(task: Task, problem: Problem, goes_on: bool) -> int | None:
    """How many the search may make; few where an integer program `goes_on`. None: as many as fit into the time."""
    if task.request.iterations is None and goes_on and ilp.fits(problem):
        return SMALL
    return task.request.iterations


def by_cost(problem: Problem) -> Callable[[Assignment], tuple[bool, float]]:
    """Sorts placements: those within the limits first, then by cost."""
    return lambda assignment: (not problem.feasible(assignment), problem.cost(assignment))


def check_feasible(problem: Problem, found: Assignment, task: Task) -> None:
    """Raises InputError if a limit is broken."""
    if not problem.feasible(found):
        raise none_found(task)


def none_found(task: Task) -> InputError:
    """What is said where no placement is found within the limits."""
    given = task.request.max_load
    what = "the experts' memory" if given is None else f"--max-load {given:g}"
    return InputError(f"{what}: no placement within it was found; give more slots, more memory or a larger --max-load")


def by_program(problem: Problem, found: Assignment, task: Task) -> tuple[Assignment, float]:
    """What the integer program makes of `found` in the time that is left, with its bound."""
    proof = ilp.solve(problem, found, task.deadline, task.request.workers)
    proven = proof.assignment
    if proven is not None and problem.feasible(proven) and problem.cost(proven) < problem.cost(found):
        found = proven
    return found, proof.lower_bound


def whole(problem: Problem, bound: float) -> float:
    """Costs that count tokens make whole bounds; with a margin for the solver's tolerance."""
    return max(0.0, float(np.ceil(bound - 1e-5))) if problem.integral else bound


def replaced(task: Task, deadline: Deadline, prove: bool = True) -> Task:
    """The same with another deadline."""
    return replace(task, deadline=deadline, prove=task.prove and prove)
