"""The plain references of the planner's tests: every placement of a tiny shape, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, product

import numpy as np
from conftest import make_trace

from coterie.placement.cost import homes_of
from coterie.placement.limits import load_limits
from coterie.placement.plan import PlacementPlan, slots_from_holders
from coterie.placement.problem import Limit, Problem, carried, dispatch_problem, hops_problem, one_hot
from coterie.placement.topology import Topology
from coterie.routing.affinity import measure
from coterie.routing.trace import RoutingTrace


@cache
def layer_choices(experts: int, ranks: int, slots: int) -> np.ndarray:
    """Every rank of every expert within the slots, `[ways, E]`."""
    ways = [a for a in product(range(ranks), repeat=experts) if max(np.bincount(a, minlength=ranks)) <= slots]
    return np.array(ways, dtype=np.int64)


def allowed(problem: Problem, layer: int) -> np.ndarray:
    """The choices for one layer that keep to the limits."""
    ways = layer_choices(problem.experts, problem.ranks, problem.slots)
    kept = np.ones(len(ways), dtype=bool)
    for limit in problem.limits:
        one = Limit(np.tile(limit.weights[layer], (len(ways), 1)), np.empty(0))
        kept &= (carried(one, ways, problem.ranks) <= limit.caps[layer] * (1 + 1e-9)).all(1)
    return ways[kept]


def optimum(problem: Problem) -> float:
    """The cheapest placement of all within the limits; infinite if there is none."""
    ways = [allowed(problem, layer) for layer in range(problem.layers)]
    if not all(len(w) for w in ways):
        return np.inf
    if problem.transitions is None:
        return sum(min(problem.layer_cost(layer, row) for row in ways[layer]) for layer in range(problem.layers))
    apart = np.zeros(len(ways[0]))
    for layer, weights in enumerate(problem.transitions):
        left, right = (one_hot(ways[at], problem.ranks).astype(float) for at in (layer, layer + 1))
        together = np.einsum("ner,ef,mfr->nm", left, weights, right, optimize=True)
        apart = (apart[:, None] + weights.sum() - together).min(0)
    return float(apart.min())


@cache
def copied_choices(experts: int, ranks: int, slots: int) -> np.ndarray:
    """Every way to hold the experts of a layer with copies, bool `[ways, E, ranks]`."""
    homes = [
        np.array([r in where for r in range(ranks)]) for n in range(1, ranks + 1) for where in combinations(range(ranks), n)
    ]
    held = (np.array(ways) for ways in product(homes, repeat=experts))
    return np.array([h for h in held if h.sum(0).max() <= slots])


def plans(trace: RoutingTrace, topology: Topology, slots: int, copied: bool = False, **changes) -> Iterator[PlacementPlan]:
    """Every placement of a trace's experts, with copies or without."""
    if copied:
        ways = copied_choices(trace.num_experts, topology.ranks, slots)
    else:
        ways = one_hot(layer_choices(trace.num_experts, topology.ranks, slots), topology.ranks).astype(bool)
    for combination in product(range(len(ways)), repeat=trace.layers):
        yield plan_of(ways[list(combination)], trace, topology, slots, **changes)


def plan_of(holds: np.ndarray, trace: RoutingTrace, topology: Topology, slots: int, **changes) -> PlacementPlan:
    """A plan that holds `[L, E, ranks]`."""
    return PlacementPlan(slots_from_holders(holds, slots), trace.num_experts, trace.layer_ids, topology, trace.model, **changes)


def problems(
    seed: int, ranks: int, experts: int, slots: int, layers: int, top_k: int, max_load: float | None = 100.0, tokens: int = 80
) -> dict[str, Problem]:
    """A hops problem and both dispatch problems of one trace; max_load None: the default cap, 100: no cap."""
    trace = make_trace(tokens=tokens, layers=layers, experts=experts, top_k=top_k, seed=seed, sequences=5)
    affinity = measure(trace, homes_of(trace, ranks), ranks)
    caps = () if max_load == 100.0 else load_limits([affinity.load], ranks, slots, max_load)
    return {
        "hops": hops_problem([affinity.transitions], [1.0], ranks, slots, caps),
        "homes unknown": dispatch_problem([affinity.patterns], [1.0], ranks, slots, caps, known_homes=False),
        "homes known": dispatch_problem([affinity.patterns], [1.0], ranks, slots, caps, known_homes=True),
    }


def every_home(trace: RoutingTrace, ranks: int) -> RoutingTrace:
    """The same tokens once for every home rank, so that each home is equally likely."""
    copies = [replace(trace, sequence_ids=np.full(trace.tokens, r, np.int32)) for r in range(ranks)]
    weights = None if trace.router_weights is None else np.concatenate([c.router_weights for c in copies])
    return replace(
        trace,
        expert_ids=np.concatenate([c.expert_ids for c in copies]),
        sequence_ids=np.concatenate([c.sequence_ids for c in copies]),
        positions=np.tile(trace.positions, ranks),
        router_weights=weights,
    )
