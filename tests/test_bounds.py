"""Every lower bound against brute force: no placement of a shape does better than what is stated for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from brute_force import allowed, copied_choices, layer_choices, optimum, plans, problems
from conftest import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.placement import anchors, bounds, cuts, semidefinite
from coterie.placement.cost import coherent_rows, evaluate, evaluate_load
from coterie.placement.deadline import Deadline
from coterie.placement.planner import PlanRequest, plan
from coterie.placement.problem import Limit, Problem, one_hot
from coterie.placement.scenarios import gathered, summarised
from coterie.placement.task import Task
from coterie.placement.topology import Link, Topology
from coterie.routing.errors import InputError
from coterie.routing.trace import LoadStatistics

SEEDS = st.integers(0, 10_000)
SHAPES = st.sampled_from([(2, 4, 2), (2, 5, 3), (3, 4, 2), (3, 6, 2), (4, 4, 1), (4, 6, 2)])  # ranks, experts, slots
COPIED = st.sampled_from([(2, 4, 3), (2, 3, 2), (3, 3, 2), (2, 4, 4)])


def soon(seconds: float = 0.2) -> Deadline:
    return Deadline(seconds)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, shape=SHAPES, top_k=st.integers(1, 3), cap=st.sampled_from([100.0, None]))
def test_the_cheap_bounds_hold(seed, shape, top_k, cap) -> None:
    for name, problem in problems(seed, *shape, 2, top_k, cap).items():
        assert 0 <= bounds.lower_bound(problem) <= optimum(problem) + 1e-6, name


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, size=st.integers(2, 6), slots=st.integers(1, 3))
def test_the_matching_bound_is_above_every_placement_of_a_pair(seed, size, slots) -> None:
    ranks = -(-size // slots)
    pairs = np.random.default_rng(seed).integers(0, 9, (size, size)).astype(float)
    held = one_hot(layer_choices(size, ranks, slots), ranks).astype(float)
    best = np.einsum("ner,ef,mfr->nm", held, pairs, held, optimize=True).max()
    assert bounds.most_together(pairs, slots) >= best - 1e-9


def test_the_matching_bound_is_the_best_matching() -> None:
    from scipy.optimize import linear_sum_assignment

    weights = np.random.default_rng(0).random((9, 9))
    rows, cols = linear_sum_assignment(-weights)
    assert bounds.most_together(weights, 1) == pytest.approx(weights[rows, cols].sum())
    assert bounds.most_together(weights, 9) == pytest.approx(weights.sum())
    assert bounds.most_together(np.zeros((3, 3)), 1) == 0


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, shape=SHAPES, top_k=st.integers(1, 3), cap=st.sampled_from([100.0, None, 1.9]), layers=st.integers(2, 3))
def test_the_chain_bound_holds_with_and_without_load_caps(seed, shape, top_k, cap, layers) -> None:
    ranks, experts, slots = shape
    try:
        problem = problems(seed, ranks, experts, slots, layers, top_k, cap)["hops"]
    except InputError as error:
        assert cap == 1.9 and str(error).startswith("--max-load:")  # this load cannot keep to it
        return
    assert 0 <= bounds.chain_bound(problem, soon()) <= optimum(problem) + 1e-6


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, shape=SHAPES, top_k=st.integers(1, 3), cap=st.sampled_from([100.0, None]))
def test_the_pattern_bound_holds_whatever_line_is_taken(seed, shape, top_k, cap) -> None:
    rng = np.random.default_rng(seed)
    found = problems(seed, *shape, 2, top_k, cap)
    for name in ("homes unknown", "homes known"):
        ways = layer_choices(found[name].experts, found[name].ranks, found[name].slots)
        bound = bounds.patterns_bound(found[name], ways[rng.integers(len(ways), size=2)], soon())
        assert bound <= optimum(found[name]) + 1e-6, name
        assert bound >= bounds.lower_bound(found[name])


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, experts=st.sampled_from([4, 6]), uneven=st.booleans())
def test_bounds_hold_where_ranks_have_different_caps(seed, experts, uneven) -> None:
    room = np.array([[1.0, experts - 1, experts - 1], [experts - 1, 2.0, np.inf]])
    limit = Limit(np.ones((2, experts)), room if uneven else np.full((2, 3), 2.0))
    found = problems(seed, 3, experts, experts - 1, 2, 2)
    for name, problem in ((n, replace(p, limits=(limit,))) for n, p in found.items()):
        best, start = optimum(problem), np.stack([allowed(problem, layer)[0] for layer in range(2)])
        bound = bounds.chain_bound(problem, soon()) if name == "hops" else bounds.patterns_bound(problem, start, soon())
        assert bound <= best + 1e-6, name


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 14), slots=st.integers(1, 8))
def test_the_envelope_is_above_every_partition(n, slots) -> None:
    lines = bounds._envelope(n, slots)
    for sizes in partitions(n, slots):
        pairs, saved = sum(s * (s - 1) // 2 for s in sizes), sum(s - 1 for s in sizes)
        assert min(intercept + slope * pairs for intercept, slope in lines) >= saved - 1e-9


def partitions(n: int, largest: int) -> list[tuple[int, ...]]:
    if n == 0:
        return [()]
    return [(s, *rest) for s in range(1, min(n, largest) + 1) for rest in partitions(n - s, s)]


def test_the_envelope_of_a_pattern_too_large_to_list_is_still_above() -> None:
    lines = bounds._envelope(bounds.LARGEST + 2, 4)
    for sizes in ([1] * 26, [2] * 13, [4] * 6 + [2], [3] * 8 + [2]):
        pairs, saved = sum(s * (s - 1) // 2 for s in sizes), sum(s - 1 for s in sizes)
        assert min(intercept + slope * pairs for intercept, slope in lines) >= saved


@settings(max_examples=12, deadline=None)
@given(seed=SEEDS, shape=COPIED, top_k=st.integers(1, 2))
def test_hops_and_rows_with_copies_are_bounded_over_all_copies(seed, shape, top_k) -> None:
    ranks, experts, slots = shape
    found = problems(seed, ranks, experts, slots, 2, top_k)
    held = copied_choices(experts, ranks, slots).astype(float)
    meet = np.einsum("ner,mfr->nmef", held, held) > 0
    apart = np.where(meet, 0.0, found["hops"].transitions[0]).sum((2, 3)).min()
    assert bounds.hops_with_copies(found["hops"]) <= apart + 1e-9
    trace = make_trace(tokens=80, layers=2, experts=experts, top_k=top_k, seed=seed, sequences=5)
    for layer in range(2):
        best = min(
            evaluate(p, one_layer(trace, layer)).dispatch
            for p in plans(one_layer(trace, layer), Topology(1, ranks), slots, True)
        )
        for name in ("homes known", "homes unknown"):
            single = only(found[name], layer)
            assert bounds.rows_with_copies(single) * single.scale * 2 <= best + 1e-9, name


def only(problem: Problem, layer: int) -> Problem:
    return replace(problem, layers=1, members=(problem.members[layer],), prices=(problem.prices[layer],))


def one_layer(trace, layer: int = 0):
    return replace(
        trace,
        expert_ids=trace.expert_ids[:, layer : layer + 1],
        router_weights=None,
        layer_ids=trace.layer_ids[layer : layer + 1],
    )


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, shape=COPIED, worst=st.booleans())
def test_the_load_bound_holds_with_copies(seed, shape, worst) -> None:
    ranks, experts, slots = shape
    loads = np.random.default_rng(seed).integers(0, 30, (2, 2, experts)).astype(float) ** 2
    held = copied_choices(experts, ranks, slots).astype(float)
    share = held / held.sum(2, keepdims=True)
    mean = loads.sum(2, keepdims=True) / ranks
    relative = np.where(mean > 0, loads / np.where(mean > 0, mean, 1), 1 / experts * ranks)
    peaks = np.einsum("sle,ner->slnr", relative, share).max(3)  # [scenario, layer, way]
    by_scenario = (peaks[:, 0, :, None] + peaks[:, 1, None, :]) / 2
    best = (by_scenario.max(0) if worst else by_scenario.mean(0)).min()
    assert 1 <= bounds.load_bound(loads, ranks, slots, worst) <= best + 1e-9


@settings(max_examples=15, deadline=None)
@given(
    seed=SEEDS,
    phase=st.sampled_from(["prefill", "decode", "mixed"]),
    nodes=st.sampled_from([1, 2]),
    slow=st.booleans(),
    robust=st.sampled_from(["mean", "worst"]),
    shape=st.sampled_from([(4, 2, False), (4, 3, True), (3, 3, True)]),
)
def test_the_time_bound_holds_on_every_machine(seed, phase, nodes, slow, shape, robust) -> None:
    """Of a long and a short recording together, too."""
    experts, slots, copied = shape
    link = Link(1e6, 1e-3) if slow else Link(1e12, 0.0)
    topology = Topology(nodes, 2 // nodes, link, Link(2e6, 1e-4), expert_bytes=1e6, memory_bytes_per_second=1e9, row_bytes=1e3)
    sizes = {seed: 40, seed + 1: 200}
    traces = [
        one_layer(make_trace(tokens=n, layers=1, experts=experts, top_k=2, seed=s, sequences=5)) for s, n in sizes.items()
    ]
    scenarios = gathered([replace(trace, phase=phase) for trace in traces])
    best = min(summarised(p, scenarios, "time", robust) for p in plans(traces[0], topology, slots, copied))
    assert 0 < bounds.time_bound(topology, scenarios, slots, robust) <= best * (1 + 1e-9)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, top_k=st.integers(1, 3), shape=st.sampled_from([(4, 2, 2, False), (3, 2, 2, True), (4, 4, 1, False)]))
def test_the_coherent_bound_holds(seed, top_k, shape) -> None:
    experts, ranks, slots, copied = shape
    trace = make_trace(tokens=40, layers=2, experts=experts, top_k=min(top_k, experts - 1), seed=seed, sequences=5)
    topology = Topology(1, ranks)
    task = Task(PlanRequest(topology, strategy="coherent"), gathered([trace]), (1.0,), slots, (), soon())
    best = min(coherent_rows(trace, p.holds(), topology)[0] for p in plans(trace, topology, slots, copied))
    assert 0 <= anchors.lower_bound(task) <= best + 1e-9


def test_bounds_say_what_can_be_worked_out_by_hand() -> None:
    """Each is above nothing: 0, or a load of 1, would hold everywhere."""
    even = Problem(2, 6, 2, 4, 1.0, transitions=np.ones((1, 6, 6)), integral=True)
    assert bounds.hops_with_copies(even) == 6 * 6 - 2 * 4 * 4  # pairs of experts, less those that two ranks bring together
    for name in ("homes known", "homes unknown"):  # three experts on three ranks, one of them home
        found = problems(0, 4, 4, 1, 1, 3)[name]
        assert bounds.rows_with_copies(found) * found.scale == pytest.approx(2)
    assert bounds.load_bound(np.array([[[9.0, 1, 1, 1]]]), 2, 2, True) == pytest.approx(1.5)  # of 6 pairs, 9 at once
    assert bounds.load_bound(np.array([[[9.0, 1, 1, 1]]]), 2, 3, True) == pytest.approx(1)  # a copy takes half of them
    trace = make_trace(tokens=40, layers=2, experts=4, top_k=3, sequences=5)
    task = Task(PlanRequest(Topology(1, 4), strategy="coherent"), gathered([trace]), (1.0,), 1, (), soon())
    assert anchors.lower_bound(task) == pytest.approx(4)  # two rows there, two back
    alone = Topology(1, 1, Link(1e6, 1e-3), expert_bytes=1e6, memory_bytes_per_second=1e9, row_bytes=1e3)
    decode = replace(one_layer(make_trace(tokens=40, layers=1, experts=4, top_k=2)), phase="decode")
    assert bounds.time_bound(alone, gathered([decode]), 4, "mean") == pytest.approx(
        4 * 1e6 / 1e9
    )  # reads its experts, sends nothing


FIELDS = {"hops": "hops", "dispatch": "dispatch", "coherent": "coherent", "load": "load", "time": "seconds"}


@pytest.mark.parametrize("objective", FIELDS)
@pytest.mark.parametrize(
    ("experts", "slots", "copied", "seed"), [(4, 2, False, 0), (4, 2, False, 1), (3, 2, True, 0), (3, 3, True, 1)]
)
def test_no_placement_beats_the_bound_that_a_plan_states(objective, experts, slots, copied, seed) -> None:
    trace = make_trace(tokens=40, layers=2, experts=experts, top_k=2, seed=seed, sequences=5)
    strategy = "coherent" if objective == "coherent" else "all_to_all"
    cap = None if objective == "load" else 2.0  # of two ranks, the whole load
    request = PlanRequest(Topology(1, 2), strategy, objective, max_load=cap, slots_per_rank=slots, time_limit=1.5, iterations=2)
    stated = plan(trace, request).objective
    every = plans(trace, Topology(1, 2), slots, copied, strategy=strategy)
    best = min(getattr(evaluate(p, trace), FIELDS[objective]) for p in every)
    assert stated.lower_bound <= best + 1e-12
    if objective != "time":
        assert stated.value >= best - 1e-12


@pytest.mark.parametrize("objective", ["hops", "dispatch", "coherent"])
@pytest.mark.parametrize("robust", ["worst", "mean"])
def test_no_placement_beats_the_bound_for_several_scenarios(objective, robust) -> None:
    traces = [make_trace(tokens=n, layers=2, experts=4, top_k=2, seed=n, sequences=5) for n in (30, 50)]
    strategy = "coherent" if objective == "coherent" else "all_to_all"
    request = PlanRequest(Topology(1, 2), strategy, objective, max_load=2, robust=robust, time_limit=1.5, iterations=2)
    stated = plan(traces, request).objective
    combine = max if robust == "worst" else np.mean
    every = plans(traces[0], Topology(1, 2), 2, strategy=strategy)
    best = min(combine([getattr(evaluate(p, t), FIELDS[objective]) for t in traces]) for p in every)
    assert 0 <= stated.lower_bound <= best + 1e-12


@pytest.mark.parametrize("robust", ["worst", "mean"])
def test_no_placement_beats_the_bound_of_load_statistics(robust) -> None:
    loads = np.random.default_rng(3).integers(0, 50, (2, 1, 4))
    statistics = LoadStatistics(loads, "m", (0,), ("a", "b"))
    stated = plan(
        statistics, PlanRequest(Topology(1, 2), objective="load", robust=robust, slots_per_rank=3, iterations=5)
    ).objective
    shape = make_trace(tokens=4, layers=1, experts=4)
    combine = max if robust == "worst" else np.mean
    values = [combine([evaluate_load(p, statistics, s).load for s in (0, 1)]) for p in plans(shape, Topology(1, 2), 3, True)]
    assert stated.lower_bound <= min(values) + 1e-12
    assert stated.value == pytest.approx(min(values))


def planted(layers: int, experts: int, ranks: int, inside: int, across: int, seed: int = 0) -> tuple[Problem, np.ndarray]:
    """A chain whose groups of experts send `inside` to their own group and `across` to the others."""
    rng = np.random.default_rng(seed)
    group = np.stack([rng.permutation(np.arange(experts) % ranks) for _ in range(layers)])
    pairs = np.where(group[:-1, :, None] == group[1:, None, :], float(inside), float(across))
    return Problem(layers, experts, ranks, experts // ranks, 1 / pairs.sum(), transitions=pairs, integral=True), group


def test_the_semidefinite_bound_is_tight_on_planted_groups() -> None:
    problem, group = planted(3, 12, 3, 10, 1)
    assert bounds.chain_bound(problem, soon(10)) == pytest.approx(problem.cost(group), rel=2e-3)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, seconds=st.sampled_from([0.0, 0.001, 0.01, 0.05]))
def test_the_semidefinite_bound_holds_however_early_it_stops(seed, seconds) -> None:
    problem = problems(seed, 3, 6, 2, 3, 2, None)["hops"]
    stated = bounds.chain_bound(problem, soon(seconds))
    assert 0 <= stated <= optimum(problem) + 1e-6


@pytest.mark.parametrize("objective", ["hops", "homes known"])
def test_the_bound_holds_in_single_precision(objective, monkeypatch) -> None:
    monkeypatch.setattr(semidefinite, "LARGE", 1)
    problem = problems(7, 3, 6, 2, 2, 2, None)[objective]
    start = np.stack([allowed(problem, layer)[0] for layer in range(2)])
    stated = bounds.chain_bound(problem, soon(1)) if objective == "hops" else bounds.patterns_bound(problem, start, soon(1))
    assert bounds.lower_bound(problem) <= stated <= optimum(problem) + 1e-6


def test_every_bound_that_is_reported_on_the_way_holds() -> None:
    problem, heard = problems(1, 3, 6, 2, 3, 2)["hops"], []
    stated = bounds.chain_bound(problem, soon(1), heard.append)
    assert heard and heard == sorted(heard) and stated == heard[-1]
    assert max(heard) <= optimum(problem) + 1e-6


def test_stars_tighten_the_bound(monkeypatch) -> None:
    problem = problems(4, 2, 8, 4, 2, 2)["hops"]
    full = bounds.chain_bound(problem, soon(3))
    monkeypatch.setattr(cuts.Stars, "renew", lambda self, placed: None)
    without = bounds.chain_bound(problem, soon(3))
    assert without + 1e-3 < full <= optimum(problem) + 1e-6


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, size=st.sampled_from([4, 8, 12]))
def test_stars_hold_for_every_grouping_and_are_violated_where_found(seed, size) -> None:
    rng = np.random.default_rng(seed)
    mixed = np.mean([_together(rng.integers(3, size=size)) for _ in range(4)], axis=0)
    blurred = np.clip(mixed + 0.3 * rng.random() * (1 - np.eye(size)), 0, 1)
    stars = cuts.Stars((1, size, size))
    stars.renew(blurred[None])
    assert (stars._left(blurred[None]) > 1 + cuts.VIOLATION - 1e-9).all()
    assert len({tuple(cut) for cut in stars.cuts.tolist()}) == len(stars.cuts)
    for _ in range(20):
        assert (stars._left(_together(rng.integers(1, 5, size=1)[0] * rng.random(size) // 1)[None]) <= 1 + 1e-9).all()
    before = len(stars.cuts)
    stars.renew(blurred[None])
    assert len(stars.cuts) >= before  # what is violated stays, and is not added again
    assert len({tuple(cut) for cut in stars.cuts.tolist()}) == len(stars.cuts)


def _together(groups: np.ndarray) -> np.ndarray:
    return (groups[:, None] == groups[None]).astype(float)


def test_a_star_with_three_arms_is_found_and_priced_off() -> None:
    # 0 shares half of its rank with each of three that share nothing: every triangle holds, the star does not.
    matrix = np.eye(5)
    matrix[0, 1:4] = matrix[1:4, 0] = 0.5
    assert cuts.violated(matrix).tolist() == [[0, 1, 2, 3, 5]]
    stars = cuts.Stars((1, 5, 5))
    stars.renew(matrix[None])
    stars.ascend(matrix[None], 1.0)
    charge = np.zeros((1, 5, 5))
    stars.add_to(charge)
    assert stars.total() > 0 and (charge == charge.transpose(0, 2, 1)).all()
    assert (charge[0, 0, 1:4] > 0).all() and (charge[0, 1:4, 1:4][~np.eye(3, dtype=bool)] < 0).all()
    assert (charge * matrix).sum() == pytest.approx(1.5 * stars.total())


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, each=st.integers(1, 4))
def test_priced_rows_and_columns_bound_every_choice(seed, each) -> None:
    gain = np.random.default_rng(seed).normal(size=(2, 4, 4))
    ways = [np.array(rows) for rows in product([0, 1], repeat=16) if sum(rows) == 4 * each]
    ways = [w.reshape(4, 4) for w in ways if (w.reshape(4, 4).sum(0) == each).all() and (w.reshape(4, 4).sum(1) == each).all()]
    best = sum(max(float((matrix * way).sum()) for way in ways) for matrix in gain)
    stated = semidefinite._most(gain, each)
    assert best - 1e-9 <= stated <= np.maximum(0, gain).sum() + 1e-9


def test_load_rows_tighten_the_bound() -> None:
    # The two heavy experts of each layer go together, but no rank may hold both.
    pairs = np.full((1, 4, 4), 1.0)
    pairs[0, :2, :2] = 20.0
    load = np.tile([10.0, 10.0, 1.0, 1.0], (2, 1))
    free = Problem(2, 4, 2, 2, 1.0, transitions=pairs, integral=True)
    capped = replace(free, limits=(Limit(load, np.full((2, 2), 12.0)),))
    assert bounds.chain_bound(free, soon(2)) <= optimum(free) + 1e-6
    assert 1.5 * optimum(free) < bounds.chain_bound(capped, soon(2)) <= optimum(capped) + 1e-6


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, blocks=st.sampled_from([1, 2]))
def test_the_semidefinite_program_is_above_every_choice_of_pairs(seed, blocks) -> None:
    rng = np.random.default_rng(seed)
    experts, ranks = 4, 2
    gain = rng.normal(size=(2, blocks * experts, blocks * experts))
    gain += gain.transpose(0, 2, 1)
    gain[:, np.arange(blocks * experts), np.arange(blocks * experts)] = 0
    stated = semidefinite.most_together(gain, blocks, ranks, np.zeros((0, 2, blocks * experts)), soon())
    ways = [w for w in layer_choices(experts, ranks, 2) if w[0] == 0] if blocks == 1 else list(layer_choices(experts, ranks, 2))
    best = -np.inf
    for rows in product(ways, repeat=blocks + 1 if blocks == 2 else 2):
        parts = [np.concatenate(rows[m : m + blocks]) for m in range(2)]
        best = max(best, sum(float((gain[m] * (p[:, None] == p[None])).sum()) for m, p in enumerate(parts)))
    assert stated >= best - 1e-6


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, shape=st.sampled_from([(2, 3, 2), (2, 4, 3)]), top_k=st.integers(1, 3))
def test_no_placement_with_a_few_copies_beats_the_bound_for_those(seed, shape, top_k) -> None:
    """And it says more than the one for any number of copies where slots are few."""
    ranks, experts, slots = shape
    trace = make_trace(tokens=40, layers=2, experts=experts, top_k=top_k, seed=seed, sequences=5)
    known, chain = (problems(seed, ranks, experts, slots, 2, top_k, tokens=40)[name] for name in ("homes known", "hops"))
    spare = np.full(2, ranks * slots - experts)
    every = [(evaluate(p, trace), p.holds()) for p in plans(trace, Topology(1, ranks), slots, True)]
    least, best = min(every, key=lambda e: e[0].dispatch)
    rows = bounds.rows_with_few_copies(known, spare, best.argmax(2), soon())
    assert bounds.rows_with_copies(known) <= rows and rows * known.scale <= least.dispatch + 1e-9
    hops = bounds.hops_with_few_copies(chain, spare, soon())
    assert bounds.hops_with_copies(chain) <= hops and hops * chain.scale <= min(e.hops for e, _ in every) + 1e-9


def test_one_slot_to_spare_leaves_most_of_a_bound() -> None:
    trace = make_trace(tokens=400, layers=4, experts=8, top_k=3)
    for objective in ("hops", "dispatch"):
        asked = PlanRequest(
            Topology(1, 3), "coherent" if objective == "hops" else "all_to_all", objective, time_limit=5, iterations=3
        )
        assert plan(trace, asked).objective.gap < 0.6
