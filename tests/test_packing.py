"""Balance, limits, memory and copies beside brute force: what a rank may hold, and what copies are worth."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from brute_force import allowed, copied_choices, every_home, layer_choices, plan_of, problems
from conftest import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.placement import balance, copies, limits
from coterie.placement.capacity import memory_limit, whole_experts
from coterie.placement.cost import carried, destinations, evaluate, evaluate_load, hops
from coterie.placement.deadline import Deadline
from coterie.placement.plan import holders, slots_from_holders
from coterie.placement.planner import PlanRequest, plan
from coterie.placement.problem import Limit, Problem, one_hot
from coterie.placement.topology import Topology
from coterie.routing.affinity import expert_load, measure
from coterie.routing.errors import InputError
from coterie.routing.trace import LoadStatistics, RoutingTrace

SEEDS = st.integers(0, 10_000)
LATER = 60.0


def loads_of(seed: int, scenarios: int, layers: int, experts: int) -> np.ndarray:
    """Uneven loads; sometimes an expert, or all of a layer, has none."""
    rng = np.random.default_rng(seed)
    loads = rng.integers(0, 12, (scenarios, layers, experts)).astype(float) ** 2
    return loads * (rng.random((scenarios, layers, 1)) > 0.1)


def value(slots: np.ndarray, loads: np.ndarray, worst: bool) -> float:
    """Busiest over mean, averaged over layers, then the worst or the mean of the scenarios."""
    by_scenario = [float(balance.peaks(slots, load).mean()) for load in loads]
    return max(by_scenario) if worst else float(np.mean(by_scenario))


# --- load ---


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, shape=st.sampled_from([(2, 4, 2), (2, 4, 3), (3, 3, 2), (2, 5, 3), (3, 4, 2)]),
       scenarios=st.integers(1, 2), worst=st.booleans())  # fmt: skip
def test_balance_comes_close_to_the_evenest_of_all_placements_with_copies(seed, shape, scenarios, worst) -> None:
    ranks, experts, slots = shape
    loads = loads_of(seed, scenarios, 1, experts)
    found, _ = balance.search(loads, ranks, slots, seed, 30, Deadline(LATER), worst)
    reached = value(found, loads, worst)
    best = min(value(as_slots(h, slots), loads, worst) for h in copied_choices(experts, ranks, slots))
    assert best - 1e-9 <= reached <= best * 1.25
    check_slots(found, experts, np.full((1, ranks), slots))


def as_slots(holds: np.ndarray, slots: int) -> np.ndarray:
    return slots_from_holders(holds[None], slots).reshape(1, holds.shape[1], slots).astype(np.int64)


def check_slots(found: np.ndarray, experts: int, room: np.ndarray) -> None:
    """Every expert at least once, never twice on one rank, no rank beyond its room."""
    assert ((found >= 0).sum(2) <= room).all()
    for layer in found:
        for rank in layer:
            used = rank[rank >= 0].tolist()
            assert len(used) == len(set(used))
        assert set(layer[layer >= 0].tolist()) == set(range(experts))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, shape=st.sampled_from([(2, 6, 5), (3, 7, 4), (4, 8, 4)]), layers=st.integers(1, 2))
def test_balance_keeps_to_the_room_of_every_rank(seed, shape, layers) -> None:
    ranks, experts, slots = shape
    room = np.random.default_rng(seed).integers(0, slots + 1, (layers, ranks))
    room[room.sum(1) < experts] = slots
    loads = loads_of(seed, 1, layers, experts)
    found, _ = balance.search(loads, ranks, slots, seed, 4, Deadline(LATER), False, room=room)
    check_slots(found, experts, room)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, worst=st.booleans())
def test_the_value_of_a_balance_is_what_load_statistics_are_evaluated_to(seed, worst) -> None:
    loads = loads_of(seed, 2, 2, 6)
    found, made = balance.search(loads, 3, 3, seed, 3, Deadline(LATER), worst)
    statistics = LoadStatistics(loads.astype(np.int64), "m", (0, 1), ("a", "b"))
    plan = plan_of(holders(found, 6, 3), make_trace(tokens=4, layers=2, experts=6), Topology(1, 3), 3)
    values = [evaluate_load(plan, statistics, s).load for s in range(2)]
    assert value(found, loads, worst) == pytest.approx(max(values) if worst else np.mean(values))
    assert made <= 3


def test_more_iterations_are_never_worse_and_an_even_load_ends_at_once() -> None:
    loads = loads_of(5, 2, 3, 12) + 1
    values = [value(balance.search(loads, 4, 4, 0, n, Deadline(LATER), True)[0], loads, True) for n in (0, 1, 8)]
    assert values == sorted(values, reverse=True)
    assert balance.search(np.ones((1, 2, 8)), 4, 2, 0, 50, Deadline(LATER), False)[1] == 1


# --- limits ---


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, shape=st.sampled_from([(2, 4, 2), (3, 6, 2), (2, 5, 3), (4, 8, 2)]))
def test_the_default_cap_can_be_kept_and_a_start_keeps_it(seed, shape) -> None:
    ranks, experts, slots = shape
    loads = loads_of(seed, 1, 3, experts)
    limit = limits.load_limits(list(loads), ranks, slots, None)
    problem = Problem(3, experts, ranks, slots, 1.0, limit, transitions=np.zeros((2, experts, experts)))
    assert problem.padded().feasible(limits.start(problem.padded()))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, shape=st.sampled_from([(2, 4, 2), (4, 8, 2), (2, 5, 3)]))
def test_the_default_caps_of_several_scenarios_can_be_kept_together(seed, shape) -> None:
    ranks, experts, slots = shape
    several = limits.load_limits(list(loads_of(seed, 3, 2, experts)), ranks, slots, None)
    problem = Problem(2, experts, ranks, slots, 1.0, several).padded()
    assert problem.feasible(limits.start(problem))


def test_a_cap_that_packing_cannot_reach_says_what_it_does() -> None:
    load = np.array([[9.0, 1.0, 1.0, 1.0]])
    assert limits.balanced_peak(load[0], 2, 2) == 10
    with pytest.raises(
        InputError, match=r"--max-load: found 1\.5, but the evenest packing found of one layer, without copies, has 1\.6667"
    ):
        limits.load_caps(load, 2, 2, 1.5)
    assert limits.load_caps(load, 2, 2, 1.7) == pytest.approx(10.2)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_mending_never_adds_excess(seed) -> None:
    rng = np.random.default_rng(seed)
    weights, here = rng.integers(1, 9, (2, 6)).astype(float), rng.permuted(np.arange(6) % 3)
    caps = rng.integers(5, 14, (2, 3)).astype(float)
    excess = lambda a: sum(  # noqa: E731
        np.maximum(0, np.bincount(a, weights=w, minlength=3) / c - 1 - 1e-9).sum() for w, c in zip(weights, caps, strict=True)
    )
    before, count = excess(here), np.bincount(here)
    after = limits.mend(here, weights, caps)
    assert after == pytest.approx(excess(here)) and after <= before + 1e-12
    assert (np.bincount(here) == count).all()


def test_a_start_finds_room_where_a_rank_has_none_at_all() -> None:
    limit = Limit(np.full((1, 4), 1e9), np.array([[0.0, 2e9, 2e9]]))
    problem = Problem(1, 4, 3, 4, 1.0, (limit,), transitions=np.zeros((0, 4, 4))).padded()
    assert problem.feasible(limits.start(problem))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_feasible_means_what_it_says(seed) -> None:
    problem = problems(seed, 3, 5, 2, 1, 2, None)["hops"]
    kept = {tuple(row) for row in allowed(problem, 0).tolist()}
    for row in product(range(3), repeat=5):
        assert problem.feasible(np.array([row])) == (row in kept)


# --- memory ---


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, layers=st.integers(1, 6), ranks=st.integers(1, 8), experts=st.integers(1, 8), equal=st.booleans())
def test_memory_is_shared_out_in_whole_experts(seed, layers, ranks, experts, equal) -> None:
    rng = np.random.default_rng(seed)
    size = np.full(layers, 4.0) if equal else rng.integers(1, 6, layers).astype(float)
    memory = rng.integers(1, int(1.5 * size.sum() * experts / ranks) + 2, ranks).astype(float)
    slots = int(rng.integers(-(-experts // ranks), experts + 1))
    room = whole_experts(size, memory, slots, experts)
    assert (room >= 0).all() and (room <= slots).all()
    assert ((room * size[:, None]).sum(0) <= memory + 1e-9).all()
    fits = np.minimum(np.floor(memory / 4), layers * slots).sum() >= layers * experts
    if equal and fits:
        assert (room.sum(1) >= experts).all()


def test_memory_that_suffices_to_the_last_expert_is_enough() -> None:
    room = whole_experts(np.ones(6), np.full(8, 3.0), 2, 4)
    assert (room.sum(1) >= 4).all() and (room.sum(0) <= 3).all()


def test_memory_that_does_not_suffice_is_told_in_bytes() -> None:
    small = replace(Topology(1, 2), expert_bytes=10.0, memory_bytes=(30.0, 25.0))
    with pytest.raises(InputError, match="the experts need 80 bytes in all, the ranks hold 55: 30 bytes of experts have no"):
        memory_limit(small, 2, 4, 4)
    with pytest.raises(InputError, match="expert_bytes: found 3 entries, expected 2"):
        memory_limit(replace(small, expert_bytes=(1.0, 1.0, 1.0)), 2, 4, 4)


def test_memory_limits_nothing_where_all_slots_fit_or_sizes_are_unknown() -> None:
    assert memory_limit(Topology(1, 2), 2, 4, 2) is None
    assert memory_limit(replace(Topology(1, 2), expert_bytes=10.0, memory_bytes=40.0), 2, 4, 2) is None
    limit = memory_limit(replace(Topology(1, 2), expert_bytes=10.0, memory_bytes=(30.0, 60.0)), 2, 4, 3)
    assert limit is not None and (limit.caps == [[10, 30], [20, 30]]).all()


# --- copies ---


def base_of(seed: int, layers: int, experts: int, ranks: int) -> np.ndarray:
    """A random placement with at most ceil(E / ranks) experts on a rank."""
    ways = layer_choices(experts, ranks, -(-experts // ranks))
    return ways[np.random.default_rng(seed).integers(len(ways), size=layers)]


def anything(layer: int, holds: np.ndarray) -> bool:
    return True


def rows_filled(patterns, before: np.ndarray, slots, topology: Topology, cost, allowed=anything) -> np.ndarray:
    """`copies.for_rows` of one scenario, with time."""
    return copies.for_rows([patterns], [1.0], [1.0], before, slots, topology, cost, allowed, Deadline(LATER))


def check_copies(before: np.ndarray, after: np.ndarray, slots: int) -> None:
    assert (after >= before).all() and after.sum(1).max() <= slots


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, shape=st.sampled_from([(2, 6, 4), (3, 6, 3), (4, 6, 3)]), layers=st.integers(1, 4), top_k=st.integers(1, 3))
def test_copies_never_add_hops_and_their_gains_are_as_predicted(seed, shape, layers, top_k) -> None:
    ranks, experts, slots = shape
    trace = make_trace(tokens=60, layers=layers, experts=experts, top_k=top_k, seed=seed)
    pairs, before = measure(trace).transitions, copies.held(base_of(seed, layers, experts, ranks), ranks)
    filled = copies.for_hops(pairs, before, slots, anything, Deadline(LATER))
    check_copies(before, filled, slots)
    assert hops(trace, filled) <= hops(trace, before)
    for layer in range(layers):
        gain = copies._hop_gains(pairs, before, layer)
        for expert, rank in np.argwhere(~before[layer]):
            one = before.copy()
            one[layer, expert, rank] = True
            saved = (hops(trace, before) - hops(trace, one)) * pairs.sum()
            assert gain[expert, rank] == pytest.approx(saved, abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, topology=st.sampled_from([Topology(1, 2), Topology(1, 4), Topology(2, 2)]), top_k=st.integers(1, 3))
def test_copies_never_add_rows_where_homes_are_equally_likely(seed, topology, top_k) -> None:
    ranks, slots = topology.ranks, -(-6 // topology.ranks) + 1
    trace = every_home(make_trace(tokens=40, layers=2, experts=6, top_k=top_k, seed=seed), ranks)
    before = copies.held(base_of(seed, 2, 6, ranks), ranks)
    cost = lambda layer, sent, entered, pairs, touched: float(sent.sum())  # noqa: E731
    filled = rows_filled(measure(trace).patterns, before, slots, topology, cost)
    check_copies(before, filled, slots)
    now, then = (evaluate(plan_of(h, trace, topology, slots), trace) for h in (filled, before))
    assert now.dispatch <= then.dispatch + 1e-9
    assert predicted_rows(trace, filled, topology) == pytest.approx(now.dispatch)


def predicted_rows(trace, holds: np.ndarray, topology: Topology) -> float:
    """What `for_rows` believes the rows to be."""
    found, total = measure(trace), 0.0
    for layer, patterns in enumerate(found.patterns):
        traffic = copies._Traffic.mixed([patterns], [1.0], [1.0], topology)
        total += traffic.of(holds[layer])[0].sum()
    return total / len(found.patterns)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, ranks=st.sampled_from([2, 3]), top_k=st.integers(1, 3))
def test_the_rows_that_a_copy_saves_at_home_are_as_predicted(seed, ranks, top_k) -> None:
    topology = Topology(1, ranks)
    trace = every_home(make_trace(tokens=40, layers=1, experts=6, top_k=top_k, seed=seed), ranks)
    patterns, before = measure(trace).patterns[0], one_hot(base_of(seed, 1, 6, ranks)[0], ranks).astype(bool)
    traffic = copies._Traffic.mixed([patterns], [1.0], [1.0], topology)
    sent, *_ = traffic.of(before)
    for rank in range(ranks):
        gain = copies._row_gains(traffic, before, rank)
        for expert in np.flatnonzero(~before[:, rank]):
            one = before.copy()
            one[expert, rank] = True
            assert gain[expert] == pytest.approx((sent - traffic.of(one)[0])[rank].sum(), abs=1e-9)


def test_copies_keep_to_the_room_of_every_rank() -> None:
    room = np.array([[3, 4], [4, 3]])
    trace = make_trace(tokens=60, layers=2, experts=6, top_k=1)
    before, found = copies.held(base_of(0, 2, 6, 2), 2), measure(trace)
    rows = lambda layer, sent, entered, pairs, touched: float(sent.sum())  # noqa: E731
    for filled in (
        copies.for_hops(found.transitions, before, room, anything, Deadline(LATER)),
        rows_filled(found.patterns, before, room, Topology(1, 2), rows),
    ):
        assert (filled.sum(1) <= room).all() and filled.sum() > before.sum()


def test_the_hottest_expert_is_copied_first() -> None:
    trace = make_trace(tokens=200, layers=1, experts=4, top_k=1)
    ids = np.where(np.random.default_rng(0).random((200, 1, 1)) < 0.7, 0, trace.expert_ids).astype(np.int16)
    trace = every_home(replace(trace, expert_ids=ids, router_weights=None), 2)
    before = copies.held(np.array([[0, 0, 1, 1]]), 2)
    rows = lambda layer, sent, entered, pairs, touched: float(sent.sum())  # noqa: E731
    filled = rows_filled(measure(trace).patterns, before, 3, Topology(1, 2), rows)
    assert np.argwhere(filled & ~before).tolist()[0][1:] == [0, 1]


def groups_of_eight(tokens: int = 400, groups: int = 8) -> RoutingTrace:
    """Two layers of 16 experts in couples that are always picked together; every rank is some sequence's home."""
    rng = np.random.default_rng(0)
    ids = np.stack([np.stack([2 * g, 2 * g + 1], 1) for g in rng.integers(0, groups, (2, tokens))], axis=1).astype(np.int16)
    return every_home(replace(make_trace(tokens=tokens, layers=2, experts=16), expert_ids=ids, router_weights=None), 4)


def test_experts_on_the_same_ranks_are_sent_to_the_same_copy_from_every_rank() -> None:
    holds = np.random.default_rng(0).random((12, 8)) < 0.4
    holds[:, 0] |= ~holds.any(1)
    holds[6:] = holds[:6]
    table = destinations(holds, Topology(2, 4))
    assert (table[:, :6] == table[:, 6:]).all()
    assert holds[np.arange(12)[None], table].all()
    served = np.array([np.bincount(column, minlength=8) for column in destinations(holds[:6], Topology(1, 8)).T])
    assert all(np.ptp(served[expert][holds[expert]]) <= 1 for expert in range(6))


def test_what_a_rank_carries_is_what_the_dispatcher_sends_it() -> None:
    trace = every_home(make_trace(tokens=60, layers=1, experts=6, seed=3), 4)
    holds = copies.held(base_of(1, 1, 6, 4), 4) | (np.random.default_rng(1).random((1, 6, 4)) < 0.4)
    rank_load = evaluate(plan_of(holds, trace, Topology(2, 2), 6), trace).rank_load
    np.testing.assert_allclose(carried(holds[0], expert_load(trace)[0], Topology(2, 2)), rank_load[0])


@pytest.mark.parametrize(("topology", "strategy"), [(Topology(1, 4), "all_to_all"), (Topology(2, 2), "hierarchical")])
def test_room_for_all_experts_twice_is_used_as_two_plans_side_by_side(topology, strategy) -> None:
    """A token's couple is then on its rank or on one of the other half, so that it pays at most one row, half of the time."""
    trace = groups_of_eight()
    asked = dict(objective="dispatch", max_load=1.3, time_limit=6, iterations=3)
    half = plan(trace, PlanRequest(Topology(1, 2), **asked))
    made = plan(trace, PlanRequest(topology, strategy, slots_per_rank=8, **asked))
    assert half.objective.value == pytest.approx(0.5, abs=0.05)
    assert made.objective.value <= half.objective.value + 0.02
    if topology.nodes == 2:
        assert evaluate(made, trace).node_rows == 0


def test_room_for_a_part_of_the_experts_twice_takes_away_the_least_loaded_copies() -> None:
    trace = groups_of_eight()
    patterns = measure(trace).patterns
    doubled = np.tile(copies.held(np.tile(np.arange(16) // 8, (2, 1)), 2), 2)
    rows = lambda layer, sent, entered, pairs, touched: float(sent.sum())  # noqa: E731
    thinned = rows_filled(patterns, doubled, 6, Topology(1, 4), rows)
    assert (thinned.sum(1) == 6).all() and (thinned <= doubled).all() and thinned.any(2).all()
    for layer, load in enumerate(expert_load(trace)):
        once = thinned[layer].sum(1) == 1
        assert load[once].mean() < load[~once].mean()


@pytest.mark.parametrize("kind", ["hops", "rows"])
def test_copies_are_made_one_by_one_as_far_as_the_limits_let_them(kind) -> None:
    """Not given up for a whole layer because one of them breaks a limit."""
    trace = every_home(make_trace(tokens=60, layers=3, experts=6), 2)
    before, found = copies.held(base_of(0, 3, 6, 2), 2), measure(trace)
    asked = []

    def at_most_one(layer: int, holds: np.ndarray) -> bool:
        asked.append(layer)
        return bool(holds.sum() <= 7)

    rows = lambda layer, sent, entered, pairs, touched: float(sent.sum())  # noqa: E731
    if kind == "hops":
        filled = copies.for_hops(found.transitions, before, 6, at_most_one, Deadline(LATER))
    else:
        filled = rows_filled(found.patterns, before, 6, Topology(1, 2), rows, at_most_one)
    assert filled.sum((1, 2)).tolist() == [7, 7, 7] and set(asked) == {0, 1, 2}


def test_copies_end_with_the_time() -> None:
    trace = make_trace(tokens=60, layers=3, experts=6)
    before, found = copies.held(base_of(0, 3, 6, 2), 2), measure(trace)
    rows = lambda layer, sent, entered, pairs, touched: float(sent.sum())  # noqa: E731
    late = Deadline(0.0)
    assert (copies.for_hops(found.transitions, before, 6, anything, late) == before).all()
    one = [1.0]
    assert (copies.for_rows([found.patterns], one, one, before, 6, Topology(1, 2), rows, anything, late) == before).all()


def test_a_mean_over_recordings_counts_each_the_same_whatever_its_length(monkeypatch) -> None:
    """Parts of a long trace, which stand for other text of its kind, do not outvote load statistics."""
    long = make_trace(tokens=1200, layers=2, experts=8, seed=0)
    other = LoadStatistics(np.arange(16).reshape(1, 2, 8) + 1, long.model, long.layer_ids, ("other",))
    counted, search = [], balance.search

    def watched(loads, *args, weights, **named):
        counted.append(([float(w) for w in weights], [bool((load == other.expert_load[0]).all()) for load in loads]))
        return search(loads, *args, weights=weights, **named)

    monkeypatch.setattr(balance, "search", watched)
    plan([long, other], PlanRequest(Topology(1, 4), objective="load", time_limit=5, iterations=2))
    (weights, is_other), *_ = counted
    assert len(weights) == 18 and sum(weights) == pytest.approx(1)
    assert sum(w for w, theirs in zip(weights, is_other, strict=True) if theirs) == pytest.approx(0.5)


def test_the_evenest_mean_goes_by_the_weights() -> None:
    loads = np.array([[[8.0, 1, 1, 8]], [[8.0, 8, 1, 1]]])
    for weights, best in (([0.9, 0.1], 0), ([0.1, 0.9], 1)):
        found, _ = balance.search(loads, 2, 2, 0, 4, Deadline(LATER), False, weights=np.array(weights))
        assert value(found, loads[best : best + 1], False) == pytest.approx(1)
