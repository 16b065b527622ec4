"""Nodes at the price of their links: what is paid, how it is searched, and where sequences that use the same experts go."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from brute_force import every_home, plan_of
from conftest import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.placement import company, homing, local, nodes
from coterie.placement.copies import held
from coterie.placement.cost import evaluate
from coterie.placement.deadline import Deadline
from coterie.placement.planner import PlanRequest, plan
from coterie.placement.prices import Prices, link_price, minimised, prices_of
from coterie.placement.problem import Limit, Problem, dispatch_problem
from coterie.placement.scenarios import gathered
from coterie.placement.topology import Link, Topology
from coterie.routing.trace import RoutingTrace

SEEDS = st.integers(0, 10_000)
SLOW = Topology(2, 2, Link(4e9, 1e-5), Link(1e9, 1e-4))  # a row between nodes costs eight inside


def priced(seed: int, known: bool, once: bool = True, top_k: int = 3) -> tuple[Problem, RoutingTrace]:
    trace = every_home(make_trace(tokens=40, layers=2, experts=8, top_k=top_k, seed=seed), 4)
    scenario = gathered([trace])[0]
    found = scenario.patterns_by_home(4) if known else scenario.patterns
    return dispatch_problem([found], [1.0], 4, 2, (), known, Prices(SLOW, link_price(SLOW), once)), trace


def anywhere(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permuted(np.tile(np.arange(8) // 2, (2, 1)), axis=1)


def test_a_row_between_nodes_costs_a_rank_its_part_of_the_link() -> None:
    assert link_price(SLOW) == 8
    assert link_price(Topology(1, 8)) == link_price(Topology(4, 1)) == 1
    assert link_price(Topology(2, 2, Link(1e9, 0), Link(1e12, 0))) == 1


def test_only_what_sends_rows_home_is_priced_and_not_what_was_asked_for_exactly() -> None:
    assert prices_of(PlanRequest(SLOW)).between == prices_of(PlanRequest(SLOW, "hierarchical")).between == 8
    assert prices_of(PlanRequest(SLOW, "hierarchical")).tiered and not prices_of(PlanRequest(SLOW)).tiered
    for request in (
        PlanRequest(SLOW, "coherent"), PlanRequest(SLOW, objective="time"), PlanRequest(SLOW, "hierarchical", exact=True),
        PlanRequest(SLOW, "coherent", "dispatch"), PlanRequest(Topology(1, 4)),
    ):  # fmt: skip
        assert not prices_of(request).matter


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, known=st.booleans(), once=st.booleans(), top_k=st.integers(1, 4))
def test_the_problem_counts_what_the_evaluated_rows_cost(seed, known, once, top_k) -> None:
    problem, trace = priced(seed, known, once, top_k)
    here = anywhere(seed)
    made = replace(plan_of(held(here, 4), trace, SLOW, 2), strategy="hierarchical" if once else "all_to_all")
    report = evaluate(made, trace)
    assert problem.cost(here) * problem.scale == pytest.approx(Prices(SLOW, 8, once).paid(report))


def test_what_is_paid_is_counted_by_hand() -> None:
    ids = np.array([[[0, 1, 2, 3]]], np.int16)  # home is rank 0 on node 0: its own, one beside it, two on the other node
    trace = RoutingTrace(ids, np.zeros(1, np.int32), np.zeros(1, np.int32), "m", 4, (0,), "s", "prefill")
    made = plan_of(held(np.arange(4)[None], 4), trace, SLOW, 1)
    assert Prices(SLOW, 8).paid(evaluate(replace(made, strategy="all_to_all"), trace)) == 1 + 8 + 8
    assert Prices(SLOW, 8, once=True).paid(evaluate(replace(made, strategy="hierarchical"), trace)) == 1 + 8 + 1


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, known=st.booleans(), top_k=st.integers(1, 4))
def test_tables_by_rank_and_node_price_every_swap(seed, known, top_k) -> None:
    problem, _ = priced(seed, known, top_k=top_k)
    rng, here = np.random.default_rng(seed), anywhere(seed)[0]
    layer = local.layer_of(problem, 0, here)
    for _ in range(8):
        e, f = rng.integers(0, 8, 2)
        if layer.here[e] != layer.here[f]:
            layer.swap(e, f)
    change, now = layer.changes(), problem.layer_cost(0, layer.here)
    assert layer.cost() == pytest.approx(now, rel=1e-5)
    for e, f in product(range(8), repeat=2):
        if layer.here[e] != layer.here[f]:
            after = layer.here.copy()
            after[[e, f]] = layer.here[[f, e]]
            assert change[e, f] + change[f, e] == pytest.approx(problem.layer_cost(0, after) - now, abs=1e-2)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, shape=st.sampled_from([(2, 2), (3, 2), (2, 3)]))
def test_groups_are_named_for_least_cost_without_leaving_their_nodes_company(seed, shape) -> None:
    count, per_node = shape
    rng, ranks = np.random.default_rng(seed), count * per_node
    by_rank, by_node = rng.random((ranks, ranks)), rng.random((count, count))

    def cost(order: np.ndarray) -> float:
        becomes = order.reshape(count, per_node)[:, 0] // per_node
        return float(by_rank[np.arange(ranks), order].sum() + by_node[np.arange(count), becomes].sum())

    def together(order: np.ndarray) -> bool:
        return bool((np.ptp(order.reshape(count, per_node) // per_node, axis=1) == 0).all())

    orders = [np.array(p) for p in permutations(range(ranks))]
    found = nodes.named(by_rank, by_node)
    assert together(found)
    assert cost(found) == pytest.approx(min(cost(order) for order in orders if together(order)))


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, capped=st.booleans())
def test_nodes_first_keeps_nodes_and_limits(seed, capped) -> None:
    problem, trace = priced(seed, False)
    load = gathered([trace])[0].load
    caps = np.full((2, 4), 1.5) * load.sum(1, keepdims=True) / 4
    problem = replace(problem, limits=(Limit(load, caps),) if capped else ())
    by_node, otherwise = nodes.of_nodes(problem), anywhere(seed + 1)
    assert (by_node.ranks, by_node.slots) == (2, 4)
    at = anywhere(seed) // 2
    found = nodes.into_ranks(problem, at, otherwise)
    for layer in range(2):
        assert problem.keeps(layer, found[layer]) or (found[layer] == otherwise[layer]).all()
        assert capped or (found[layer] // 2 == at[layer]).all()
    assert np.bincount(found[0], minlength=4).max() <= 2


def test_a_hierarchical_plan_pays_no_more_than_one_that_counts_ranks_alone() -> None:
    trace = make_trace(tokens=500, layers=2, experts=16, top_k=3, sequences=20)
    priced_request = PlanRequest(SLOW, "hierarchical", "dispatch", time_limit=20, iterations=4)
    made = plan(trace, priced_request)
    alone = plan(trace, replace(priced_request, topology=Topology(1, 4)))
    moved = replace(alone, topology=SLOW)
    scenarios = gathered([trace])
    assert minimised(made, scenarios, priced_request) <= minimised(moved, scenarios, priced_request) * (1 + 1e-9)
    assert made.objective.value == evaluate(made, trace).dispatch >= made.objective.lower_bound


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, once=st.booleans())
def test_a_sequence_pays_by_home_what_evaluate_counts(seed, once) -> None:
    trace, here = make_trace(tokens=60, experts=8, sequences=1, seed=seed), anywhere(seed)[[0, 1, 0]]
    prices = Prices(SLOW, 8, once)
    rows = homing.rows_by_home(trace, homing.token_rows(trace, held(here, 4), prices))
    for home in range(4):
        there = replace(trace, sequence_ids=np.full(60, home, np.int32))
        made = replace(plan_of(held(here, 4), there, SLOW, 2), strategy="hierarchical" if once else "all_to_all")
        assert rows[0, home] == pytest.approx(prices.paid(evaluate(made, there)), rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sequences_that_keep_to_their_experts_are_at_home_with_them(seed) -> None:
    rng = np.random.default_rng(seed)
    own = np.stack([rng.permutation(8).reshape(4, 2) for _ in range(3)])  # [layer, kind, 2]: other experts in every layer
    kind = rng.permutation(np.repeat(np.arange(4), 5))
    ids = np.stack([own[:, kind[s]] for s in np.repeat(np.arange(20), 6)]).astype(np.int16)
    sequence, position = np.repeat(np.arange(20), 6).astype(np.int32), np.tile(np.arange(6), 20).astype(np.int32)
    trace = RoutingTrace(ids, sequence, position, "m", 8, (0, 1, 2), "s", "prefill")
    problem = dispatch_problem([gathered([trace])[0].patterns], [1.0], 4, 2, (), False)
    found = company.clustered(problem, [trace], Prices(Topology(1, 4)), anywhere(0)[[0, 1, 0]])
    assert homing.rows_by_home(trace, homing.token_rows(trace, held(found, 4), Prices(Topology(1, 4)))).min(1).sum() == 0


def test_homes_on_slow_nodes_save_rows_between_nodes() -> None:
    trace = make_trace(tokens=600, layers=3, experts=16, top_k=2, sequences=24)
    request = PlanRequest(SLOW, "hierarchical", max_load=1.5, time_limit=20, iterations=2, homes=True)
    made = plan(trace, request, prove=False)
    assert made.objective.value == evaluate(made, trace).dispatch
    assert made.homes is not None and evaluate(made, trace).node_rows < evaluate(replace(made, homes=None), trace).node_rows


def test_the_local_search_finds_groups_that_are_picked_together() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 8, 600)
    of = rng.permutation(64).reshape(8, 8)
    ids = np.stack([rng.permutation(of[g])[:4] for g in group])[:, None].astype(np.int16)
    trace = RoutingTrace(ids, group.astype(np.int32), np.arange(600, dtype=np.int32), "m", 64, (0,), "s", "prefill")
    problem = dispatch_problem([gathered([trace])[0].patterns], [1.0], 8, 8, (), False)
    found, _ = local.search(problem, 0, 1, Deadline(20))
    assert problem.cost(found) * problem.scale == pytest.approx(7 / 8)
