"""The searches beside plain references: chains of layers, tabu search on patterns, the exact solvers, time, anchors, nodes."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
from brute_force import allowed, every_home, layer_choices, optimum, plan_of, problems
from conftest import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.placement import anchors, chain, copies, exact, ilp, local, nodes, rows, solve, starts
from coterie.placement.copies import held
from coterie.placement.cost import coherent_rows, evaluate, homes_of, hops
from coterie.placement.deadline import Deadline
from coterie.placement.planner import PlanRequest, plan
from coterie.placement.problem import Limit, Problem, dispatch_problem, hops_problem, one_hot
from coterie.placement.recombine import Pool, recombined
from coterie.placement.rows import TimeScore
from coterie.placement.scenarios import gathered
from coterie.placement.spread import Child
from coterie.placement.task import Task
from coterie.placement.timing import TIE, LayerTime
from coterie.placement.topology import Link, Topology
from coterie.placement.traffic import Traffic
from coterie.routing import synth
from coterie.routing.affinity import measure

SEEDS = st.integers(0, 10_000)
LATER = 60.0


def anywhere(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """A random placement with every slot used."""
    return rng.permuted(np.tile(np.arange(problem.experts) % problem.ranks, (problem.layers, 1)), axis=1)


def random_chain(rng: np.random.Generator, layers: int, experts: int, ranks: int, limits: tuple[Limit, ...] = ()) -> Problem:
    pairs = rng.integers(0, 20, (layers - 1, experts, experts)).astype(float)
    return Problem(layers, experts, ranks, experts // ranks, 1 / pairs.sum(), limits, transitions=pairs, integral=True)


# --- chains of layers ---


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, ranks=st.sampled_from([2, 3]), layers=st.integers(2, 4), listed=st.booleans())
def test_gains_are_what_an_expert_keeps_together(seed, ranks, layers, listed) -> None:
    rng = np.random.default_rng(seed)
    problem = random_chain(rng, layers, 6, ranks)
    here, pairs = anywhere(problem, rng), problem.transitions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coterie.placement.traffic.DENSE", 0 if listed else 1e9)
        traffic = Traffic(problem)
    assert traffic.listed == listed
    kept = traffic.gains(here, np.arange(layers))
    assert traffic.cost(here) == problem.cost(here)
    assert (traffic.gains(here, np.array([1])) == kept[[1]]).all()
    for layer, expert, rank in product(range(layers), range(6), range(ranks)):
        before = pairs[layer - 1][here[layer - 1] == rank, expert].sum() if layer else 0
        after = pairs[layer][expert, here[layer + 1] == rank].sum() if layer < layers - 1 else 0
        assert kept[layer, expert, rank] == before + after


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, shape=st.sampled_from([(2, 4), (3, 6), (2, 6), (4, 4)]))
def test_transport_is_the_best_layer_given_its_neighbours(seed, shape) -> None:
    ranks, experts = shape
    kept = np.random.default_rng(seed).integers(0, 9, (experts, ranks)).astype(float)
    found = starts.transport(kept, experts // ranks)
    value = lambda row: kept[np.arange(experts), row].sum()  # noqa: E731
    assert (np.bincount(found, minlength=ranks) == experts // ranks).all()
    assert value(found) == max(value(row) for row in layer_choices(experts, ranks, experts // ranks))


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, capped=st.booleans())
def test_polish_never_makes_it_worse_and_annealing_keeps_the_limits(seed, capped) -> None:
    rng = np.random.default_rng(seed)
    limit = Limit(rng.integers(1, 9, (3, 6)).astype(float), np.full((3, 3), np.inf))
    problem = random_chain(rng, 3, 6, 3)
    begin = anywhere(problem, rng)
    loads = np.stack([np.bincount(row, weights=w, minlength=3) for row, w in zip(begin, limit.weights, strict=True)])
    if capped:
        problem = replace(problem, limits=(replace(limit, caps=np.tile(loads.max(1, keepdims=True), (1, 3))),))
    polished = chain.polish(Traffic(problem), begin, Deadline(LATER))
    assert problem.feasible(polished) and problem.cost(polished) <= problem.cost(begin)
    assert problem.feasible(chain.anneal(Traffic(problem), begin, rng, chain.HOT, 1500, Deadline(0.05)))


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, members=st.integers(1, 3), layers=st.integers(2, 3))
def test_recombined_is_the_best_of_all_renamed_layers_of_the_pool(seed, members, layers) -> None:
    rng = np.random.default_rng(seed)
    problem = random_chain(rng, layers, 6, 3)
    pool = [anywhere(problem, rng) for _ in range(members)]
    names = [np.array(order) for order in permutations(range(3))]
    ways = [[name[member[layer]] for member in pool for name in names] for layer in range(layers)]
    best = min(problem.cost(np.stack(rows)) for rows in product(*ways))
    found = recombined(problem, pool)
    assert problem.cost(found) == best <= min(problem.cost(member) for member in pool)
    kept = Pool(Traffic(problem))
    for members in (pool, [*pool[1:], anywhere(problem, rng), pool[0]]):  # the second time with what it has kept
        assert problem.cost(kept.best(members)) == problem.cost(recombined(problem, members))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, size=st.integers(1, 5), groups=st.integers(1, 4))
def test_groups_have_exactly_the_size_asked_for(seed, size, groups) -> None:
    near = np.random.default_rng(seed).random((size * groups, size * groups))
    assert (np.bincount(starts.groups_of(near + near.T, size)) == size).all()


def test_planted_groups_are_found_at_once(monkeypatch) -> None:
    rng = np.random.default_rng(2)
    group = rng.permutation(np.arange(12) % 3)
    found = starts.groups_of(np.where(group[:, None] == group[None], 5.0, 1.0) + rng.random((12, 12)) / 10, 4)
    assert len(set(zip(group.tolist(), found.tolist(), strict=True))) == 3
    rows = np.stack([rng.permuted(group) for _ in range(5)])
    pairs = np.where(rows[:-1, :, None] == rows[1:, None], 10.0, 0.0)
    problem = Problem(5, 12, 3, 4, 1.0, transitions=pairs)
    assert problem.cost(starts.grown(problem)) == 0
    monkeypatch.delattr(chain, "coupled")  # what is at its target already needs no other start
    assert problem.cost(chain.search(problem, 0, None, Deadline(LATER))[0]) == 0


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, layers=st.integers(3, 6), first=st.sampled_from([0, 1]))
def test_couples_are_layers_that_are_best_given_each_other(seed, layers, first) -> None:
    problem = random_chain(np.random.default_rng(seed), layers, 6, 3)
    found = starts.coupled(problem, first)
    assert (one_hot(found, 3).sum(1) == 2).all()
    kept = [float((pairs * (found[i][:, None] == found[i + 1])).sum()) for i, pairs in enumerate(problem.transitions)]
    partner = {0: 1} if first == 1 else {}  # a layer without a partner follows its neighbour
    partner |= {layer + 1: layer for layer in range(first, layers - 1, 2)}
    partner |= {layers - 1: layers - 2}
    for layer, other in partner.items():
        pair = min(layer, other)
        pairs = problem.transitions[pair] if layer == pair else problem.transitions[pair].T
        best = max((pairs * (row[:, None] == found[other])).sum() for row in layer_choices(6, 3, 2))
        assert kept[pair] == best


@pytest.mark.parametrize("layers", [6, 7])
def test_a_chain_whose_layers_are_at_odds_starts_from_couples(layers) -> None:
    """Every layer's groups towards the one before are not those towards the next: all of it cannot be kept together."""
    trace = synth.make("misaligned", 4000, layers, 32, 1, seed=5, groups=8)
    problem = hops_problem([s.transitions for s in gathered([trace])], [1.0], 8, 4, ())
    incoming, outgoing = synth.misaligned_groups(layers, 32, 8, seed=5)
    planted = [np.stack([(outgoing, incoming)[(layer + first) % 2][layer] for layer in range(layers)]) for first in (0, 1)]
    aligned = min(problem.cost(recombined(problem, [rows])) for rows in planted)
    found, made = chain.search(problem, 0, 0, Deadline(LATER))
    alone = chain.polish(Traffic(problem), starts.grown(problem), Deadline(LATER))
    assert made == 0 and problem.cost(found) <= aligned and problem.cost(found) < problem.cost(alone)


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, cap=st.sampled_from([100.0, None]), shape=st.sampled_from([(2, 4, 2), (3, 5, 2), (3, 6, 2)]))
def test_the_chain_search_comes_to_the_optimum_of_small_chains(seed, cap, shape) -> None:
    problem = problems(seed, *shape, 3, 2, cap)["hops"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "SWEEPS", (40, 100))
        found, made = chain.search(problem, seed, 6, Deadline(LATER), target=optimum(problem))
    assert problem.feasible(found) and made <= 6
    assert problem.cost(found) >= optimum(problem) - 1e-9
    if cap == 100.0:
        assert problem.cost(found) == pytest.approx(optimum(problem))


def test_a_chain_too_large_for_anneals_from_scratch_is_searched_the_same_way_again(monkeypatch) -> None:
    monkeypatch.setattr(chain, "LONG", 10**9)
    monkeypatch.setattr(chain, "SWEEPS", (5, 5))
    problem = random_chain(np.random.default_rng(3), 6, 12, 3)
    (found, made), (again, _) = (chain.search(problem, 1, 20, Deadline(LATER)) for _ in range(2))
    assert made == 20 and (found == again).all() and problem.feasible(found)
    assert problem.cost(found) <= problem.cost(chain.polish(Traffic(problem), starts.grown(problem), Deadline(LATER)))


@pytest.mark.parametrize(("spoils", "direction"), [(True, -1), (False, 1)])
def test_the_temperature_of_a_large_chain_follows_what_anneals_make_of_it(spoils, direction, monkeypatch) -> None:
    heard: list[float] = []

    def anneal(traffic: Traffic, begin: np.ndarray, rng: Any, hot: float, steps: int, deadline: Deadline) -> np.ndarray:
        heard.append(hot)
        return anywhere(problem, rng) if spoils else begin.copy()

    problem = planted_chain(np.random.default_rng(2), 6, 12, 3)
    for name, value in {"LONG": 10**9, "anneal": anneal, "FAR": 10**9}.items():
        monkeypatch.setattr(chain, name, value)
    monkeypatch.setattr(chain, "polish", lambda traffic, assignment, deadline: assignment)
    chain.search(problem, 0, 8, Deadline(LATER), target=-1.0)
    assert len(heard) == 8 and (direction * np.diff(heard) > 0).all()


def planted_chain(rng: np.random.Generator, layers: int, experts: int, ranks: int) -> Problem:
    """Groups that send 9 within and 1 to each of the others."""
    group = np.stack([rng.permutation(np.arange(experts) % ranks) for _ in range(layers)])
    pairs = np.where(group[:-1, :, None] == group[1:, None, :], 9.0, 1.0)
    return Problem(layers, experts, ranks, experts // ranks, 1 / pairs.sum(), transitions=pairs, integral=True)


def test_searches_count_their_iterations() -> None:
    found = problems(3, 3, 6, 2, 3, 2)
    for made in (0, 1, 2):
        assert chain.search(found["hops"], 0, made, Deadline(LATER))[1] == made
        assert local.search(found["homes known"], 0, made, Deadline(LATER))[1] == made
    assert chain.search(found["hops"], 0, None, Deadline(0.0))[1] == 0


# --- exact solvers ---


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, shape=st.sampled_from([(2, 4, 2), (2, 5, 3), (3, 4, 2), (4, 4, 1)]), layers=st.integers(1, 2),
       top_k=st.integers(1, 3), cap=st.sampled_from([100.0, None]))  # fmt: skip
def test_the_integer_program_finds_and_proves_the_optimum(seed, shape, layers, top_k, cap) -> None:
    for name, problem in problems(seed, *shape, layers, top_k, cap).items():
        start = np.stack([allowed(problem, layer)[0] for layer in range(layers)])
        proof = ilp.solve(problem, start, Deadline(LATER))
        found = start if proof.assignment is None else proof.assignment
        assert problem.feasible(found)
        assert problem.cost(found) == pytest.approx(optimum(problem)), name
        assert proof.lower_bound == pytest.approx(optimum(problem), abs=1e-5), name


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, ranks=st.sampled_from([2, 3]), layers=st.integers(1, 3), cap=st.sampled_from([100.0, None]))
def test_dynamic_programming_equals_brute_force(seed, ranks, layers, cap) -> None:
    problem = problems(seed, ranks, {2: 4, 3: 6}[ranks], 2, layers, 2, cap)["hops"]
    best = exact.solve(problem, Deadline(LATER))
    assert exact.fits(problem)
    if best is None:
        assert optimum(problem) == np.inf
    else:
        assert problem.feasible(best) and problem.cost(best) == optimum(problem)


def test_dynamic_programming_lists_every_partition_once() -> None:
    found = exact.partitions_of(8, 4)
    sets = {frozenset(frozenset(np.flatnonzero(row == g).tolist()) for g in range(4)) for row in found}
    assert len(found) == len(sets) == 105
    assert len(exact.partitions_of(16, 2)) == 6435


def test_dynamic_programming_says_what_it_cannot_do() -> None:
    found = problems(1, 2, 4, 2, 2, 2, None)
    problem, limit = found["hops"], found["hops"].limits[0]
    assert exact.solve(replace(problem, limits=(replace(limit, caps=limit.caps * 0),)), Deadline(LATER)) is None
    assert exact.solve(problem, Deadline(0)) is None
    assert not exact.fits(replace(problem, slots=3)) and not exact.fits(found["homes known"])
    assert not exact.fits(replace(problem, limits=(replace(limit, caps=limit.caps * [[1, 2]]),)))


# --- tabu search on patterns ---


def tables_agree(layer: local.Layer, fresh: local.Layer) -> None:
    swapped = layer.here[:, None] != layer.here[None, :]
    for name in ("joining", "freed", "rows", "count"):
        np.testing.assert_allclose(getattr(layer, name), getattr(fresh, name), atol=1e-3, err_msg=name)
    np.testing.assert_allclose(layer.changes()[swapped], fresh.changes()[swapped], atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, ranks=st.sampled_from([2, 3, 4]), top_k=st.integers(1, 4), known=st.booleans())
def test_tables_after_swaps_equal_tables_made_anew(seed, ranks, top_k, known) -> None:
    rng = np.random.default_rng(seed)
    problem = problems(seed, ranks, 8, 8, 1, top_k)["homes known" if known else "homes unknown"]
    members, prices = problem.members[0], problem.prices[0]
    layer = local.Layer(members, prices, rng.integers(0, ranks, 8))
    for _ in range(12):
        e, f = rng.integers(0, 8, 2)
        if layer.here[e] != layer.here[f]:
            layer.swap(e, f)
    tables_agree(layer, local.Layer(members, prices, layer.here))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, ranks=st.sampled_from([2, 3]), top_k=st.integers(1, 4))
def test_changes_are_what_every_swap_changes_the_rows_by(seed, ranks, top_k) -> None:
    rng = np.random.default_rng(seed)
    for name, problem in problems(seed, ranks, 6, 6, 1, top_k).items():
        if name != "hops":
            here = rng.integers(0, ranks, 6)
            layer = local.Layer(problem.members[0], problem.prices[0], here)
            change = layer.changes()
            for e, f in product(range(6), repeat=2):
                if here[e] != here[f]:
                    after = here.copy()
                    after[[e, f]] = here[[f, e]]
                    delta = rows_of(problem, after) - rows_of(problem, here)
                    assert change[e, f] == pytest.approx(delta[here[e]], abs=1e-3)
                    assert change[e, f] + change[f, e] == pytest.approx(delta.sum(), abs=1e-3)


def rows_of(problem: Problem, here: np.ndarray) -> np.ndarray:
    hosts = problem.members[0].astype(int) @ one_hot(here, problem.ranks) > 0
    return (problem.prices[0] * hosts).sum(0)


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, shape=st.sampled_from([(2, 4, 2), (3, 6, 2), (2, 5, 3)]), cap=st.sampled_from([100.0, None]))
def test_the_local_search_keeps_limits_and_never_ends_worse_than_it_began(seed, shape, cap) -> None:
    for name, problem in problems(seed, *shape, 2, 2, cap).items():
        if name != "hops":
            begin = np.stack([allowed(problem, layer)[-1] for layer in range(2)])
            found, _ = local.search(problem, seed, 3, Deadline(LATER), begin=begin)
            assert problem.feasible(found)
            assert optimum(problem) - 1e-6 <= problem.cost(found) <= problem.cost(begin) + 1e-6
            if cap == 100.0:
                assert problem.cost(found) <= 1.1 * optimum(problem), name


def task_of(trace, topology: Topology, slots: int, **request) -> Task:
    deadline = Deadline(request.pop("seconds", LATER))
    return Task(PlanRequest(topology, **request), gathered([trace]), (1.0,), slots, (), deadline, prove=False)


TOPOLOGIES = st.sampled_from([Topology(1, 4), Topology(2, 2, Link(1e8, 1e-6), Link(2e8, 1e-5)), Topology(4, 1)])


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, topology=TOPOLOGIES, phase=st.sampled_from(["prefill", "decode"]), sized=st.booleans(), slow=st.booleans())
def test_the_time_score_is_the_evaluated_time_where_homes_are_equally_likely(seed, topology, phase, sized, slow) -> None:
    rng = np.random.default_rng(seed)
    topology = replace(topology, expert_bytes=1e6 if sized else 0.0, pairs_per_second=1e4 if slow else 1e8)
    seen = replace(make_trace(tokens=30, layers=2, experts=8, seed=seed), phase=phase)
    trace = every_home(seen, 4)
    scenarios = gathered([trace])
    problem = dispatch_problem([s.patterns for s in scenarios], [1.0], 4, 2, (), known_homes=False)
    model = LayerTime(topology, scenarios, [1.0])
    score = TimeScore(model, problem.scale * problem.layers)
    here = anywhere(problem, rng)
    evaluated = evaluate(plan_of(held(here, 4), trace, topology, 2), trace)
    predicted = float(np.mean(score.of(problem, here)))
    link = evaluated.rows.sum() * trace.tokens * topology.row_bytes / topology.within.bytes_per_second
    assert evaluated.seconds * (1 - 1e-9) <= predicted <= evaluated.seconds + TIE * link + 1e-12


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, topology=TOPOLOGIES, phase=st.sampled_from(["prefill", "decode"]), sized=st.booleans())
def test_the_time_of_copies_is_the_evaluated_one_where_homes_are_equally_likely(seed, topology, phase, sized) -> None:
    """With experts of two sizes, which a rank with copies reads more of."""
    rng = np.random.default_rng(seed)
    topology = replace(topology, expert_bytes=(1e6, 3e6) if sized else 0.0, memory_bytes_per_second=1e9)
    trace = every_home(replace(make_trace(tokens=30, layers=2, experts=8, seed=seed), phase=phase), 4)
    holds = held(rng.permuted(np.tile(np.arange(8) % 4, (2, 1)), axis=1), 4)
    holds |= rng.random(holds.shape) < 0.2
    model, (scenario,) = LayerTime(topology, gathered([trace]), [1.0]), gathered([trace])
    seconds = []
    for layer, patterns in enumerate(scenario.patterns):
        traffic = copies._Traffic.mixed([patterns], [1.0], [1.0], topology)
        sent, _, pairs, touched = traffic.of(holds[layer])
        seconds.append(model.of_copies(layer, sent, pairs, touched))
    assert np.mean(seconds) == pytest.approx(evaluate(plan_of(holds, trace, topology, 8), trace).seconds)


def test_copies_that_cost_more_to_read_than_they_save_are_not_made() -> None:
    trace = replace(make_trace(tokens=64, layers=2, experts=8), phase="decode")
    topology = Topology(1, 4, Link(1e9, 0), expert_bytes=1e9, memory_bytes_per_second=1e12)
    plain = plan(trace, PlanRequest(topology, objective="time", time_limit=4, iterations=2))
    room = plan(trace, PlanRequest(topology, objective="time", time_limit=4, iterations=2, slots_per_rank=4))
    assert room.objective.value <= plain.objective.value * (1 + 1e-9)
    assert room.holds().sum() == plain.holds().sum() == 2 * 8


def test_the_time_search_improves_on_where_it_began() -> None:
    trace = make_trace(tokens=300, layers=2, experts=8, top_k=3)
    task = task_of(trace, Topology(2, 2, Link(1e8, 0), Link(1e8, 0)), 2, objective="time", iterations=3)
    model = LayerTime(task.request.topology, task.scenarios, task.weights)
    base = rows._dispatch(task, False)
    problem = replace(base, limits=(Limit(model.weight, np.full((2, 4), np.inf)),))
    score = TimeScore(model, base.scale * base.layers)
    begin = np.stack([allowed(base, layer)[0] for layer in range(2)])
    found, _ = local.search(problem, 0, 3, Deadline(LATER), begin=begin, score=score)
    assert problem.feasible(found)
    assert all(a <= b for a, b in zip(score.of(problem, found), score.of(problem, begin), strict=True))
    assert sum(score.of(problem, found)) < sum(score.of(problem, begin))


# --- tokens that stay with their experts ---


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, ranks=st.sampled_from([2, 4]), layers=st.integers(2, 4))
def test_at_top_1_the_coherent_rows_are_the_hops(seed, ranks, layers) -> None:
    trace = make_trace(tokens=60, layers=layers, experts=8, top_k=1, seed=seed)
    holds = held(np.random.default_rng(seed).integers(0, ranks, (layers, 8)), ranks)
    assert coherent_rows(trace, holds, Topology(1, ranks))[0] == pytest.approx(hops(trace, holds))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_anchored_search_never_ends_worse_than_its_starts(seed) -> None:
    trace = make_trace(tokens=300, layers=4, experts=8, top_k=2, seed=seed)
    task = task_of(trace, Topology(1, 4), 2, strategy="coherent", iterations=2, seed=seed)
    paid = lambda s: coherent_rows(trace, s.holds, Topology(1, 4))[0]  # noqa: E731
    found = anchors.alternate(task)
    assert paid(found) <= min(paid(solve.hops(task)), paid(rows.dispatch(task)))
    assert found.lower_bound <= paid(found)


# --- nodes ---


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, shape=st.sampled_from([(2, 2), (2, 3), (3, 2)]))
def test_ranks_are_put_on_nodes_no_worse_than_as_they_were(seed, shape) -> None:
    count, per_node = shape
    flow = np.random.default_rng(seed).random((count * per_node,) * 2)
    flow += flow.T
    order = nodes.node_order(flow, per_node)
    node = np.arange(count * per_node) // per_node
    assert sorted(order.tolist()) == list(range(count * per_node))
    assert nodes.crossing(flow[np.ix_(order, order)], node) <= nodes.crossing(flow, node) + 1e-9


def test_ranks_that_exchange_most_share_a_node() -> None:
    group = np.array([0, 1, 2, 0, 1, 2, 2, 0, 1])
    flow = np.where(group[:, None] == group[None], 5.0, 1.0)
    assert [len(set(group[part])) for part in nodes.node_order(flow, 3).reshape(3, 3)] == [1, 1, 1]


@pytest.mark.processes
def test_a_child_told_to_stop_before_it_listens_answers_all_the_same() -> None:
    problem = random_chain(np.random.default_rng(3), 6, 12, 3)
    child = Child("coterie.placement.chain:search", {"problem": problem, "seed": 0, "iterations": None}, Deadline(60)).start()
    child.stop()
    child.stop()
    found, made = child.result()
    assert problem.feasible(found) and made <= 1


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_groups_are_named_for_home_as_far_as_ranks_have_room_for_them(seed) -> None:
    rng = np.random.default_rng(seed)
    trace = make_trace(tokens=60, layers=1, experts=6, top_k=2, seed=seed, sequences=5)
    affinity = measure(trace, homes_of(trace, 3), 3)
    caps = np.array([[2.0, 3.0, 4.0]])
    problem = dispatch_problem([affinity.patterns], [1.0], 3, 4, (Limit(np.ones((1, 6)), caps),), known_homes=True)
    here = rng.permutation(np.repeat([0, 1, 2], [1, 2, 3]))[None]
    named = rows.at_home(problem, here)
    ways = [np.array(names)[here] for names in permutations(range(3))]
    kept = [way for way in ways if problem.feasible(way)]
    assert problem.feasible(named) and len(kept) < len(ways)
    assert problem.cost(named) == pytest.approx(min(problem.cost(way) for way in kept))
