"""What a plan does to a trace: definitions worked by hand, and a token-by-token reference for everything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.placement.baselines import BASELINES, contiguous, packed, round_robin
from coterie.placement.cost import CostReport, destinations, evaluate, evaluate_load
from coterie.placement.plan import PlacementPlan, slots_from_assignment
from coterie.placement.planner import baseline_plan, compare
from coterie.placement.topology import Link, Topology
from coterie.routing.errors import InputError
from coterie.routing.trace import LoadStatistics, RoutingTrace


def tiny_trace(ids, sequences, weights=None) -> RoutingTrace:
    ids = np.array(ids, dtype=np.int16)
    count = len(ids)
    return RoutingTrace(
        ids,
        np.array(sequences, np.int32),
        np.arange(count, dtype=np.int32),
        "m",
        4,
        tuple(range(ids.shape[1])),
        router_weights=None if weights is None else np.array(weights, np.float16),
    )


def tiny_plan(assignment, nodes=1, ranks_per_node=2, **changes) -> PlacementPlan:
    ranks = nodes * ranks_per_node
    slots = slots_from_assignment(np.array(assignment), ranks, 4 // ranks)
    return PlacementPlan(slots, 4, tuple(range(len(assignment))), Topology(nodes, ranks_per_node), "m", **changes)


def test_a_case_worked_by_hand() -> None:
    # Experts 0, 1 on rank 0, 2, 3 on rank 1, in both layers.
    # Token 0 (home 0): {0, 2} then {0, 1}. Token 1 (home 1): {2, 3} twice.
    trace = tiny_trace([[[0, 2], [0, 1]], [[2, 3], [3, 2]]], [0, 1])
    report = evaluate(tiny_plan([[0, 0, 1, 1]] * 2), trace)
    assert report.dispatch == 1 / 4  # one remote row (token 0 to rank 1 in layer 0) over 2 tokens x 2 layers
    assert report.remote_rows == 1 / 2 and report.node_rows == 0
    assert report.hops == 2 / 8  # of 2 x 4 pairs: (2, 0) and (2, 1) of token 0
    assert report.busiest_rank == (1 / 2 + 0) / 2
    assert report.load == (3 / 2 + 2 / 2) / 2  # pairs: layer 0: 1 and 3; layer 1: 2 and 2
    assert report.coherent == (0 + 0 + 0 + 0) / 2  # layer 1: both tokens' experts are where they are


def test_coherent_rows_go_out_and_come_back() -> None:
    # One token with home 0: layer 0 on rank 0, layer 1 needs both ranks and its heavier expert is on rank 1.
    trace = tiny_trace([[[0, 1], [0, 2]]], [0], [[[0.5, 0.5], [0.25, 0.75]]])
    assert evaluate(tiny_plan([[0, 0, 1, 1]] * 2), trace).coherent == 2  # one row to rank 1, one back: it stays at its anchor
    moved = tiny_trace([[[0, 1], [2, 3]]], [0], [[[0.5, 0.5], [0.25, 0.75]]])
    assert evaluate(tiny_plan([[0, 0, 1, 1]] * 2), moved).coherent == 1  # it moves to rank 1 and nothing comes back


def test_unused_slots_cost_nothing() -> None:
    trace = tiny_trace([[[0, -1], [-1, -1]]], [1])
    report = evaluate(tiny_plan([[0, 0, 1, 1]] * 2), trace)
    assert report.dispatch == 1 / 2 and report.hops == 0 and report.load == (2 + 1) / 2


def test_seconds_are_twice_the_slowest_link_plus_the_busiest_rank() -> None:
    topology = Topology(2, 1, Link(1e9, 0), Link(1e6, 1e-3), row_bytes=1e3, pairs_per_second=1e3)
    plan = replace(tiny_plan([[0, 0, 1, 1]], 2, 1), topology=topology)
    report = evaluate(plan, tiny_trace([[[0, 2]], [[0, 1]]], [0, 0]))
    # One row leaves node 0: 1000 bytes at 1 MB/s, 1 ms latency; rank 0 computes 3 pairs.
    assert report.seconds == pytest.approx(2 * (1e-3 + 1e-3) + 3e-3)


def test_strategies_change_rows_but_not_destinations() -> None:
    trace = make_trace(tokens=300, experts=8, top_k=4)
    reports = {}
    for strategy in ("all_to_all", "hierarchical", "coherent", "all_gather", "replicated"):
        plan = baseline_plan("round_robin", trace, Topology(2, 2), strategy)
        reports[strategy] = evaluate(plan, trace)
    assert len({r.dispatch for r in reports.values()}) == 1
    assert reports["all_to_all"].remote_rows == 2 * reports["all_to_all"].dispatch
    assert reports["hierarchical"].node_rows < reports["all_to_all"].node_rows <= reports["all_to_all"].remote_rows
    assert reports["coherent"].remote_rows == reports["coherent"].coherent
    assert reports["replicated"].remote_rows == 6 and reports["all_gather"].node_rows == 4


def reference(plan: PlacementPlan, trace: RoutingTrace) -> dict[str, float]:
    """Every definition once more, token by token, for plans without copies."""
    owner = plan.holds().argmax(2)
    node = [r // plan.topology.ranks_per_node for r in range(plan.ranks)]
    dispatch = leaving = pairs = apart = 0
    received = np.zeros((trace.layers, plan.ranks))
    load = np.zeros((trace.layers, plan.ranks))
    coherent = 0
    for t in range(trace.tokens):
        home = anchor = int(trace.sequence_ids[t]) % plan.ranks
        for layer in range(trace.layers):
            used = [int(e) for e in trace.expert_ids[t, layer] if e >= 0]
            ranks = {int(owner[layer, e]) for e in used}
            for e in used:
                load[layer, owner[layer, e]] += 1
            for rank in ranks - {home}:
                dispatch += 1
                received[layer, rank] += 1
                leaving += node[rank] != node[home]
            if layer > 0:
                before = [int(e) for e in trace.expert_ids[t, layer - 1] if e >= 0]
                pairs += len(before) * len(used)
                apart += sum(owner[layer - 1, a] != owner[layer, b] for a in before for b in used)
            mass = dict.fromkeys(sorted(ranks), 0.0)
            for slot, e in enumerate(trace.expert_ids[t, layer]):
                if e >= 0:
                    mass[int(owner[layer, e])] += (
                        1.0 if trace.router_weights is None else float(trace.router_weights[t, layer, slot])
                    )
            following = anchor if anchor in ranks or not ranks else max(mass, key=lambda r: (mass[r], -r))
            if layer > 0:
                coherent += len(ranks - {anchor}) + len(ranks - {following})
            anchor = following
    size = trace.tokens * trace.layers
    return {
        "dispatch": dispatch / size,
        "remote_rows": 2 * dispatch / size,
        "node_rows": 2 * leaving / size,
        "hops": apart / pairs if pairs else 0.0,
        "busiest_rank": float((received.max(1) / trace.tokens).mean()),
        "load": float((load.max(1) / load.mean(1)).mean()),
        "coherent": coherent / (trace.tokens * max(1, trace.layers - 1)),
    }


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    top_k=st.integers(1, 4),
    shape=st.sampled_from([(1, 2), (1, 4), (2, 2), (4, 1), (1, 8)]),
    weights=st.sampled_from(["none", "shares", "logits"]),
)
def test_evaluation_equals_counting_token_by_token(seed: int, top_k: int, shape, weights: str) -> None:
    trace = make_trace(tokens=40, top_k=top_k, seed=seed, sequences=5)
    rng = np.random.default_rng(seed)
    logits = rng.normal(-4, 1, trace.expert_ids.shape).astype(np.float16)
    if weights != "shares":
        trace = replace(trace, router_weights=logits if weights == "logits" else None)
    ranks = shape[0] * shape[1]
    assignment = np.array([rng.permutation(np.arange(8) % ranks) for _ in range(trace.layers)])
    plan = PlacementPlan(slots_from_assignment(assignment, ranks, 8 // ranks), 8, trace.layer_ids, Topology(*shape), "m")
    report = evaluate(plan, trace).to_json()
    for name, value in reference(plan, trace).items():
        assert report[name] == pytest.approx(value, abs=1e-12), name


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), ranks=st.sampled_from([2, 4, 8]))
def test_at_top_1_coherent_rows_are_the_hops(seed: int, ranks: int) -> None:
    trace = make_trace(tokens=60, top_k=1, seed=seed)
    report = evaluate(baseline_plan("round_robin", trace, Topology(1, ranks), "coherent"), trace)
    assert report.coherent == pytest.approx(report.hops)


def test_the_links_add_up_to_the_dispatch(trace) -> None:
    report = evaluate(baseline_plan("packed", trace, Topology(1, 4), "all_to_all"), trace)
    remote = report.rows * ~np.eye(4, dtype=bool)
    assert remote.sum((1, 2)).mean() == pytest.approx(report.dispatch)
    assert report.rank_load.sum() == (trace.expert_ids >= 0).sum()


def test_a_token_uses_the_copy_nearest_to_it() -> None:
    holds = np.zeros((3, 4), dtype=bool)
    holds[0, [0, 2]] = True  # a copy on each node of two ranks
    holds[1, 3] = True
    holds[2, [2, 3]] = True
    table = destinations(holds, Topology(2, 2))
    assert table[:, 0].tolist() == [0, 0, 2, 2]
    assert table[:, 1].tolist() == [3, 3, 3, 3]
    assert table[:, 2].tolist() == [2, 3, 2, 3]  # from afar the two copies take turns; at home each takes its own


def test_copies_reduce_hops_to_the_best_pair() -> None:
    trace = tiny_trace([[[0], [2]], [[1], [2]]], [0, 0])
    one = tiny_plan([[0, 1, 0, 1], [0, 1, 0, 1]])
    assert evaluate(one, trace).hops == 1 / 2
    slots = np.array([[0, 2, 3, 1, -1, -1], [0, 2, -1, 1, 3, 2]], dtype=np.int32)
    assert evaluate(replace(one, physical_to_logical=slots), trace).hops == 0


def test_load_statistics_give_the_load_alone() -> None:
    statistics = LoadStatistics(np.array([[[6, 2, 1, 1]]]), "m", (0,), ("x",))
    plan = tiny_plan([[0, 0, 1, 1]])
    assert evaluate_load(plan, statistics, 0).load == 8 / 5
    copies = replace(plan, physical_to_logical=np.array([[0, 1, -1, 2, 3, 0]], dtype=np.int32))
    assert evaluate_load(copies, statistics, 0).load == 1  # 3 + 2 against 1 + 1 + 3
    values = compare(plan, statistics)["plan"]
    assert values["load"] == 8 / 5 and values["hops"] is None


def test_baselines_place_every_expert_evenly() -> None:
    load = np.random.default_rng(0).random((3, 10))
    assert contiguous(load, 4)[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert round_robin(load, 4)[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    for place in BASELINES.values():
        assert all(np.bincount(row, minlength=4).max() <= 3 for row in place(load, 4))
    # Heaviest first to the lightest rank with a free slot: 8 and 7 open the ranks, 5 joins 7, 4 joins 8.
    assert packed(np.array([[8.0, 7.0, 5.0, 4.0]]), 2).tolist() == [[0, 1, 1, 0]]


def test_a_trace_of_another_model_is_refused(trace) -> None:
    plan = baseline_plan("packed", trace, Topology(1, 2), "all_to_all")
    with pytest.raises(InputError, match="model: the trace has 'm', the plan 'other'; expected a trace of the plan's model"):
        evaluate(replace(plan, model="other"), trace)
    with pytest.raises(InputError, match="layer_ids: the trace has"):
        evaluate(replace(plan, layer_ids=(1, 2, 3)), trace)
    assert isinstance(evaluate(plan, trace), CostReport)
    assert evaluate(replace(plan, model=""), trace).load == evaluate(plan, trace).load, "imported without a name"
