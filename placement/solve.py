"""One solver per objective: search, then (or beside it, on another core) proof.

Each takes a `Task` and returns a `Solution`; `planner.plan` evaluates what comes back with the dispatcher's own rules.
"""

from __future__ import annotations

import warnings

import numpy as np

from coterie.placement import balance, bounds, chain, copies, exact, ilp, limits, replicas
from coterie.placement.baselines import Assignment
from coterie.placement.plan import holders
from coterie.placement.problem import Problem, hops_problem
from coterie.placement.recombine import recombined
from coterie.placement.rows import dispatch, time
from coterie.placement.spread import Child, LostWorker, ended
from coterie.placement.task import (
    Array,
    Solution,
    Solver,
    Spread,
    Task,
    by_cost,
    by_program,
    check_feasible,
    iterations_for,
    replaced,
    whole,
)
from coterie.routing.errors import InputError

SEARCH_SHARE, EXACT_SHARE = 0.45, 0.6  # of the time that is left; the rest is for the proof, if it has no core of its own
PROVING = 0.4  # of what is left after the search, for the bound of a problem that an integer program then takes
PLAIN = 20  # descents of a placement without copies that one with copies is compared with


def hops(task: Task) -> Solution:
    """ExFlow's objective: dynamic programming where it fits, else annealed chains, an ILP where it fits, and a certificate."""
    problem = _hops_problem(task, task.transitions())
    if task.copied:
        part = replaced(task, task.deadline.share(replicas.SEARCHED if task.prove else 1.0))
        holds, made = replicas.with_copies(part, hops, replicas.for_hops(np.asarray(problem.transitions)))
        bound = bounds.hops_with_copies(problem)
        if task.prove and task.world.rank == 0:
            bound = bounds.hops_with_few_copies(problem, task.spare, task.deadline)
        return Solution(holds, whole(problem, bound) * problem.scale, made)
    if exact.fits(problem):
        solved = task.world.gather(exact.solve(problem, task.deadline.share(EXACT_SHARE)))
        if (optimum := next((s for s in solved if s is not None), None)) is not None:
            return Solution(copies.held(optimum, task.ranks), problem.cost(optimum) * problem.scale, 1)
    proof = _Proof(task, problem)
    searching = task.deadline if proof.child or not proof.wanted else task.deadline.share(SEARCH_SHARE)
    shared = task.shares_out and not ilp.fits(problem)
    likely = _hops_problem(task, task.likely_transitions()) if shared else problem
    arguments = {"problem": likely, "iterations": iterations_for(task, problem, task.prove)}
    shown = None if shared else problem.scale  # what is not evaluated so is not shown
    report = lambda cost, made: task.progress(shown and cost * shown, proof.bound, made)  # noqa: E731
    own = {"target": 0.0 if shared else proof.cheap, "report": report}
    spread = Spread(task, "coterie.placement.chain:search", arguments)
    with ended([proof.child]):
        found = spread.run(chain.search, searching, max(0, task.request.workers - 1 - (proof.child is not None)), **own)
        best, made = min((a for a, _ in found), key=by_cost(likely)), sum(n for _, n in found)
        if len(found) > 1 and problem.interchangeable:
            best = min(best, recombined(likely, [a for a, _ in found]), key=by_cost(likely))
        check_feasible(problem, best, task)
        best, bound = proof.finish(best)
    return Solution(copies.held(best, task.ranks), bound * problem.scale, made)


def _hops_problem(task: Task, transitions: list[Array]) -> Problem:
    return hops_problem(transitions, task.weights, task.ranks, task.slots, task.limits)


class _Proof:
    """The certificate of a `hops` problem: in a child while the search goes on, if there is a worker for it, else after it."""

    def __init__(self, task: Task, problem: Problem) -> None:
        self.task, self.problem = task, problem
        self.bound: float | None = None
        self.child: Child | None = None
        self.wanted = task.prove and problem.layers > 1 and task.world.rank == 0
        apart = self.wanted and task.request.workers > 1
        late = apart and chain.is_large(problem)  # then the search need not wait for the cheap bound either
        self.cheap = 0.0 if late else bounds.lower_bound(problem, task.deadline.share(0.2))
        if apart:
            function = f"coterie.placement.bounds:{'both_bounds' if late else 'chain_bound'}"
            self.child = Child(function, {"problem": problem}, task.deadline, self._hear).start()

    def _hear(self, bound: float) -> None:
        self.bound = bound * self.problem.scale

    def finish(self, best: Assignment) -> tuple[Assignment, float]:
        """A placement at least as good, and the bound, in counts."""
        problem, task, bound = self.problem, self.task, self.cheap
        program = self.wanted and ilp.fits(problem)
        if self.child is not None:
            heard = bound if self.bound is None else max(bound, self.bound / problem.scale)
            if problem.cost(best) <= whole(problem, heard) + 1e-9:
                self.child.stop()
            elif program:  # which wants the rest of the time
                self.child.wait(task.deadline.share(PROVING))
                self.child.stop()
            bound = max(bound, self._of_child(self.child))
        elif problem.cost(best) > bound + 1e-9 and self.wanted:
            hear = lambda b: task.progress(problem.cost(best) * problem.scale, b * problem.scale, 0)  # noqa: E731
            bound = max(
                bound, bounds.chain_bound(problem, task.deadline.share(PROVING if program else 1.0), hear, problem.cost(best))
            )
        if program and problem.cost(best) > whole(problem, bound) + 1e-9:
            best, proven = by_program(problem, best, task)
            bound = max(bound, proven)
        bound = max(task.world.gather(bound))
        best = min(task.world.gather(best), key=by_cost(problem))
        cost, counted = problem.cost(best), whole(problem, bound)
        if counted > cost * (1 + 1e-6) + 1e-6:
            raise AssertionError(f"a lower bound of {counted} on hops that cost {cost}")
        return best, min(counted, cost)

    def _of_child(self, child: Child) -> float:
        """Its bound, in counts; of a proof that is lost the last one heard."""
        try:
            return float(child.result())
        except LostWorker as error:
            warnings.warn(f"the proof was lost ({error}): the plan is kept, with a weaker bound", RuntimeWarning, stacklevel=2)
            return 0.0 if self.bound is None else self.bound / self.problem.scale


def load(task: Task) -> Solution:
    """The evenest load, with copies, over all scenarios; for the mean, also over parts of each trace.

    Among placements that are even on the whole, one that is even on its parts is more even on other text.
    """
    loads = np.stack([s.load for s in task.scenarios])
    worst = task.request.robust == "worst"
    parts = [[] if worst or task.request.exact else s.parts() for s in task.scenarios]
    each = [w / (1 + len(p)) for w, p in zip(task.weights, parts, strict=True)]  # a scenario and its parts share its weight
    arguments = {
        "loads": np.stack([*loads, *(part for p in parts for part in p)]),
        "weights": np.array([*each, *(w for w, p in zip(each, parts, strict=True) for _ in p)]),
        "ranks": task.ranks,
        "slots": task.slots,
        "iterations": task.request.iterations,
        "worst": worst,
    }
    if task.short_of_memory:
        arguments["room"] = task.open_slots
    bound = bounds.load_bound(loads, task.ranks, task.slots, worst)
    spread = Spread(task, "coterie.placement.balance:search", arguments)
    report = lambda value, made: task.progress(value, bound, made)  # noqa: E731
    apart = task.copied and not task.short_of_memory and any(s.trace is not None for s in task.scenarios)
    searching = task.deadline.share(0.9) if apart else task.deadline
    found = spread.run(balance.search, searching, max(0, task.request.workers - 1), report=report)
    candidates = [holders(slots, loads.shape[2], task.ranks) for slots, _ in found]
    if apart:  # the dispatcher's copies do not take quite equal shares
        least = -(-loads.shape[2] // task.ranks)
        plain = {**arguments, "slots": least, "iterations": PLAIN}
        slots, _ = balance.search(**plain, seed=task.request.seed, deadline=task.deadline)
        mixed = np.tensordot(task.weights, balance.relative_loads(loads, task.ranks), 1)
        single = np.stack([limits.balanced(load, task.ranks, least)[: len(load)] for load in mixed])
        candidates += [holders(slots, loads.shape[2], task.ranks), copies.held(single, task.ranks)]
    holds = min(task.world.gather(min(candidates, key=task.evaluated)), key=task.evaluated)
    check_even(task, holds)
    return Solution(holds, bound, sum(n for _, n in found))


def check_even(task: Task, holds: np.ndarray) -> None:
    """A load cap is what this objective minimises: it is met, or cannot be as far as the search knows."""
    most = task.request.max_load
    if most is None:
        return
    for s in task.scenarios:
        held = s.report(task.planned(holds)).rank_load
        worst = float((held.max(1) / np.maximum(held.mean(1), 1e-300)).max())
        if worst > most * (1 + 1e-9):
            raise InputError(
                f"--max-load: found {most:g}, but the evenest layer found in {s.name} has {worst:.4f}; give that or more"
            )


def coherent(task: Task) -> Solution:
    """Rows at any top-k when tokens stay with their experts: dispatch with the anchors of the moment as homes, in turns."""
    from coterie.placement.anchors import alternate

    if all(s.trace is not None and s.trace.top_k == 1 and (s.trace.expert_ids >= 0).all() for s in task.scenarios):
        return hops(task)  # the same number then, copies aside
    return alternate(task)


SOLVERS: dict[str, Solver] = {"hops": hops, "coherent": coherent, "dispatch": dispatch, "load": load, "time": time}
