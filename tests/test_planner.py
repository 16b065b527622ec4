"""Plans as a whole: what they state, what they keep to, and what they are the same under."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from brute_force import every_home, plans
from conftest import make_trace

from coterie.placement.cost import evaluate, evaluate_load
from coterie.placement.deadline import Deadline
from coterie.placement.plan import OBJECTIVES, PlacementPlan, slots_from_holders
from coterie.placement.planner import PlanRequest, baseline_plan, plan
from coterie.placement.scenarios import gathered, short, summarised
from coterie.placement.spread import Child, LostWorker
from coterie.placement.topology import Link, Topology
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.trace import LoadStatistics

FIELDS = {"hops": "hops", "dispatch": "dispatch", "coherent": "coherent", "load": "load", "time": "seconds"}
BASELINES = ("contiguous", "round_robin", "packed")
QUICK = 30.0  # seconds that the iterations asked for never need


def strategy_of(objective: str) -> str:
    return "coherent" if objective == "coherent" else "all_to_all"


def value_of(made: PlacementPlan, trace) -> float:
    return getattr(evaluate(made, trace), FIELDS[made.objective.name])


def same(one: PlacementPlan, two: PlacementPlan) -> bool:
    return bool((one.physical_to_logical == two.physical_to_logical).all())


def statistics(seed: int = 0, scenarios: int = 2, experts: int = 8) -> LoadStatistics:
    counts = np.random.default_rng(seed).integers(1, 200, (scenarios, 3, experts))
    return LoadStatistics(counts, "m", (0, 1, 2), tuple(f"s{i}" for i in range(scenarios)))


# --- what a plan states ---


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("ranks", "slots"), [(2, 4), (4, 3)])
def test_a_plan_states_the_evaluated_value_and_a_valid_bound(objective: str, ranks: int, slots: int) -> None:
    trace = make_trace(tokens=300, layers=3, experts=8)
    cap = None if objective == "load" else ranks
    request = PlanRequest(Topology(1, ranks), strategy_of(objective), objective, max_load=cap, slots_per_rank=slots)
    made = plan(trace, replace(request, time_limit=2.5, iterations=3))
    stated = made.objective
    assert stated.name == objective and made.slots_per_rank == slots
    assert stated.value == value_of(made, trace)
    assert 0 <= stated.lower_bound <= stated.value
    assert stated.gap == pytest.approx((stated.value - stated.lower_bound) / stated.value if stated.value else 0)
    if slots * ranks == 8 and objective != "time":
        others = [value_of(replace(b, objective=stated), trace) for b in baselines(made, trace)]
        assert stated.lower_bound - 1e-9 <= stated.value <= min(others)


def baselines(made: PlacementPlan, trace) -> list[PlacementPlan]:
    return [baseline_plan(name, trace, made.topology, made.strategy) for name in BASELINES]


def test_the_strategy_decides_what_is_worth_minimising() -> None:
    trace = make_trace(tokens=60, layers=2, experts=4)
    for strategy, objective in (("coherent", "coherent"), ("all_to_all", "dispatch"), ("hierarchical", "dispatch")):
        made = plan(trace, PlanRequest(Topology(1, 2), strategy, time_limit=5, iterations=1))
        assert (made.strategy, made.objective.name, made.iterations > 0) == (strategy, objective, True)


@pytest.mark.parametrize("objective", ["hops", "dispatch"])
def test_exact_plans_are_proven(objective: str) -> None:
    trace = make_trace(tokens=300, layers=2, experts=6)
    made = plan(trace, PlanRequest(Topology(1, 2), objective=objective, exact=True, max_load=2, time_limit=QUICK))
    assert made.objective.gap == 0


def test_a_perfect_chain_needs_no_hops() -> None:
    trace = make_trace(tokens=400, layers=4, experts=8, top_k=1)
    ids = trace.expert_ids.copy()
    for layer in range(1, 4):
        ids[:, layer, 0] = (ids[:, layer - 1, 0] * 3 + layer) % 8
    chained = replace(trace, expert_ids=ids)
    for objective in ("hops", "coherent"):
        made = plan(chained, PlanRequest(Topology(1, 4), "coherent", objective, time_limit=10, iterations=4))
        assert (made.objective.value, made.objective.gap) == (0.0, 0.0)


def test_a_longer_perfect_chain_is_found_and_proven_without_an_integer_program() -> None:
    trace = make_trace(tokens=1500, layers=5, experts=24, top_k=1)
    ids = trace.expert_ids.copy()
    for layer in range(1, 5):
        ids[:, layer, 0] = (ids[:, layer - 1, 0] * 5 + layer) % 24
    made = plan(replace(trace, expert_ids=ids), PlanRequest(Topology(1, 4), objective="hops", time_limit=10))
    assert (made.objective.value, made.objective.gap) == (0.0, 0.0)


@pytest.mark.parametrize("objective", ["hops", "dispatch", "coherent"])
def test_planned_plans_beat_the_baselines_on_text_they_did_not_see(objective: str) -> None:
    trace = make_trace(tokens=3000, layers=4, experts=8)
    seen, unseen = trace.select(np.arange(0, 3000, 2)), trace.select(np.arange(1, 3000, 2))
    made = plan(seen, PlanRequest(Topology(1, 4), strategy_of(objective), objective, time_limit=6, iterations=3), prove=False)
    for other in baselines(made, unseen):
        assert value_of(made, unseen) < value_of(replace(other, objective=made.objective), unseen)


# --- what a plan keeps to ---


@pytest.mark.parametrize("objective", ["hops", "dispatch", "coherent"])
@pytest.mark.parametrize("cap", [1.3, 1.6])
def test_every_layer_keeps_to_the_load_cap(objective: str, cap: float) -> None:
    trace = make_trace(tokens=500, layers=3, experts=8)
    request = PlanRequest(Topology(1, 2), strategy_of(objective), objective, max_load=cap, time_limit=3, iterations=2)
    load = evaluate(plan(trace, request, prove=False), trace).rank_load
    assert (load.max(1) / load.mean(1)).max() <= cap * (1 + 1e-6)


def test_free_slots_are_used_when_they_help() -> None:
    trace = make_trace(tokens=200, layers=2, experts=8, top_k=1)
    for objective in ("hops", "dispatch", "coherent"):
        request = PlanRequest(Topology(1, 2), strategy_of(objective), objective, time_limit=3, iterations=2)
        tight, loose = plan(trace, request, prove=False), plan(trace, replace(request, slots_per_rank=7), prove=False)
        assert loose.holds().sum() > tight.holds().sum()
        assert loose.objective.value < tight.objective.value


@pytest.mark.parametrize("objective", ["hops", "dispatch", "load", "coherent"])
def test_ranks_with_little_memory_hold_fewer_experts(objective: str) -> None:
    trace = make_trace(tokens=200, layers=3, experts=8)
    topology = replace(Topology(1, 4), expert_bytes=10.0, memory_bytes=(30.0, 60.0, 90.0, 120.0))
    request = PlanRequest(topology, strategy_of(objective), objective, slots_per_rank=4, time_limit=2.5, iterations=2)
    held = plan(trace, request, prove=False).holds().sum((0, 1)) * 10
    assert (held <= topology.memory_bytes).all()
    small = replace(topology, memory_bytes=(30.0, 60.0, 60.0, 70.0))
    with pytest.raises(InputError, match="memory_bytes: the experts need 240 bytes in all, the ranks hold 220: 20 bytes"):
        plan(trace, replace(request, topology=small), prove=False)


@pytest.mark.parametrize("objective", [None, "time"])
def test_memory_that_differs_by_rank_is_kept_under_a_default_load_cap(objective: str | None) -> None:
    """An even load, which ranks with room for few experts cannot share evenly: the default cap gives way, memory does not."""
    trace = make_trace(tokens=400, layers=3, experts=8)
    ids = np.stack(
        [np.random.default_rng(layer).permuted(np.tile(np.arange(8), (400, 1)), axis=1)[:, :2] for layer in range(3)], 1
    )
    trace = replace(trace, expert_ids=ids.astype(np.int16))
    topology = replace(Topology(1, 4), expert_bytes=10.0, memory_bytes=(30.0, 60.0, 90.0, 120.0))
    made = plan(trace, PlanRequest(topology, objective=objective, time_limit=2.5, iterations=2), prove=False)
    assert (made.holds().sum((0, 1)) * 10 <= topology.memory_bytes).all()
    with pytest.raises(InputError, match=r"--max-load 1.1: no placement within it was found"):
        plan(trace, PlanRequest(topology, objective=objective, time_limit=2.5, iterations=2, max_load=1.1), prove=False)


def test_expert_bytes_by_layer_are_counted_and_a_wrong_number_of_them_is_told() -> None:
    trace = make_trace(tokens=100, layers=3, experts=6)
    topology = replace(Topology(1, 4), expert_bytes=(1.0, 2.0, 3.0))
    made = plan(trace, PlanRequest(topology, objective="time", time_limit=2.5, iterations=1), prove=False)
    assert made.objective.value == pytest.approx(evaluate(made, trace).seconds)
    with pytest.raises(InputError, match="expert_bytes: found 2 entries, expected 3, one per traced layer, or one number"):
        plan(trace, PlanRequest(replace(topology, expert_bytes=(1.0, 1.0)), time_limit=1), prove=False)


def test_a_load_cap_holds_in_every_scenario_with_copies() -> None:
    traces = [make_trace(tokens=300, layers=2, experts=8, seed=seed) for seed in (1, 2)]
    request = PlanRequest(Topology(1, 4), objective="dispatch", robust="worst", slots_per_rank=4, max_load=1.3, time_limit=4)
    made = plan(traces, replace(request, iterations=2), prove=False)
    for trace in traces:
        load = evaluate(made, every_home(trace, 4)).rank_load
        assert (load.max(1) / load.mean(1)).max() <= 1.3 * (1 + 1e-6)


@pytest.mark.parametrize(("experts", "ranks", "cap"), [(6, 4, 1.3), (5, 2, 1.2)])
def test_a_load_cap_holds_where_experts_do_not_divide_evenly(experts: int, ranks: int, cap: float) -> None:
    """Where the plans that `coherent` begins from would have copies."""
    planned = 0
    for seed in range(3):
        trace = make_trace(layers=4, experts=experts, top_k=2, tokens=300, seed=seed)
        request = PlanRequest(Topology(1, ranks), "coherent", "coherent", max_load=cap, time_limit=QUICK, iterations=1)
        try:
            made = plan(trace, request, prove=False)
        except InputError as error:
            assert "max-load" in str(error)
            continue
        planned += 1
        held = evaluate(made, every_home(trace, ranks)).rank_load  # copies are planned for homes that are equally likely
        assert (held.max(1) <= cap * held.mean(1) * (1 + 1e-6)).all()
    assert planned


def test_the_evenest_load_keeps_to_its_cap_as_the_dispatcher_uses_copies() -> None:
    rng = np.random.default_rng(0)
    ids = np.where(rng.random((400, 2, 1)) < 0.5, 0, rng.integers(1, 8, (400, 2, 1))).astype(np.int16)
    trace = replace(make_trace(layers=2, experts=8, top_k=1, tokens=400), expert_ids=ids)
    request = PlanRequest(Topology(1, 4), objective="load", slots_per_rank=4, time_limit=1.0)
    best = evaluate(plan(trace, request), trace).rank_load
    worst = float((best.max(1) / best.mean(1)).max())
    with pytest.raises(InputError, match=f"the evenest layer found in scenario 0 has {worst:.4f}; give that or more"):
        plan(trace, replace(request, max_load=worst - 0.05))


def test_a_refused_plan_leaves_no_process_behind(trace, monkeypatch) -> None:
    made: list[Child] = []
    begin = Child.start
    monkeypatch.setattr(Child, "start", lambda self: made.append(self) or begin(self))

    def refuse(*args: object) -> None:
        raise InputError("not within the cap")

    monkeypatch.setattr("coterie.placement.solve.check_feasible", refuse)
    monkeypatch.setattr("coterie.placement.exact.fits", lambda problem: False)
    with pytest.raises(InputError, match="not within the cap"):
        plan(trace, PlanRequest(Topology(1, 4), objective="hops", workers=2, time_limit=20))
    assert made and all(child._process.poll() is not None for child in made)


def test_a_model_of_one_expert_and_a_recording_of_no_picks_are_planned() -> None:
    trace = make_trace(layers=3, experts=2, top_k=1, tokens=50)
    alone = replace(trace, num_experts=1, expert_ids=np.zeros_like(trace.expert_ids))
    for objective in ("hops", "dispatch", "load"):
        assert plan(alone, PlanRequest(Topology(1, 1), objective=objective, time_limit=0.5)).objective.value in (0, 1)
    nobody, request = (
        replace(trace, expert_ids=np.full_like(trace.expert_ids, -1)),
        PlanRequest(Topology(1, 2), objective="load", time_limit=0.5),
    )
    old = plan(nobody, request)
    with np.errstate(all="raise"):
        again = plan(nobody, replace(request, previous=old, max_moves=2))
    assert again.objective.value == old.objective.value


def test_time_is_planned_anew_on_one_rank() -> None:
    trace = make_trace(layers=2, experts=4, top_k=2, tokens=60)
    request = PlanRequest(Topology(1, 1), objective="time", time_limit=0.5)
    old = plan(trace, request)
    assert same(plan(trace, replace(request, previous=old, max_moves=1)), old)


@pytest.mark.processes
def test_a_second_worker_proves_and_its_lost_proof_costs_the_bound_and_not_the_plan(monkeypatch) -> None:
    def lost(self: Child) -> float:
        raise LostWorker("a worker ended without an answer (exit code -9)")

    trace = make_trace(tokens=400, layers=3, experts=24, top_k=4)
    request = PlanRequest(Topology(1, 4), objective="hops", time_limit=4, iterations=1, workers=2)
    proven = plan(trace, request).objective
    monkeypatch.setattr(Child, "result", lost)
    monkeypatch.setattr("coterie.placement.solve._Proof._hear", lambda proof, bound: None)  # else what it said before counts
    with pytest.warns(RuntimeWarning, match=r"the proof was lost \(a worker ended without an answer \(exit code -9\)\)"):
        made = plan(trace, request).objective
    assert 0 < made.lower_bound < proven.lower_bound <= proven.value


def test_ranks_that_exchange_most_hops_share_a_node() -> None:
    trace = make_trace(tokens=500, layers=4, experts=8, top_k=1)
    ids = trace.expert_ids.copy()
    ids[:, 1:, 0] = (ids[:, :1, 0] // 2 * 2 + np.random.default_rng(0).integers(0, 2, (500, 3))) % 8
    made = plan(replace(trace, expert_ids=ids), PlanRequest(Topology(2, 2), "coherent", "hops", time_limit=10))
    assert made.objective.value == 0 and evaluate(made, replace(trace, expert_ids=ids)).node_rows == 0


# --- several scenarios ---


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("robust", ["worst", "mean"])
def test_the_value_of_several_scenarios_is_their_worst_or_their_mean(objective: str, robust: str) -> None:
    traces = [make_trace(tokens=150, layers=3, experts=8, seed=s) for s in (1, 2)]
    request = PlanRequest(Topology(1, 4), strategy_of(objective), objective, robust=robust, time_limit=3, iterations=1)
    made = plan(traces, request)
    values = [value_of(made, t) for t in traces]
    assert made.objective.value == pytest.approx(max(values) if robust == "worst" else np.mean(values))
    assert 0 <= made.objective.lower_bound <= made.objective.value


@pytest.mark.parametrize("seed", [0, 3])
def test_planning_for_the_worst_is_never_worse_there_than_planning_for_the_mean(seed: int) -> None:
    traces = [make_trace(tokens=n, layers=3, experts=8, seed=seed + n) for n in (100, 300)]
    request = PlanRequest(Topology(1, 4), objective="hops", time_limit=QUICK)
    mean, worst = plan(traces, request), plan(traces, replace(request, robust="worst"))
    assert worst.objective.value <= max(value_of(mean, t) for t in traces) + 1e-12
    assert mean.objective.value <= np.mean([value_of(worst, t) for t in traces]) + 1e-12  # proven: dynamic programming


def test_load_statistics_are_planned_for_all_their_scenarios() -> None:
    loads = statistics(scenarios=3)
    for robust, combine in (("worst", max), ("mean", np.mean)):
        request = PlanRequest(Topology(1, 4), objective="load", robust=robust, slots_per_rank=3, time_limit=QUICK, iterations=5)
        made = plan(loads, request)
        values = [evaluate_load(made, loads, s).load for s in range(3)]
        assert made.objective.value == pytest.approx(combine(values))
        for name in BASELINES:
            other = baseline_plan(name, loads, Topology(1, 4), "all_to_all")
            assert made.objective.value < combine([evaluate_load(other, loads, s).load for s in range(3)])


def test_traces_and_load_statistics_are_planned_together() -> None:
    trace, loads = make_trace(tokens=200, layers=3, experts=8), statistics()
    made = plan([trace, loads], PlanRequest(Topology(1, 2), objective="load", time_limit=QUICK, iterations=2))
    values = [evaluate(made, trace).load, *(evaluate_load(made, loads, s).load for s in range(2))]
    assert made.objective.value == pytest.approx(np.mean(values))


# --- the same again ---


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_seed_and_iterations_decide_the_plan(objective: str) -> None:
    trace = make_trace(tokens=200, layers=2, experts=8, top_k=3)
    links = Topology(2, 2, Link(1e8, 1e-6), Link(1e8, 1e-5))
    request = PlanRequest(links, strategy_of(objective), objective, time_limit=QUICK, iterations=1, seed=3, slots_per_rank=3)
    one, two = (plan(trace, request, prove=False) for _ in range(2))
    assert same(one, two) and one.iterations == two.iterations > 0


@pytest.mark.processes
@pytest.mark.parametrize("objective", ["dispatch", "load"])
def test_two_workers_make_one_plan_and_never_a_worse_one(objective: str) -> None:
    trace = make_trace(tokens=200, layers=2, experts=12, top_k=3)
    exact = objective != "load"
    request = PlanRequest(
        Topology(1, 4), objective=objective, time_limit=QUICK, iterations=2, exact=exact, slots_per_rank=4 - exact
    )
    recorded = trace if exact else statistics(experts=12)
    alone = plan(recorded, request, prove=False)
    one, two = (plan(recorded, replace(request, workers=2), prove=False) for _ in range(2))
    assert same(one, two) and one.workers == 2 and one.iterations == 2 * alone.iterations
    assert one.objective.value <= alone.objective.value + 1e-12


@pytest.mark.parametrize("objective", ["hops", "dispatch", "load", "coherent"])
def test_ctrl_c_ends_the_search_with_a_plan(objective: str, monkeypatch) -> None:
    trace = make_trace(tokens=400, layers=3, experts=24, top_k=4)
    request = PlanRequest(Topology(1, 4), strategy_of(objective), objective, time_limit=600, slots_per_rank=7)
    limits: list[Deadline] = []

    class Kept(Deadline):
        def __init__(self, seconds: float, stop: threading.Event | None = None) -> None:
            super().__init__(seconds, stop)
            limits.append(self)

    def once(*heard: object) -> None:
        if not limits[0].stop.is_set():
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("coterie.placement.planner.Deadline", Kept)
    started = time.monotonic()
    made = plan(trace, request, progress=once)
    assert limits[0].stop.is_set() and time.monotonic() - started < 60
    assert made.objective.value == value_of(made, trace)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_progress_tells_of_values_and_iterations() -> None:
    heard: list[tuple] = []
    trace = make_trace(tokens=200, layers=3, experts=24, top_k=2)
    made = plan(
        trace, PlanRequest(Topology(1, 4), objective="hops", time_limit=2, iterations=2), progress=lambda *h: heard.append(h)
    )
    values = [value for value, _, _ in heard if value is not None]
    bounds = [bound for _, bound, _ in heard if bound is not None]
    assert bounds
    assert values == sorted(values, reverse=True) and values[-1] == pytest.approx(made.objective.value)
    assert all(bound <= made.objective.value + 1e-9 for bound in bounds)


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(topology=Topology(2, 8)), "--topology: found 16 ranks, expected at most 8: the model has that many experts"),
        (dict(slots_per_rank=1), "--slots-per-rank: found 1, expected 2 "),
        (dict(slots_per_rank=9), "--slots-per-rank: found 9, expected 2 .* to 8"),
        (
            dict(max_load=1.0),
            r"--max-load: found 1, but the evenest packing found of one layer, without copies, has 1\.\d+; give that or more",
        ),
        (dict(max_load=0.5), "--max-load: found 0.5, expected at least 1"),
        (dict(strategy="x"), "--strategy: found 'x', expected all_to_all"),
        (dict(method="x"), "--method: found 'x', expected auto, contiguous"),
        (dict(objective="x"), "--objective: found 'x', expected time, dispatch, hops"),
        (dict(robust="x"), "--robust: found 'x', expected worst, mean"),
        (dict(time_limit=0), "--time-limit: found 0"),
        (dict(iterations=-1), "--iterations: found -1, expected 0 or more"),
        (dict(seed=-1), "--seed: found -1"),
        (dict(workers=0), "--workers: found 0, expected 1 or more"),
        (dict(method="packed", exact=True), "--exact: found True, expected --method auto beside it"),
        (dict(method="packed", max_load=2.0), "--max-load: found 2.0, expected --method auto beside it"),
        (dict(max_moves=3), "--max-moves: found 3, expected --from and it together"),
        (
            dict(objective="time", strategy="hierarchical"),
            "--objective time: found --strategy hierarchical, expected all_to_all",
        ),
    ],
)
def test_a_wrong_request_says_what_is_allowed(trace, change, message) -> None:
    with pytest.raises(InputError, match=message):
        plan(trace, PlanRequest(**{"topology": Topology(1, 4), **change}))


def test_recordings_that_cannot_be_planned_are_refused(trace) -> None:
    request = PlanRequest(Topology(1, 4))
    with pytest.raises(InputError, match="found no recording"):
        plan([], request)
    with pytest.raises(InputError, match="scenario 1: num_experts: found 6, expected 8 as in another"):
        plan([trace, make_trace(experts=6)], request)
    with pytest.raises(
        InputError, match="scenario 0:s0: holds load statistics only, but --objective dispatch needs single tokens"
    ):
        plan(statistics(), request)
    with pytest.raises(InputError, match=r"scenario 0:s0: .* but --method exflow needs single tokens"):
        plan(statistics(), replace(request, method="exflow", objective="load"))


# --- what a review found ---


def test_of_a_long_and_a_short_recording_the_long_one_sends_more() -> None:
    """A batch is a whole recording: rows count as work does, by tokens."""
    topology = Topology(1, 2, Link(1e6, 0), pairs_per_second=1e12, row_bytes=1e3)
    traces = [every_home(make_trace(tokens=n, layers=1, experts=6, seed=n), 2) for n in (40, 1500)]
    scenarios = gathered(traces)
    best = min(summarised(p, scenarios, "time", "mean") for p in plans(traces[0], topology, 3))
    made = plan(traces, PlanRequest(topology, objective="time", max_load=2.0, time_limit=3, iterations=20))
    assert made.objective.value <= best * 1.005


@pytest.mark.parametrize("objective", ["dispatch", "hops"])
def test_a_cap_that_only_copies_can_keep_is_kept(objective: str) -> None:
    """An expert with a third of the load, on four ranks; without room for a copy the cap is refused."""
    trace = every_home(make_trace(tokens=400, layers=2, experts=8, top_k=1), 4)
    ids = np.where(np.random.default_rng(0).random(trace.expert_ids.shape) < 0.35, 0, trace.expert_ids).astype(np.int16)
    trace = replace(trace, expert_ids=ids, router_weights=None)
    asked = PlanRequest(Topology(1, 4), objective=objective, max_load=1.15, time_limit=4, iterations=4)
    with pytest.raises(InputError, match=r"--max-load: found 1.15, but the evenest packing found of one layer, without copies"):
        plan(trace, asked)
    made = plan(trace, replace(asked, slots_per_rank=3))
    load = evaluate(made, trace).rank_load
    assert (load.max(1) / load.mean(1)).max() <= 1.16
    with pytest.raises(
        InputError, match=r"--max-load: found 1, but the evenest packing found of one layer, with copies, has 1\."
    ):
        plan(trace, replace(asked, slots_per_rank=3, max_load=1.0))


def test_where_ranks_do_not_divide_the_experts_load_is_no_worse_than_packing() -> None:
    """Two sequences: copies would be used by two ranks only."""
    trace = make_trace(tokens=400, layers=4, experts=8, sequences=2)
    made = plan(trace, PlanRequest(Topology(1, 3), objective="load", time_limit=3, iterations=10))
    packed = baseline_plan("packed", trace, Topology(1, 3), "all_to_all")
    assert made.objective.value <= evaluate(packed, trace).load + 1e-9


@pytest.mark.parametrize(("objective", "homes"), [("coherent", False), ("dispatch", True)])
def test_iterations_and_not_the_clock_end_a_search(objective: str, homes: bool) -> None:
    trace = make_trace(tokens=2000, layers=3, experts=16, top_k=3)
    asked = PlanRequest(Topology(1, 4), strategy_of(objective), objective, homes=homes, iterations=1, time_limit=60.0)
    started = time.monotonic()
    one, two = plan(trace, asked, prove=False), plan(trace, asked, prove=False)
    assert same(one, two) and time.monotonic() - started < QUICK


def test_a_plan_for_time_keeps_rows_at_home() -> None:
    """Of placements that differ in the names of ranks, it takes the one that these recordings pay least for."""
    rng = np.random.default_rng(0)
    trace = make_trace(tokens=400, layers=2, experts=8, top_k=1, sequences=4)
    ids = ((3 - trace.sequence_ids % 4)[:, None] * 2 + rng.integers(0, 2, (400, 2)))[:, :, None].astype(np.int16)
    trace = replace(trace, expert_ids=ids, router_weights=None)
    made = plan(trace, PlanRequest(Topology(1, 4, Link(1e6, 0)), objective="time", time_limit=3, iterations=3))
    rows = evaluate(made, trace).dispatch
    for layer, names in product(range(2), permutations(range(4))):
        holds = made.holds()
        holds[layer] = holds[layer][:, names]
        assert rows <= evaluate(replace(made, physical_to_logical=slots_from_holders(holds, 2)), trace).dispatch + 1e-12


def test_short_recordings_are_searched_by_what_companions_share_and_judged_as_they_are() -> None:
    trace = make_trace(tokens=30, layers=3, experts=24, top_k=3)
    (scenario,) = gathered([trace])
    assert short([scenario]) and not short(gathered([make_trace(tokens=600, layers=3, experts=24, top_k=3)]))
    shared = scenario.shared_transitions
    np.testing.assert_allclose(shared.sum((1, 2)), scenario.transitions.sum((1, 2)))
    assert (shared >= 0.9 * scenario.transitions - 1e-12).all() and (shared > 0).sum() > (scenario.transitions > 0).sum()
    ones = gathered([make_trace(tokens=30, layers=3, experts=24, top_k=1)])[0]
    np.testing.assert_allclose(ones.shared_transitions, ones.transitions)
    made = plan(trace, PlanRequest(Topology(1, 4), "coherent", "hops", time_limit=3, iterations=3))
    assert made.objective.value == evaluate(made, trace).hops and made.objective.lower_bound <= made.objective.value


def test_a_worker_that_raises_is_no_lost_worker(monkeypatch) -> None:
    def failed(self: Child) -> float:
        raise CoterieError("a worker failed: TypeError: no such thing")

    monkeypatch.setattr(Child, "result", failed)
    with pytest.raises(CoterieError, match="a worker failed: TypeError"):
        plan(make_trace(tokens=60), PlanRequest(Topology(1, 4), objective="load", workers=2, iterations=1, time_limit=4))


def test_an_expert_size_of_zero_among_others_is_refused() -> None:
    with pytest.raises(InputError, match="expert_bytes: found 0 for layer 1 of the list; give every layer's, or none: 0"):
        Topology(1, 4, expert_bytes=(10.0, 0.0, 10.0))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("slots", [None, 5])
@pytest.mark.parametrize("objective", ["coherent", "hops"])
def test_a_few_layers_are_planned_until_nothing_is_gained(layers: int, slots: int | None, objective: str) -> None:
    """With a proof and without iterations to end it; top-3, and enough picks for the search of rows."""
    trace = make_trace(tokens=400, layers=layers, experts=9, top_k=3)
    asked = PlanRequest(Topology(1, 3), "coherent", objective, slots_per_rank=slots, time_limit=2)
    made = plan(trace, asked)
    assert made.objective.value == pytest.approx(value_of(made, trace))
    assert layers > 1 or made.objective.value == 0


@pytest.mark.parametrize("objective", ["dispatch", "hops", "time"])
def test_memory_limits_where_a_rank_has_slots_for_all_experts(objective: str) -> None:
    trace = make_trace(tokens=100, layers=2, experts=6)
    topology = Topology(1, 2, memory_bytes=(80.0, 60.0), expert_bytes=10.0)
    made = plan(trace, PlanRequest(topology, objective=objective, slots_per_rank=6, time_limit=3, iterations=1))
    assert (made.holds().sum((0, 1)) * 10 <= np.array(topology.memory_bytes)).all()


def test_load_does_not_depend_on_the_order_of_recordings() -> None:
    trace = make_trace(tokens=400, layers=2, experts=8, sequences=2)
    other = LoadStatistics(np.arange(16).reshape(1, 2, 8) + 1, trace.model, trace.layer_ids, ("other",))
    asked = PlanRequest(Topology(1, 3), objective="load", time_limit=3, iterations=6)
    one, two = (plan(given, asked).objective.value for given in ([trace, other], [other, trace]))
    assert one == pytest.approx(two, rel=0.02)
