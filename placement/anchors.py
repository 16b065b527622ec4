"""Search for `coherent`: rows that tokens send when they stay with their experts, at any top-k.

A layer pays 2 |R| - [anchor in R] - 1 rows for a token whose experts live on the ranks R. With the anchors of the moment taken
as homes that is a dispatch problem with known homes, layer by layer; new placements move the anchors, so the two take
turns, a part of the layers at a time, and only what lowers the rows as evaluated is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coterie.placement import bounds, copies, local, replicas, solve
from coterie.placement.baselines import Assignment
from coterie.placement.cost import anchors, coherent_rows
from coterie.placement.problem import Problem, dispatch_problem
from coterie.placement.rows import dispatch
from coterie.placement.scenarios import Scenario, short
from coterie.placement.task import Solution, Task, replaced
from coterie.placement.topology import Topology
from coterie.routing.affinity import patterns

ROUNDS = 200  # at most; without a better placement in STALLED rounds it ends
STALLED = 14


def alternate(task: Task) -> Solution:
    """Starts from a plan for dispatch and one for hops, whichever pays fewer rows as evaluated.

    Of short traces the plan for hops is kept as it is: what is best for each layer's rows is best for these tokens only.
    """
    scenarios, weights, topology = task.scenarios, task.weights, task.request.topology
    if task.copied:
        mixed = sum(w * s.transitions / s.trace.tokens for w, s in zip(weights, scenarios, strict=True) if s.trace)
        filled, iterations = replicas.with_copies(task, alternate, replicas.for_hops(np.asarray(mixed)))
        return Solution(filled, lower_bound(task), iterations)
    few = short(scenarios) or len(scenarios[0].load) == 1  # one layer alone pays nothing
    solvers, shares = ((solve.hops,), (0.8,)) if few else ((solve.hops, dispatch), (0.3, 0.35))
    starts = [solver(replaced(task, task.deadline.share(s), prove=False)) for solver, s in zip(solvers, shares, strict=True)]
    begun = [s.holds.argmax(2) for s in starts]
    searching = task.deadline.share(0.8) if task.prove else task.deadline
    made = sum(s.iterations for s in starts)

    def rows(assignment: Assignment) -> float:
        return mean_rows(copies.held(assignment, task.ranks), scenarios, weights, topology)

    best = min(begun, key=rows)
    lowest, quiet = rows(best), 0
    rounds = ROUNDS if task.request.iterations is None else task.request.iterations
    for number in range(0 if few else rounds):
        if searching.passed() or quiet == STALLED:
            break
        apart = min(quiet + 1, len(best))
        layers = np.arange(number % apart, len(best), apart)  # after failures fewer change at once
        part = anchored(task, copies.held(best, task.ranks)).of_layers(layers)
        chosen = best.copy()
        chosen[layers], more = local.search(part, task.request.seed + number, 1, searching, begin=best[layers])
        made += more
        value = rows(chosen)
        quiet = 0 if value < lowest - 1e-12 else quiet + 1
        if value < lowest:
            best, lowest = chosen, value
        task.progress(lowest, None, made)
    bound = lower_bound(task)
    if task.prove:
        bound = max(bound, _by_patterns(task, best))
    return Solution(copies.held(best, task.ranks), bound, made)


def _by_patterns(task: Task, found: Assignment) -> float:
    """Rows per token and layer: 2 (r - 1), r bounded from below by the semidefinite bound on shared ranks."""
    whole = dispatch_problem(task.patterns(), task.weights, task.ranks, task.slots, task.limits, known_homes=False)
    if whole.layers == 1 or task.ranks == 1:
        return 0.0
    layers = whole.layers - 1
    paid = whole.of_layers(np.arange(1, whole.layers))
    rows = bounds.patterns_bound(paid, found[1:], task.deadline) * whole.scale * whole.layers / layers
    picked = [float((s.trace.expert_ids[:, 1:] >= 0).any(2).mean()) for s in task.scenarios if s.trace is not None]
    return max(0.0, 2 * rows / (1 - 1 / task.ranks) - 2 * float(np.dot(task.weights, picked)))


def mean_rows(holds: np.ndarray, scenarios: Sequence[Scenario], weights: Sequence[float], topology: Topology) -> float:
    """What is minimised: `cost.coherent_rows` of the mixture; holds: bool `[L, E, ranks]`."""
    traces = [s.trace for s in scenarios]
    return float(sum(w * coherent_rows(t, holds, topology)[0] for w, t in zip(weights, traces, strict=True) if t is not None))


def anchored(task: Task, holds: np.ndarray) -> Problem:
    """The dispatch problem whose homes are the anchors under `holds`; the first layer, which pays nothing, has no prices.

    holds: bool `[L, E, ranks]`.
    """
    members: list[list[np.ndarray]] = [[] for _ in holds]
    prices: list[list[np.ndarray]] = [[] for _ in holds]
    for scenario, weight in zip(task.scenarios, task.weights, strict=True):
        assert scenario.trace is not None
        for layer, (_, anchor, _) in enumerate(anchors(scenario.trace, holds, task.request.topology)):
            found = patterns(scenario.trace, layer, anchor, task.ranks)
            assert found.by_home is not None
            share = weight / scenario.trace.tokens if layer > 0 else 0.0
            members[layer].append(found.experts)
            prices[layer].append((2 * found.weight[:, None] - found.by_home) * share)
    layers, experts = task.scenarios[0].load.shape
    return Problem(
        layers, experts, task.ranks, task.slots, 1 / max(layers - 1, 1), task.limits,
        members=tuple(np.concatenate(m) for m in members), prices=tuple(np.concatenate(p) for p in prices),
    )  # fmt: skip


def lower_bound(task: Task) -> float:
    """Rows per token and layer: a token on r ranks pays at least 2 (r - 1), and n experts need ceil(n / slots) ranks."""
    least = []
    for scenario in task.scenarios:
        assert scenario.trace is not None
        picks = (scenario.trace.expert_ids[:, 1:] >= 0).sum(2)
        needed = np.maximum(0, -(-picks // task.slots) - 1)
        least.append(2 * float(needed.sum()) / (scenario.trace.tokens * max(scenario.trace.layers - 1, 1)))
    return float(np.dot(task.weights, least))
