"""Re-planning keeps to its budget and finds the best placement within it: checked against all placements of tiny models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.placement.budget import Board, Option, combined
from coterie.placement.cost import carried
from coterie.placement.limits import balanced_peak
from coterie.placement.moving import Given, holds_of, state_of
from coterie.placement.plan import PlacementPlan, slots_from_assignment, slots_from_holders
from coterie.placement.planner import PlanRequest, baseline_plan, plan
from coterie.placement.pricing import Even
from coterie.placement.replan import moves
from coterie.placement.scenarios import gathered, summarised
from coterie.placement.topology import Topology
from coterie.routing.affinity import expert_load
from coterie.routing.errors import InputError
from coterie.routing.trace import LoadStatistics, RoutingTrace

OBJECTIVES = ("hops", "dispatch", "load", "time", "coherent")


def request(old: PlacementPlan, objective: str, max_moves: int, **more: object) -> PlanRequest:
    """A deterministic one: so many rounds, not so much time; `--exact`, so that the search sees what `evaluate` prints."""
    strategy = "coherent" if objective == "coherent" else "all_to_all"
    given = {"iterations": 5, "time_limit": 60.0, "exact": objective == "dispatch"} | more
    if objective in ("dispatch", "time"):
        given = {"max_load": 3.0} | given
    given.setdefault("max_load", 100.0 if objective != "load" else None)  # the references know no cap
    return PlanRequest(old.topology, strategy, objective, previous=old, max_moves=max_moves, **given)  # type: ignore[arg-type]


def quickly(routing: RoutingTrace | LoadStatistics | list[RoutingTrace], wanted: PlanRequest) -> PlacementPlan:
    """Without a bound."""
    return plan(routing, wanted, prove=False)


def old_plan(trace: RoutingTrace, ranks: int, slots: int | None = None, copies: int = 0, seed: int = 0) -> PlacementPlan:
    """A random placement, with so many further copies in each layer."""
    rng = np.random.default_rng(seed)
    width = slots or -(-trace.num_experts // ranks)
    rows = np.stack([rng.permutation(np.arange(trace.num_experts) % ranks) for _ in range(trace.layers)])
    shape = baseline_plan("contiguous", trace, Topology(1, ranks), "all_to_all")
    made = replace(shape, physical_to_logical=slots_from_assignment(rows, ranks, width))
    holds = made.holds()
    for layer in holds:
        for _ in range(copies):
            free = np.argwhere(~layer & (layer.sum(0) < width)[None])
            layer[tuple(rng.choice(free))] = True
    return replace(made, physical_to_logical=slots_from_holders(holds, width))


def layer_placements(experts: int, ranks: int, slots: int, copies: bool) -> Iterator[np.ndarray]:
    """Every bool `[E, ranks]` with each expert somewhere, at most `slots` on a rank, and only once without copies."""
    choices = [c for c in itertools.product((False, True), repeat=ranks) if any(c) and (copies or sum(c) == 1)]
    for rows in itertools.product(choices, repeat=experts):
        holds = np.array(rows)
        if holds.sum(0).max() <= slots:
            yield holds


def best_within(
    trace: RoutingTrace | LoadStatistics, old: PlacementPlan, objective: str, budget: int, copies: bool = False
) -> float:
    """The least value of any placement at most `budget` moves away, with as many copies as the old one or more."""
    held, scenarios, lowest = old.holds(), gathered([trace]), np.inf
    strategy = "coherent" if objective == "coherent" else "all_to_all"
    options = list(layer_placements(trace.num_experts, old.ranks, old.slots_per_rank, copies))
    near = [[(int((o & ~was).sum()), o) for o in options if o.sum() >= was.sum()] for was in held]
    for chosen in itertools.product(*([o for o in layer if o[0] <= budget] for layer in near)):
        if sum(away for away, _ in chosen) <= budget:
            slots = slots_from_holders(np.stack([o for _, o in chosen]), old.slots_per_rank)
            made = replace(old, physical_to_logical=slots, strategy=strategy)
            lowest = min(lowest, summarised(made, scenarios, objective, "mean"))
    return lowest


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
@pytest.mark.parametrize("objective", ["hops", "dispatch", "load"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_result_is_the_best_placement_within_the_budget(objective: str, budget: int, seed: int) -> None:
    trace = make_trace(tokens=40, layers=3 if objective == "hops" else 2, experts=4, top_k=2, seed=seed)
    old = old_plan(trace, 2, seed=seed)
    made = quickly(trace, request(old, objective, budget))
    assert made.objective.value == pytest.approx(best_within(trace, old, objective, budget))
    assert moves(old, made) <= budget


@pytest.mark.parametrize("objective", ["dispatch", "load", "time"])
@pytest.mark.parametrize("budget", [2, 3, 4])
def test_cycles_over_three_ranks_are_found(objective: str, budget: int) -> None:
    trace = make_trace(tokens=50, layers=1, experts=6, top_k=2, seed=3)
    old = old_plan(trace, 3, seed=3)
    made = quickly(trace, request(old, objective, budget))
    assert made.objective.value == pytest.approx(best_within(trace, old, objective, budget))


@pytest.mark.parametrize("objective", ["time", "coherent"])
@pytest.mark.parametrize("budget", [2, 4])
def test_time_and_coherent_come_near_the_best(objective: str, budget: int) -> None:
    trace = make_trace(tokens=60, layers=2, experts=4, top_k=2, seed=2)
    old = old_plan(trace, 2, seed=2)
    made = quickly(trace, request(old, objective, budget))
    assert made.objective.value is not None
    assert made.objective.value <= 1.02 * best_within(trace, old, objective, budget)


@pytest.mark.parametrize("budget", [0, 1, 2, 3])
@pytest.mark.parametrize("objective", ["load", "hops"])
def test_spare_slots_and_copies_are_used(objective: str, budget: int) -> None:
    trace = make_trace(tokens=60, layers=1 if objective == "load" else 2, experts=3, top_k=1, seed=4)
    old = old_plan(trace, 2, slots=2 if objective == "hops" else 3, copies=1, seed=4)
    recording = trace if objective == "hops" else LoadStatistics(np.array([[[50, 33, 20]]]), "m", (0,), ("all",))
    made = quickly(recording, request(old, objective, budget))
    assert made.objective.value == pytest.approx(best_within(recording, old, objective, budget, copies=True))
    assert moves(old, made) <= budget


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_moves_returns_the_old_plan(objective: str) -> None:
    trace = make_trace(tokens=80)
    old = old_plan(trace, 4, slots=3, copies=2)
    made = quickly(trace, request(old, objective, 0, iterations=1))
    assert (made.holds() == old.holds()).all()
    again = replace(old, strategy=made.strategy)
    assert made.objective.value == summarised(again, gathered([trace]), objective, "mean")
    assert made.objective.name == objective and made.seconds > 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_more_moves_never_cost_more_and_many_match_a_plan_from_scratch(objective: str) -> None:
    trace = make_trace(tokens=120, layers=3, experts=8, seed=5)
    old = old_plan(trace, 4, seed=5)
    made = [plan(trace, request(old, objective, budget)) for budget in (0, 2, 6, 24)]
    values = [p.objective.value for p in made]
    assert all(m is not None and n is not None and n <= m * (1 + 1e-9) for m, n in itertools.pairwise(values))
    assert [moves(old, p) <= budget for p, budget in zip(made, (0, 2, 6, 24), strict=True)] == [True] * 4
    fresh = quickly(trace, replace(request(old, objective, 0), previous=None, max_moves=None))
    assert values[-1] is not None and fresh.objective.value is not None
    assert values[-1] <= fresh.objective.value * (1 + 1e-9)
    assert all(p.objective.lower_bound is None or p.objective.lower_bound <= min(v for v in values if v) for p in made)


@pytest.mark.parametrize("objective", ["dispatch", "time", "coherent"])
def test_copies_stay_and_no_expert_is_lost(objective: str) -> None:
    trace = make_trace(tokens=80, layers=2, experts=6, seed=6)
    old = old_plan(trace, 3, slots=3, copies=3, seed=6)
    made = quickly(trace, request(old, objective, 4))
    assert moves(old, made) <= 4
    value = summarised(replace(old, strategy=made.strategy), gathered([trace]), objective, "mean")
    assert made.objective.value is not None and made.objective.value <= value


@pytest.mark.parametrize("seed", range(4))
def test_a_load_cap_is_kept_or_the_moves_that_it_takes_are_named(seed: int) -> None:
    trace = make_trace(tokens=200, layers=2, experts=8, seed=seed)
    old = old_plan(trace, 4, seed=seed)
    scenarios = gathered([trace])
    load = scenarios[0].load
    peaks = np.array(
        [[balanced_peak(row, 4, 2), (held * row[:, None]).sum(0).max()] for held, row in zip(old.holds(), load, strict=True)]
    )
    cap = float((peaks / load.sum(1)[:, None] * 4).max(0).mean())  # between what can be reached and what the old plan has
    for budget in range(0, 10, 2):
        try:
            made = quickly(trace, request(old, "hops", budget, max_load=cap))
        except InputError as error:
            needed = int(str(error).split(" moves were found")[0].split()[-1])
            assert needed > budget and f"--max-moves: found {budget}" in str(error)
            made = quickly(trace, request(old, "hops", needed, max_load=cap))
        carried = (made.holds() * load[:, :, None]).sum(1)
        assert (carried.max(1) <= cap * load.sum(1) / 4 * (1 + 1e-9)).all()


def test_memory_is_kept() -> None:
    trace = make_trace(tokens=80, layers=2, experts=6, seed=7)
    topology = Topology(1, 2, memory_bytes=(80.0, 60.0), expert_bytes=10.0)
    old = replace(old_plan(trace, 2, slots=4, seed=7), topology=topology)
    made = quickly(trace, request(old, "hops", 2, iterations=1))
    assert (made.holds().sum((0, 1)) <= [8, 6]).all()


@pytest.mark.parametrize("memory", [False, True])
def test_a_default_cap_that_the_old_plan_exceeds_is_no_error(memory: bool) -> None:
    """It is mended as far as the moves go; memory, which the old plan keeps, demands nothing."""
    trace = make_trace(tokens=300, layers=2, experts=8)
    old = old_plan(trace, 4)
    where = replace(old.topology, expert_bytes=10.0, memory_bytes=(40.0, 40.0, 60.0, 80.0)) if memory else old.topology
    uneven = replace(old, physical_to_logical=np.array([[0, 1, 2, 3, 4, 5, 6, 7]] * 2, np.int32))
    loads = []
    for budget in (0, 1, 2, 8):
        asked = PlanRequest(where, previous=uneven, max_moves=budget, iterations=5, time_limit=60.0)
        made = quickly(trace, asked)
        assert moves(uneven, made) <= budget
        loads.append(summarised(made, gathered([trace]), "load", "worst"))
    assert loads[0] > 1.1 and loads[-1] < loads[0]


@pytest.mark.parametrize("objective", ["dispatch", "time"])
def test_moves_that_are_left_make_copies_in_free_slots(objective: str) -> None:
    """Two moves: what any exchange of experts takes, which may be worth more under time, but not in rows."""
    trace = make_trace(tokens=60, layers=1, experts=4, top_k=1, seed=3)
    old = old_plan(trace, 2, slots=3)
    made = quickly(trace, request(old, objective, 2))
    assert moves(old, made) == 2 and (objective == "time" or made.holds().sum() > old.holds().sum())
    assert made.objective.value <= best_within(trace, old, objective, 2, copies=True) * 1.02


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("required", [False, True])
def test_mending_ends_and_breaks_nothing(seed: int, required: bool) -> None:
    """Copies on ranks that do not divide: where one moves, all are dealt out anew."""
    rng = np.random.default_rng(seed)
    topology = Topology(2, 3)
    holds = np.zeros((1, 11, 6), dtype=bool)
    holds[0, np.arange(11), rng.permutation(np.arange(11) % 6)] = True
    for _ in range(10):
        free = np.argwhere(~holds[0] & (holds[0].sum(0) < 4)[None])
        holds[0][tuple(rng.choice(free))] = True
    load = rng.integers(0, 50, 11).astype(float) ** 2
    weights = np.stack([load, np.full(11, 3.5e8)])
    caps = np.stack([np.full(6, 1.1 * load.sum() / 6), 3.5e8 * (holds[0].sum(0) - (rng.random(6) < 0.3))])
    mask = np.array([required, True])
    given = Given(holds[0], 4, weights, caps, np.array([True, False]), mask, topology)
    for budget in (0, 5, 66):
        layer = Even(load[None] / load.sum() * 6, np.ones(1), given)
        before = layer.excess(), layer.excess(True)
        board = Board([layer], budget, False, rng)
        left = board.mend()
        assert left == pytest.approx(layer.excess(True)) and left <= before[1] + 1e-9 and layer.moves <= budget
        assert layer.holds.any(1).all()
    roomy = replace(given, caps=np.stack([caps[0], np.full(6, 1e12)]))
    kept = Even(load[None] / load.sum() * 6, np.ones(1), roomy)
    before = kept.excess()
    Board([kept], 0, False, rng).mend()
    assert (kept.holds == holds[0]).all() or kept.excess() < before  # copies do not go for nothing


@pytest.mark.parametrize("objective", ["hops", "dispatch", "load"])
def test_copies_that_memory_has_no_room_for_are_given_up(objective: str) -> None:
    """Which takes no moves; one that must go makes room for the only copy of another."""
    trace = make_trace(tokens=300, layers=2, experts=8)
    holds = np.zeros((2, 8, 4), dtype=bool)
    holds[:, np.arange(8), np.arange(8) // 2] = True
    holds[:, 0, 1] = True  # three on a rank that has room for two, and of these one is needed nowhere
    holds[:, [1, 7], [0, 3]] = False
    holds[:, [1, 7], [3, 0]] = True
    old = replace(old_plan(trace, 4, 3), physical_to_logical=slots_from_holders(holds, 3))
    where = replace(old.topology, expert_bytes=10.0, memory_bytes=40.0)
    made = quickly(trace, replace(request(old, objective, 0, max_load=None if objective == "load" else 100.0), topology=where))
    assert moves(old, made) == 0 and (made.holds().sum(1) == 2).all()


def test_a_cap_that_is_asked_for_is_kept_or_refused_under_load_too() -> None:
    trace = make_trace(tokens=300, layers=2, experts=8)
    old = replace(old_plan(trace, 4), physical_to_logical=np.array([[0, 1, 2, 3, 4, 5, 6, 7]] * 2, np.int32))
    with pytest.raises(InputError, match=r"--max-load: found 1.01, but the evenest layer found in .* has 1\.[0-9]+; give"):
        quickly(trace, request(old, "load", 0, max_load=1.01))
    assert quickly(trace, request(old, "load", 0, max_load=4.0)).objective.value == pytest.approx(
        summarised(old, gathered([trace]), "load", "mean")
    )


def test_a_cap_that_a_plan_with_copies_keeps_as_tokens_are_sent_is_kept() -> None:
    """The dispatcher's copies take other shares than equal ones: three copies on four ranks serve two, one and one."""
    holds = np.zeros((1, 4, 4), dtype=bool)
    holds[0, 0, :3] = holds[0, 1, 3] = holds[0, 2, 1] = holds[0, 3, 2] = True
    trace = make_trace(tokens=400, layers=1, experts=4, top_k=1, sequences=8)
    share = carried(holds[0], expert_load(trace)[0], Topology(1, 4))
    most = float(share.max() / share.mean()) * 1.0001
    old = replace(old_plan(trace, 4, 2), physical_to_logical=slots_from_holders(holds, 2))
    made = quickly(trace, request(old, "hops", 0, max_load=max(most, 1.0)))
    assert (made.holds() == holds).all()


def test_a_rank_far_above_the_others_is_relieved(recwarn: pytest.WarningsRecorder) -> None:
    load = np.ones((1, 1, 64), dtype=np.int64)
    load[0, 0, :2] = 10_000
    statistics = LoadStatistics(load, "m", (0,), ("hot",))
    old = baseline_plan("contiguous", statistics, Topology(1, 32), "all_to_all")
    made = quickly(statistics, request(old, "load", 2))
    assert made.objective.value < 0.6 * summarised(old, gathered([statistics]), "load", "mean")
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize("robust", ["mean", "worst"])
@pytest.mark.parametrize("objective", ["load", "dispatch"])
def test_several_recordings_are_planned_for_together(objective: str, robust: str) -> None:
    traces = [make_trace(tokens=100, layers=2, experts=8, seed=seed) for seed in (1, 2)]
    old = old_plan(traces[0], 4)
    made = quickly(traces, request(old, objective, 6, robust=robust))
    before = summarised(old, gathered(traces), objective, robust)
    assert moves(old, made) <= 6 and made.objective.value is not None and made.objective.value <= before


def test_load_statistics_are_enough_for_load() -> None:
    load = np.random.default_rng(0).integers(1, 90, (1, 2, 8))
    statistics = LoadStatistics(load, "m", (0, 1), ("prefill",))
    old = old_plan(make_trace(layers=2), 4)
    made = quickly(statistics, request(old, "load", 2))
    assert made.objective.value is not None
    assert made.objective.value < summarised(old, gathered([statistics]), "load", "mean")


def test_slots_are_those_of_the_old_plan_unless_given() -> None:
    trace = make_trace(tokens=60)
    old = old_plan(trace, 4, slots=3, copies=1)
    assert quickly(trace, request(old, "load", 2)).slots_per_rank == 3
    assert quickly(trace, request(old, "load", 2, slots_per_rank=4)).slots_per_rank == 4
    with pytest.raises(InputError, match="--slots-per-rank: found 2, expected at least 3"):
        quickly(trace, request(replace(old_plan(trace, 4, slots=3, copies=4)), "load", 2, slots_per_rank=2))


def test_an_old_plan_of_another_shape_is_refused() -> None:
    trace = make_trace(tokens=60)
    cases = {
        "model: found other, expected m": old_plan(make_trace(model="other"), 4),
        "num_experts: found 16, expected 8": old_plan(make_trace(experts=16), 4),
        r"layer_ids: found \(0, 1\), expected \(0, 1, 2\)": old_plan(make_trace(layers=2), 4),
    }
    for message, old in cases.items():
        with pytest.raises(InputError, match=f"--from: {message} as the trace has; plan anew without --from"):
            quickly(trace, request(old, "hops", 2))
    with pytest.raises(InputError, match="--from: ranks: found 2, expected 4 as --topology has"):
        quickly(trace, replace(request(old_plan(trace, 2), "hops", 2), topology=Topology(1, 4)))


def test_the_same_request_gives_the_same_plan() -> None:
    trace = make_trace(tokens=80, layers=4)
    old = old_plan(trace, 4)
    one, two = (quickly(trace, request(old, "hops", 6)) for _ in range(2))
    assert (one.physical_to_logical == two.physical_to_logical).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_mix_of_options_is_the_best_there_is(data: st.DataObject) -> None:
    numbers = st.integers(0, 6)
    options = [
        [Option(float(data.draw(numbers)), data.draw(st.integers(0, 3)) if n else 0, (layer, n)) for n in range(3)]
        for layer in range(3)
    ]
    between = None
    if data.draw(st.booleans()):
        between = [np.array(data.draw(st.lists(numbers, min_size=9, max_size=9)), float).reshape(3, 3) for _ in range(2)]
    budget = data.draw(st.integers(0, 7))

    def cost(chosen: tuple[Option, ...]) -> float:
        joint = 0.0 if between is None else sum(b[x.what[1], y.what[1]] for b, (x, y) in zip(between, itertools.pairwise(chosen), strict=True))  # type: ignore[index]  # noqa: E501 # fmt: skip
        return sum(o.cost for o in chosen) + joint

    possible = [c for c in itertools.product(*options) if sum(o.moves for o in c) <= budget]
    found = combined(options, budget, between)
    assert sum(o.moves for o in found) <= budget
    assert cost(tuple(found)) == min(map(cost, possible))


def test_columns_hold_what_was_placed() -> None:
    holds = old_plan(make_trace(layers=1), 4, slots=4, copies=5).holds()[0]
    assert (holds_of(state_of(holds, 4), 8, 4) == holds).all()
