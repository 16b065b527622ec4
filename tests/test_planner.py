"""The planner against brute force: optima, bounds, caps, symmetric cases."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from conftest import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.placement import exact, ilp
from coterie.placement.bounds import lower_bound, most_together
from coterie.placement.cost import evaluate, homes_of
from coterie.placement.planner import PlanRequest, baseline_plan, plan
from coterie.placement.problem import Problem, dispatch_problem, hops_problem, load_caps
from coterie.placement.search import descend, search, swap_deltas
from coterie.placement.topology import Topology
from coterie.routing.affinity import measure, patterns
from coterie.routing.errors import InputError


def layer_choices(experts: int, ranks: int, slots: int) -> list[tuple[int, ...]]:
    return [a for a in product(range(ranks), repeat=experts) if max(np.bincount(a, minlength=ranks)) <= slots]


def brute_force(problem: Problem) -> float:
    """The cheapest feasible placement of all."""
    choices = layer_choices(problem.experts, problem.ranks, problem.slots)
    best = np.inf
    for combination in product(choices, repeat=problem.layers):
        assignment = np.array(combination)
        if problem.feasible(assignment):
            best = min(best, problem.cost(assignment))
    return best


def problems(
    seed: int, ranks: int, experts: int, slots: int, layers: int, top_k: int, max_load: float | None
) -> dict[str, Problem]:
    trace = make_trace(tokens=80, layers=layers, experts=experts, top_k=top_k, seed=seed, sequences=5)
    affinity = measure(trace)
    homes = homes_of(trace, ranks)
    affinity = replace(affinity, patterns=tuple(patterns(trace, i, homes, ranks) for i in range(layers)))
    caps = load_caps(affinity.load, ranks, slots, max_load)
    return {
        "hops": hops_problem(affinity, ranks, slots, caps),
        "homes unknown": dispatch_problem(affinity, ranks, slots, caps, known_homes=False),
        "homes known": dispatch_problem(affinity, ranks, slots, caps, known_homes=True),
    }


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000), shape=st.sampled_from([(2, 4, 2), (2, 5, 3), (3, 4, 2), (2, 4, 3), (4, 4, 1)]),
    layers=st.integers(1, 2), top_k=st.integers(1, 3), capped=st.booleans(),
)  # fmt: skip
def test_the_integer_program_finds_and_proves_the_optimum(seed, shape, layers, top_k, capped) -> None:
    ranks, experts, slots = shape
    if top_k >= experts:
        return
    for name, problem in problems(seed, ranks, experts, slots, layers, top_k, None if capped else 100.0).items():
        best = brute_force(problem)
        start = search(problem, seed, 20, time.monotonic() + 60)
        assert problem.feasible(start)
        proof = ilp.solve(problem, start, time.monotonic() + 60)
        found = problem.cost(start if proof.assignment is None else proof.assignment)
        assert problem.feasible(start if proof.assignment is None else proof.assignment)
        assert found == pytest.approx(best), name
        assert proof.lower_bound <= best + 1e-6, name
        assert proof.lower_bound == pytest.approx(best, abs=1e-5), name


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(2, 4, 2), (2, 5, 3), (3, 4, 2), (4, 4, 1)]),
    top_k=st.integers(1, 3),
)
def test_the_cheap_bounds_hold(seed, shape, top_k) -> None:
    for problem in problems(seed, *shape, 2, top_k, 100.0).values():
        assert 0 <= lower_bound(problem) <= brute_force(problem) + 1e-6


def test_the_matching_bound_is_the_best_matching() -> None:
    from scipy.optimize import linear_sum_assignment

    weights = np.random.default_rng(0).random((6, 6))
    rows, cols = linear_sum_assignment(-weights)
    assert most_together(weights, 1) == pytest.approx(weights[rows, cols].sum())
    assert most_together(weights, 6) == pytest.approx(weights.sum())
    assert most_together(np.zeros((3, 3)), 1) == 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.sampled_from([2, 3]), layers=st.integers(2, 3), capped=st.booleans())
def test_dynamic_programming_equals_brute_force(seed, ranks, layers, capped) -> None:
    experts = {2: 4, 3: 6}[ranks]
    layers = 2 if ranks == 3 else layers
    problem = (
        problems(seed, ranks, experts, 2, layers, 2, 1.6 if capped else 100.0)["hops"]
        if not capped
        else _capped(seed, ranks, layers)
    )
    assert exact.fits(problem)
    best = exact.solve(problem)
    assert best is not None and problem.feasible(best)
    assert problem.cost(best) == pytest.approx(brute_force(problem))


def _capped(seed: int, ranks: int, layers: int) -> Problem:
    return problems(seed, ranks, {2: 4, 3: 6}[ranks], 2, layers, 2, None)["hops"]


def test_dynamic_programming_lists_every_partition_once() -> None:
    found = exact.partitions_of(8, 4)
    assert len(found) == 105
    assert (
        len(
            {
                frozenset(frozenset(np.flatnonzero(row == g)) for g in range(4))
                for row in found.tolist()
                for row in [np.array(row)]
            }
        )
        == 105
    )
    assert len(exact.partitions_of(16, 2)) == 6435


def test_dynamic_programming_says_when_no_partition_keeps_to_the_cap() -> None:
    problem = problems(1, 2, 4, 2, 2, 2, 100.0)["hops"]
    assert exact.solve(replace(problem, caps=problem.caps * 0)) is None
    assert not exact.fits(replace(problem, slots=3))
    assert not exact.fits(problems(1, 2, 4, 2, 2, 2, 100.0)["homes known"])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.sampled_from([2, 3, 4]), top_k=st.integers(1, 4))
def test_swap_gains_are_what_the_cost_changes_by(seed, ranks, top_k) -> None:
    rng = np.random.default_rng(seed)
    for problem in problems(seed, ranks, 6, 6, 3, top_k, 100.0).values():
        assignment = rng.integers(0, ranks, (3, 6))
        before = problem.cost(assignment)
        for layer in range(3):
            delta = swap_deltas(problem, assignment, layer)
            e, f = rng.integers(0, 6, 2)
            if assignment[layer, e] != assignment[layer, f]:
                swapped = assignment.copy()
                swapped[layer, [e, f]] = assignment[layer, [f, e]]
                assert problem.cost(swapped) - before == pytest.approx(delta[e, f], abs=1e-9)


def test_descent_ends_where_no_swap_helps_and_never_breaks_the_cap() -> None:
    for problem in problems(3, 4, 8, 2, 3, 2, None).values():
        found = search(problem, 0, 30, time.monotonic() + 60)
        assert problem.feasible(found)
        assert problem.cost(descend(problem, found)) == problem.cost(found)


def test_search_is_deterministic_for_a_seed() -> None:
    problem = problems(5, 4, 8, 2, 3, 2, None)["hops"]
    runs = [search(problem, 11, 40, time.monotonic() + 60) for _ in range(2)]
    assert (runs[0] == runs[1]).all()


@pytest.mark.parametrize("objective", ["hops", "dispatch"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_plan_states_the_evaluated_value_and_a_valid_bound(objective: str, ranks: int) -> None:
    trace = make_trace(tokens=500, layers=3, experts=8)
    made = plan(trace, PlanRequest(Topology(1, ranks), objective=objective, max_load=ranks, time_limit=5))
    assert made.objective.name == objective
    assert made.objective.value == getattr(evaluate(made, trace), objective)
    assert 0 <= made.objective.lower_bound <= made.objective.value
    assert made.objective.gap == (made.objective.value - made.objective.lower_bound) / made.objective.value
    for name in ("contiguous", "round_robin", "packed"):
        other = getattr(evaluate(baseline_plan(name, trace, Topology(1, ranks), "all_to_all"), trace), objective)
        assert made.objective.lower_bound - 1e-9 <= made.objective.value <= other


def test_every_layer_keeps_to_the_load_cap() -> None:
    trace = make_trace(tokens=500, layers=3, experts=8)
    for objective in ("hops", "dispatch"):
        for cap in (1.3, 1.6):
            made = plan(trace, PlanRequest(Topology(1, 2), objective=objective, max_load=cap, time_limit=3))
            load = evaluate(made, trace).rank_load
            assert (load.max(1) / load.mean(1)).max() <= cap * (1 + 1e-6)


def test_exact_plans_are_proven() -> None:
    trace = make_trace(tokens=300, layers=2, experts=6)
    for objective in ("hops", "dispatch"):
        made = plan(trace, PlanRequest(Topology(1, 2), objective=objective, exact=True, max_load=2, time_limit=60))
        assert made.objective.gap == 0


def test_a_perfect_chain_needs_no_hops() -> None:
    trace = make_trace(tokens=400, layers=4, experts=8, top_k=1)
    ids = trace.expert_ids.copy()
    for layer in range(1, 4):
        ids[:, layer, 0] = (ids[:, layer - 1, 0] * 3 + layer) % 8
    made = plan(replace(trace, expert_ids=ids), PlanRequest(Topology(1, 4), strategy="coherent", max_load=8, time_limit=10))
    assert (made.objective.name, made.objective.value, made.objective.gap) == ("hops", 0.0, 0.0)


def test_planned_plans_beat_the_baselines_on_text_they_did_not_see() -> None:
    trace = make_trace(tokens=3000, layers=4, experts=8)
    seen, unseen = trace.select(np.arange(0, 3000, 2)), trace.select(np.arange(1, 3000, 2))
    for objective in ("hops", "dispatch"):
        made = plan(seen, PlanRequest(Topology(1, 4), objective=objective, time_limit=4))
        for name in ("contiguous", "round_robin", "packed"):
            base = evaluate(baseline_plan(name, unseen, Topology(1, 4), "all_to_all"), unseen)
            assert getattr(evaluate(made, unseen), objective) < getattr(base, objective)


def test_free_slots_are_used_when_they_help(trace) -> None:
    tight = plan(trace, PlanRequest(Topology(1, 2), objective="dispatch", max_load=2, time_limit=3))
    loose = plan(trace, PlanRequest(Topology(1, 2), objective="dispatch", max_load=2, slots_per_rank=6, time_limit=3))
    assert loose.slots_per_rank == 6
    assert loose.objective.value <= tight.objective.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(topology=Topology(2, 8)),
            "--topology: found 16 ranks, expected at most 8: the model has that many experts",
        ),
        (dict(slots_per_rank=1), "--slots-per-rank: found 1, expected 2 to 8"),
        (dict(max_load=1.0), r"--max-load: found 1, but the evenest packing found of one layer has 1\.\d+; give that or more"),
        (dict(max_load=0.5), "--max-load: found 0.5, expected at least 1"),
        (dict(strategy="x"), "--strategy: found 'x', expected all_to_all"),
        (dict(method="x"), "--method: found 'x', expected auto, contiguous"),
        (dict(objective="x"), "--objective: found 'x', expected hops, dispatch"),
        (dict(time_limit=0), "--time-limit: found 0"),
        (dict(seed=-1), "--seed: found -1"),
    ],
)
def test_a_wrong_request_says_what_is_allowed(trace, change, message) -> None:
    with pytest.raises(InputError, match=message):
        plan(trace, PlanRequest(**{"topology": Topology(1, 4), **change}))


def test_labels_of_ranks_do_not_change_the_hops(trace) -> None:
    problem = problems(2, 3, 6, 2, 3, 2, 100.0)["hops"]
    assignment = np.random.default_rng(0).permuted(np.tile(np.arange(6) % 3, (3, 1)), axis=1)
    costs = {problem.cost(np.array(order)[assignment]) for order in permutations(range(3))}
    assert len(costs) == 1
