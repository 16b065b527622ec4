"""Home ranks: their file, who is told to go where, the balance, planning them in turns with the placement, and the bound."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brute_force import plans
from conftest import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.placement import homing
from coterie.placement.cost import evaluate, plan_homes
from coterie.placement.deadline import Deadline
from coterie.placement.homes import HomeClass, Homes, assign, balanced
from coterie.placement.plan import PlacementPlan, read_plan, save_plan, slots_from_assignment
from coterie.placement.planner import PlanRequest, baseline_plan, compare, plan
from coterie.placement.prices import Prices
from coterie.placement.scenarios import gathered
from coterie.placement.task import Solution, Task
from coterie.placement.topology import Topology
from coterie.routing.errors import InputError
from coterie.routing.trace import LoadStatistics, RoutingTrace


def test_homes_for_an_old_plan_beyond_the_default_cap_state_no_bound() -> None:
    """A bound under a cap that the plan does not keep would be no bound on it."""
    trace = make_trace(tokens=400, layers=1, experts=8)
    hot = np.random.default_rng(0).random(400) < 0.8
    ids = np.where(hot[:, None, None], np.array([0, 1]), trace.expert_ids).astype(np.int16)
    trace = replace(trace, expert_ids=ids, router_weights=None)
    old = baseline_plan("contiguous", trace, Topology(1, 4), "all_to_all")
    made = plan(trace, PlanRequest(Topology(1, 4), previous=old, max_moves=0, homes=True, time_limit=3, iterations=1))
    assert made.homes is not None and made.objective.lower_bound is None


HOMES = Homes(
    (HomeClass(0, 0.75, (0.5, -0.25)), HomeClass(1, 1.0, (-1.0, 0.125)), HomeClass(2, 0.5, (0.0, 0.0))),
    ((3, 1), (4, 5)),
    8,
    1.25,
)


def classes_trace(seed: int = 0, sequences: int = 24, kinds: int = 4, noise: float = 0.2) -> RoutingTrace:
    """Sequences of `kinds`: in every layer a kind has four experts of its own; 20 to 40 tokens each, top-3."""
    rng = np.random.default_rng(seed)
    groups = np.stack([np.random.default_rng(99 + layer).permutation(4 * kinds).reshape(kinds, 4) for layer in range(3)])
    ids, owner, places = [], [], []
    kind = rng.permutation(np.arange(sequences) % kinds)
    for sequence in range(sequences):
        for position in range(int(rng.integers(20, 41))):
            own = [rng.permutation(groups[layer, kind[sequence]]) for layer in range(3)]
            others = [np.setdiff1d(rng.permutation(4 * kinds), o) for o in own]
            picks = [[*o[:2], rng.choice(x) if rng.random() < noise else o[2]] for o, x in zip(own, others, strict=True)]
            ids.append(picks)
            owner.append(sequence)
            places.append(position)
    numbers = (np.array(ids, np.int16), np.array(owner, np.int32), np.array(places, np.int32))
    return RoutingTrace(*numbers, "m", 4 * kinds, (0, 1, 2), "classes", "prefill")


def make_plan(**changes: Any) -> PlacementPlan:
    slots = slots_from_assignment(np.array([[0, 0, 1, 1, 2, 2], [2, 1, 0, 0, 1, 2]]), 3, 2)
    return replace(PlacementPlan(slots, 6, (3, 4), Topology(1, 3), "m", homes=HOMES), **changes)


def task_of(trace: RoutingTrace, ranks: int, **changes: Any) -> Task:
    request = PlanRequest(Topology(1, ranks), objective="dispatch", homes=True)
    return Task(request, gathered([trace]), (1.0,), -(-trace.num_experts // ranks), (), Deadline(20.0), **changes)


def busiest(at: np.ndarray, ranks: int) -> float:
    """Tokens of the busiest home over the mean."""
    return float(np.bincount(at, minlength=ranks).max() / len(at) * ranks)


def test_homes_come_back_as_they_were_written(tmp_path: Path) -> None:
    for homes in (HOMES, replace(HOMES, tokens=None), None):
        save_plan(make_plan(homes=homes), tmp_path / "p.json")
        assert read_plan(tmp_path / "p.json").homes == homes


def test_the_file_is_what_the_documentation_says(tmp_path: Path) -> None:
    save_plan(make_plan(), tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["homes"] == {
        "told_by": "prefill",
        "tokens": 8,
        "balance": 1.25,
        "experts": [[3, 1], [4, 5]],
        "classes": [
            {"home": 0, "rows": 0.75, "weights": [0.5, -0.25]},
            {"home": 1, "rows": 1.0, "weights": [-1.0, 0.125]},
            {"home": 2, "rows": 0.5, "weights": [0.0, 0.0]},
        ],
    }
    save_plan(make_plan(homes=None), tmp_path / "p.json")
    assert "homes" not in json.loads((tmp_path / "p.json").read_text())


@pytest.mark.parametrize(
    ("where", "to", "message"),
    [
        ((), [], "homes: found list, expected an object with told_by, tokens, balance, classes"),
        (("told_by",), "decode", "homes.told_by: found 'decode', expected 'token_ids' or 'prefill'"),
        (("told_by",), "token_ids", "homes.token_ids: found nothing, expected it given"),
        (("tokens",), 0, "homes.tokens: found 0, expected 1 or more, or null"),
        (("tokens",), True, "homes.tokens: found True, expected an integer or null"),
        (("balance",), 0.9, "homes.balance: found 0.9, expected 1 or more"),
        (("balance",), "x", "homes.balance: found 'x', expected a finite number"),
        (("balance",), float("nan"), "homes.balance: found nan, expected a finite number"),
        (("more",), 1, "homes: found a field 'more', expected no other than told_by"),
        (("experts",), None, "homes.experts: found NoneType, expected a list"),
        (("experts", 0), [3], r"homes.experts\[0\]: found \[3\], expected \[layer, expert\]"),
        (("experts", 1), [5, 1], r"homes.experts\[1\]: found \[5, 1\], expected \[layer of the plan, expert below 6\]"),
        (("experts", 1), [4, 6], r"homes.experts\[1\]: found \[4, 6\]"),
        (("experts", 1), [3, 1], "homes.experts: found one twice, expected each once"),
        (("classes",), [], "homes.classes: found 0 classes, expected 3, one for each rank"),
        (("classes", 1), 7, r"homes.classes\[1\]: found int, expected an object with home, rows, weights"),
        (("classes", 1, "home"), 2, r"homes.classes\[1\].home: found 2, expected 1: one class for each rank, in order"),
        (("classes", 1, "home"), 1.0, r"homes.classes\[1\].home: found 1.0, expected a rank"),
        (("classes", 1, "rows"), None, r"homes.classes\[1\].rows: found None, expected a finite number"),
        (("classes", 1, "weights"), [1], r"homes.classes\[1\].weights: found 1, expected 2 numbers, as homes.experts"),
        (("classes", 1, "weights"), [1, "x"], r"homes.classes\[1\].weights\[1\]: found 'x', expected a finite number"),
    ],
)
def test_wrong_homes_name_field_value_and_what_is_allowed(tmp_path: Path, where, to, message: str) -> None:
    path = tmp_path / "p.json"
    save_plan(make_plan(), path)
    value = json.loads(path.read_text())
    target = value
    keys = ("homes", *where)
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = to
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=message) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(
    where=st.sampled_from([("tokens",), ("balance",), ("experts",), ("experts", 0), ("classes",), ("classes", 0, "weights")]),
    to=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), lambda v: st.lists(v, max_size=3)
    ),
)
def test_whatever_a_field_of_homes_holds_the_reader_answers_with_an_error_of_ours(tmp_path_factory, where, to) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "p.json"
    save_plan(make_plan(), path)
    value = json.loads(path.read_text())
    target = value["homes"]
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = to
    path.write_text(json.dumps(value))
    try:
        read_plan(path)
    except InputError as error:
        assert f"{path}: homes" in str(error)


def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for name in ("told_by", "tokens", "balance", "experts", "classes"):
        save_plan(make_plan(), path)
        value = json.loads(path.read_text())
        del value["homes"][name]
        path.write_text(json.dumps(value))
        with pytest.raises(InputError, match=f"homes.{name}: found nothing, expected it given"):
            read_plan(path)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    sequences=st.integers(1, 60),
    ranks=st.integers(1, 8),
    longest=st.integers(1, 90),
    balance=st.sampled_from([1.0, 1.05, 1.1, 2.0, 8.0]),
)
def test_no_home_is_busier_than_the_limit_or_than_packing_makes_it(seed, sequences, ranks, longest, balance) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, sequences)
    costs = rng.random((sequences, ranks)) * lengths[:, None]
    here = balanced(costs, lengths, balance)
    held = np.bincount(here, weights=lengths, minlength=ranks)
    mean = lengths.sum() / ranks
    assert len(here) == sequences and len(held) == ranks
    assert held.max() <= max(balance * mean, mean + lengths.max()) * (1 + 1e-8)  # longest first reaches the second
    if mean + lengths.max() * (1 - 1 / ranks) <= balance * mean:
        assert held.max() <= balance * mean * (1 + 1e-8)
    if balance >= ranks:
        assert (here == costs.argmin(1)).all(), "without a limit everyone gets the cheapest"
    assert (here == balanced(costs, lengths, balance)).all()


def test_assignment_is_close_to_the_best_of_all() -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        lengths, costs = rng.integers(5, 9, 8), rng.random((8, 3))
        everyone = np.array(list(product(range(3), repeat=8)))
        held = np.stack([(lengths * (everyone == r)).sum(1) for r in range(3)], axis=1)
        value = costs[np.arange(8), everyone].sum(1)
        least = value[held.max(1) <= 1.25 * lengths.sum() / 3].min()
        found = costs[np.arange(8), balanced(costs, lengths, 1.25)].sum()
        assert least - 1e-9 <= found <= 1.1 * least + 0.05


def test_a_home_is_told_by_the_first_tokens_alone() -> None:
    trace = classes_trace()
    here = homing.alternate(task_of(trace, 4, prove=False), start_of(trace, 4), tokens=5)
    assert here.homes is not None
    at = assign(here.homes, trace)
    rng = np.random.default_rng(1)
    later = trace.positions >= 5
    scrambled = trace.expert_ids.copy()
    scrambled[later] = rng.permutation(scrambled[later])
    assert (assign(here.homes, replace(trace, expert_ids=scrambled)) == at).all()
    order = rng.permutation(trace.tokens)
    assert (assign(here.homes, trace.select(order)) == at[order]).all(), "tokens may stand in any order"
    assert all(len(set(at[trace.sequence_ids == s])) == 1 for s in range(24))


def start_of(trace: RoutingTrace, ranks: int) -> Solution:
    return Solution(baseline_plan("packed", trace, Topology(1, ranks), "all_to_all").holds(), None)


def test_the_file_can_be_applied_without_our_code() -> None:
    """The rule of docs/planning.md by hand: with room everywhere, each sequence goes where it is expected to send least."""
    trace = make_trace(tokens=120, experts=6, layers=2, sequences=5)
    trace = replace(trace, layer_ids=(3, 4))
    homes = json.loads(json.dumps(replace(HOMES, balance=3.0).to_json()))
    expected = np.empty(trace.tokens, dtype=int)
    for sequence in range(5):
        own = np.flatnonzero(trace.sequence_ids == sequence)
        first = sorted(own, key=lambda t: trace.positions[t])[: homes["tokens"]]
        uses = [
            np.mean([expert in trace.expert_ids[t, [3, 4].index(layer)] for t in first]) for layer, expert in homes["experts"]
        ]
        rows = [c["rows"] + sum(w * u for w, u in zip(c["weights"], uses, strict=True)) for c in homes["classes"]]
        expected[own] = homes["classes"][int(np.argmin(rows))]["home"]
    assert (plan_homes(make_plan(homes=replace(HOMES, balance=3.0)), trace) == expected).all()
    assert (plan_homes(make_plan(homes=None), trace) == trace.sequence_ids % 3).all()


def test_sequences_go_where_their_experts_are() -> None:
    """On text that was not planned for: every kind of sequence at home on the rank that holds its experts."""
    planned, unseen = classes_trace(seed=0), classes_trace(seed=1)
    request = PlanRequest(Topology(1, 4), objective="dispatch", max_load=1.3, time_limit=6, iterations=4, homes=True)
    made = plan(planned, request)
    at = plan_homes(made, unseen)
    assert busiest(at, 4) <= 1.1
    with_homes, without = evaluate(made, unseen), evaluate(replace(made, homes=None), unseen)
    assert with_homes.dispatch < 0.5 < 0.8 < without.dispatch
    assert with_homes.load == without.load and with_homes.hops == without.hops
    assert with_homes.seconds < without.seconds and with_homes.busiest_rank < without.busiest_rank
    assert evaluate(made, planned).dispatch == made.objective.value
    assert made.objective.lower_bound <= made.objective.value
    rows = compare(made, unseen)
    assert list(rows)[:2] == ["plan", "plan_without_homes"]
    assert rows["plan"] == with_homes.to_json() and rows["plan_without_homes"] == without.to_json()


def spoken(trace: RoutingTrace, seed: int = 0) -> RoutingTrace:
    """The same with token ids that mostly say what kind of sequence they are from, and some that say nothing."""
    rng = np.random.default_rng(seed)
    groups = np.random.default_rng(99).permutation(16).reshape(4, 4)  # of layer 0, as `classes_trace` has them
    kind = (groups == trace.expert_ids[:, 0, 0, None, None]).any(2).argmax(1)
    said = np.where(rng.random(trace.tokens) < 0.6, 100 + kind, rng.integers(0, 50, trace.tokens))
    return replace(trace, token_ids=said.astype(np.int32))


def test_homes_are_told_by_token_ids_where_they_were_recorded(tmp_path: Path) -> None:
    planned, unseen = spoken(classes_trace(seed=0)), spoken(classes_trace(seed=1), 1)
    request = PlanRequest(Topology(1, 4), objective="dispatch", max_load=1.3, time_limit=6, iterations=4, homes=True)
    made = plan(planned, request)
    assert made.homes is not None and made.homes.told_by == "token_ids" and made.homes.tokens is None
    assert {100, 101, 102, 103} <= set(made.homes.token_ids or ())
    save_plan(made, tmp_path / "p.json")
    assert read_plan(tmp_path / "p.json").homes == made.homes
    with_homes, without = evaluate(made, unseen), evaluate(replace(made, homes=None), unseen)
    assert with_homes.dispatch < 0.5 < 0.8 < without.dispatch
    assert evaluate(made, planned).dispatch == made.objective.value >= made.objective.lower_bound
    at = plan_homes(made, unseen)
    assert (plan_homes(made, replace(unseen, expert_ids=unseen.expert_ids[::-1])) == at).all(), "no routing is looked at"
    with pytest.raises(InputError, match="homes: found no token_ids in the trace, by which they are told"):
        evaluate(made, replace(unseen, token_ids=None))


def test_the_rule_of_token_ids_can_be_applied_without_our_code() -> None:
    """That of docs/planning.md by hand."""
    trace = make_trace(tokens=120, experts=6, layers=2, sequences=5)
    said = np.random.default_rng(0).choice([100, 103, 7, 8], 120).astype(np.int32)
    trace = replace(trace, layer_ids=(3, 4), token_ids=said)
    classes = tuple(
        HomeClass(rank, 1.0, weights) for rank, weights in enumerate([(1.0, -2.0, 0.0), (0.5, 0.0, 1.0), (0, 0, 0)])
    )
    homes = Homes(classes, (), 7, 3.0, (103, 7, 100))
    expected = np.empty(trace.tokens, dtype=int)
    for sequence in range(5):
        own = np.flatnonzero(trace.sequence_ids == sequence)
        first = trace.token_ids[sorted(own, key=lambda t: trace.positions[t])[:7]]
        uses = [np.mean(first == one) for one in (103, 7, 100)]
        rows = [c.rows + sum(w * u for w, u in zip(c.weights, uses, strict=True)) for c in classes]
        expected[own] = int(np.argmin(rows))
    assert (plan_homes(make_plan(homes=homes), trace) == expected).all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 1], "homes.token_ids: found one twice"),
        ([-1], r"homes.token_ids\[0\]: found -1, expected a token id"),
        (3, "homes.token_ids: found int"),
    ],
)
def test_wrong_token_ids_are_named(tmp_path: Path, ids: Any, message: str) -> None:
    save_plan(make_plan(), tmp_path / "p.json")
    value = json.loads((tmp_path / "p.json").read_text())
    value["homes"] = {"told_by": "token_ids", "tokens": None, "balance": 1.1, "token_ids": ids}
    weights = [0.0] * (len(ids) if isinstance(ids, list) else 1)
    value["homes"]["classes"] = [{"home": r, "rows": 1.0, "weights": weights} for r in range(3)]
    (tmp_path / "p.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=message):
        read_plan(tmp_path / "p.json")


def test_rows_by_home_are_what_evaluate_counts() -> None:
    trace = make_trace(tokens=90, sequences=1)
    single = baseline_plan("packed", trace, Topology(1, 4), "all_to_all")
    twice = np.tile(np.array([0, 1, 2, 3, 4, 5, 6, 7, 1, 0, 4, -1], np.int32), (3, 1))
    for made in (single, replace(single, physical_to_logical=twice)):
        rows = homing.rows_by_home(trace, homing.token_rows(trace, made.holds(), Prices(made.topology)))
        for home in range(4):
            there = replace(trace, sequence_ids=np.full(90, home, np.int32))
            assert rows[0, home] == pytest.approx(evaluate(made, there).dispatch, abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), ranks=st.sampled_from([2, 4]), objective=st.sampled_from(["dispatch", "time"]))
def test_taking_turns_is_never_worse_than_its_start(seed: int, ranks: int, objective: str) -> None:
    trace = make_trace(tokens=200, seed=seed, sequences=12)
    request = PlanRequest(Topology(1, ranks), objective=objective, homes=True)
    task = replace(task_of(trace, ranks, prove=False), request=request)
    start = start_of(trace, ranks)
    unmoved = homing.alternate(replace(task, deadline=Deadline(0.0)), start)
    assert (unmoved.holds == start.holds).all()
    better = homing.alternate(task, start)

    def value(solution: Solution) -> float:
        slots = slots_from_assignment(solution.holds.argmax(2), ranks, task.slots)
        made = PlacementPlan(slots, 8, trace.layer_ids, Topology(1, ranks), "m", homes=solution.homes)
        report = evaluate(made, trace)
        return report.dispatch if objective == "dispatch" else report.seconds

    assert value(better) <= value(unmoved)
    assert (better.holds.sum((1, 2)) == 8).all() and better.holds.sum(1).max() <= task.slots


def test_planning_keeps_to_the_load_cap_and_is_repeatable() -> None:
    trace = classes_trace(sequences=12)
    request = PlanRequest(Topology(1, 4), objective="dispatch", max_load=1.2, time_limit=600, iterations=2, homes=True)
    made, again = plan(trace, request, prove=False), plan(trace, request, prove=False)
    assert (made.physical_to_logical == again.physical_to_logical).all() and made.homes == again.homes
    report = evaluate(made, trace)
    assert (report.rank_load.max(1) <= 1.2 * report.rank_load.mean(1) + 1e-9).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), copied=st.booleans(), top_k=st.integers(1, 3))
def test_the_bound_holds_whatever_placement_and_homes(seed: int, copied: bool, top_k: int) -> None:
    trace = make_trace(tokens=40, layers=1, experts=4, top_k=top_k, seed=seed, sequences=4)
    task = replace(task_of(trace, 2), slots=3 if copied else 2)
    for prove in (False, True):
        bound = homing.homes_bound(replace(task, prove=prove), start_of(trace, 2).holds, Deadline(3.0))
        free = [
            homing.rows_by_home(trace, homing.token_rows(trace, p.holds(), Prices(p.topology)))
            for p in plans(trace, Topology(1, 2), task.slots, copied)
        ]
        lengths = np.bincount(trace.sequence_ids, minlength=4)
        assert bound <= min((rows.min(1) * lengths[lengths > 0]).sum() for rows in free) / 40 + 1e-9
    assert homing.homes_bound(task_of(trace, 1), start_of(trace, 1).holds, Deadline(1.0)) == 0.0


def test_three_experts_on_three_ranks_send_two_rows_wherever_home_is() -> None:
    trace = make_trace(tokens=40, layers=2, experts=4, top_k=3, sequences=5)
    for prove in (False, True):
        task = replace(task_of(trace, 4), prove=prove)
        assert homing.homes_bound(task, start_of(trace, 4).holds, Deadline(3.0)) == pytest.approx(2)


def test_with_copies_the_placement_stays_and_gets_homes() -> None:
    trace = make_trace(tokens=200, layers=3, experts=8, sequences=12)
    shape = {"slots_per_rank": 7, "max_load": 2.0, "time_limit": 5, "iterations": 2}
    request = PlanRequest(Topology(1, 2), objective="dispatch", homes=True, **shape)
    made = plan(trace, request)
    assert made.homes is not None and made.holds().sum(2).max() > 1
    assert made.objective.value == evaluate(made, trace).dispatch >= made.objective.lower_bound


def test_several_recordings_are_told_apart_by_the_same_classes() -> None:
    traces = [classes_trace(seed=s, sequences=12) for s in (0, 1)]
    request = PlanRequest(
        Topology(1, 4), objective="dispatch", robust="worst", max_load=1.3, time_limit=8, iterations=2, homes=True
    )
    made = plan(traces, request)
    assert made.objective.value == max(evaluate(made, t).dispatch for t in traces)


@pytest.mark.parametrize("objective", ["hops", "coherent", "load"])
def test_homes_are_refused_where_they_do_not_matter(objective: str) -> None:
    with pytest.raises(InputError, match=f"--homes: found --objective {objective} beside it, expected dispatch or time"):
        plan(make_trace(), PlanRequest(Topology(1, 2), objective=objective, homes=True))
    with pytest.raises(InputError, match="--homes: found True, expected no --exact beside it"):
        PlanRequest(Topology(1, 2), homes=True, exact=True)


def test_homes_need_single_tokens() -> None:
    statistics = LoadStatistics(np.ones((1, 2, 4), np.int64), "m", (0, 1), ("x",))
    with pytest.raises(InputError, match="holds load statistics only"):
        plan(statistics, PlanRequest(Topology(1, 2), homes=True))
    made = baseline_plan("packed", statistics, Topology(1, 2), "all_to_all")
    homes = Homes(tuple(HomeClass(r, 0.0, ()) for r in range(2)), ())
    assert "plan_without_homes" not in compare(replace(made, homes=homes), statistics)
