"""ExFlow and MoETuner on cases worked by hand, against brute force, and on shapes that do not divide."""

from __future__ import annotations

import time
from itertools import permutations, product

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.placement import ilp
from coterie.placement.deadline import Deadline
from coterie.placement.exflow import crossings, exflow, partition, transport
from coterie.placement.moetuner import BETWEEN, even_clusters, link_costs, moetuner, narrowest, place_clusters, tail, unevenness


def chain_of(seed: int, layers: int, experts: int) -> np.ndarray:
    """Skewed token counts from each expert to each of the next layer, `[layers - 1, E, E]`."""
    rng = np.random.default_rng(seed)
    return np.floor(100 * rng.random((max(layers - 1, 0), experts, experts)) ** 4)


def even_splits(experts: int, parts: int) -> list[np.ndarray]:
    splits = [np.array(a) for a in product(range(parts), repeat=experts)]
    return [a for a in splits if np.ptp(np.bincount(a, minlength=parts)) <= (experts % parts > 0)]


def assert_even(assignment: np.ndarray, shape: tuple[int, int], ranks: int) -> None:
    assert assignment.dtype == np.int64
    assert assignment.shape == shape
    for row in assignment:
        counts = np.bincount(row, minlength=ranks)
        assert len(counts) == ranks
        assert counts.max() <= -(-shape[1] // ranks)
        assert counts.min() >= shape[1] // ranks


# Experts 0 and 2 send 10 tokens each to experts 1 and 3, and 1 and 3 send theirs to 0 and 2, so {0, 2} then {1, 3} on one
# rank loses none of them. One stray token from 0 to 0 has to cross: the optimum is 1. Contiguous placement loses half.
ALTERNATING = np.array([[[1, 10, 0, 10], [10, 0, 10, 0], [0, 10, 0, 10], [10, 0, 10, 0]]], dtype=np.float64)


def test_exflow_keeps_together_what_flows_together() -> None:
    found = exflow(ALTERNATING, 1, 2, Deadline(5.0))
    assert crossings(list(ALTERNATING), list(found)) == 1
    first, second = found
    assert first[0] == first[2] == second[1] == second[3]
    assert first[1] == first[3] == second[0] == second[2] != first[0]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(2, 6, 2), (3, 4, 2), (2, 5, 2), (2, 5, 3), (3, 3, 3)]))
def test_one_stage_of_exflow_is_optimal(seed: int, shape: tuple[int, int, int]) -> None:
    layers, experts, parts = shape
    chain = list(chain_of(seed, layers, experts))
    best = min(crossings(chain, list(groups)) for groups in product(even_splits(experts, parts), repeat=layers))
    found = partition(chain, [experts] * layers, parts, Deadline(20), 1)
    assert crossings(chain, found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_exflow_minimises_crossings_between_nodes_first(seed: int) -> None:
    chain = list(chain_of(seed, 2, 8))
    best = min(crossings(chain, [a, b]) for a, b in product(even_splits(8, 2), repeat=2))
    found = exflow(np.array(chain), 2, 2, Deadline(20.0))
    assert_even(found, (2, 8), 4)
    assert crossings(chain, list(found // 2)) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_exflow_then_minimises_crossings_within_each_node(seed: int) -> None:
    transitions = chain_of(seed, 2, 8)
    found = exflow(transitions, 2, 2, Deadline(20.0))
    for node in range(2):
        a, b = np.flatnonzero(found[0] // 2 == node), np.flatnonzero(found[1] // 2 == node)
        inside = [transitions[0][np.ix_(a, b)]]
        best = min(crossings(inside, list(pair)) for pair in product(even_splits(4, 2), repeat=2))
        assert crossings(inside, [found[0][a] % 2, found[1][b] % 2]) == pytest.approx(best)


def test_windows_with_fixed_neighbours_never_lose_and_reach_the_program_of_all_layers(monkeypatch) -> None:
    chain = list(chain_of(1, 5, 6))
    monkeypatch.setattr("coterie.placement.exflow.ROUNDS", 0)
    whole = partition(chain, [6] * 5, 2, Deadline(20), 1)
    monkeypatch.setattr("coterie.placement.exflow.MAX_COEFFICIENTS", 0)
    start = partition(chain, [6] * 5, 2, Deadline(20), 1)
    monkeypatch.setattr("coterie.placement.exflow.MAX_COEFFICIENTS", 3 * 6 * 6 * 2)
    windowed = partition(chain, [6] * 5, 2, Deadline(20), 1)
    assert crossings(chain, whole) <= crossings(chain, windowed) <= crossings(chain, start)


def test_transport_fills_every_group_though_another_pays_more() -> None:
    # All want group 0; of five experts on two groups three may stay, and 0 and 1 lose least by leaving.
    saved = np.array([[1.0, 0], [2, 0], [9, 0], [8, 0], [7, 0]])
    assert transport(saved).tolist() == [1, 1, 0, 0, 0]


# Layer loads 6, 5, 4, 3, 2, 2 on two clusters of three: 11 each is 6+3+2 and 5+4+2, so nothing is left over.
# 9, 1, 1, 1, 1, 1 cannot be even: 9 needs two companions, 11 against 3, each 4 from the mean of 7.
def test_moetuner_clusters_are_as_even_as_can_be() -> None:
    load = np.array([[6.0, 5, 4, 3, 2, 2], [9, 1, 1, 1, 1, 1]])
    found = even_clusters(load, 2, Deadline(20))
    assert_even(found, (2, 6), 2)
    assert [unevenness(row, clusters, 2) for row, clusters in zip(load, found, strict=True)] == [0, 8]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(6, 2), (7, 2), (7, 3), (5, 4)]))
def test_moetuner_clusters_are_optimal(seed: int, shape: tuple[int, int]) -> None:
    experts, clusters = shape
    load = np.floor(100 * np.random.default_rng(seed).random(experts) ** 3)
    best = min(unevenness(load, a, clusters) for a in even_splits(experts, clusters))
    found = even_clusters(load[None], clusters, Deadline(20))[0]
    assert unevenness(load, found, clusters) <= best + 1e-3 * load.sum() / clusters


# Two nodes of one rank; cluster 0 sends 5 tokens to cluster 1, cluster 1 sends 4 to cluster 0 and keeps 1: crossing over,
# the two clusters of the second layer change ranks, only that 1 token crosses, and it costs BETWEEN.
def test_moetuner_turns_layers_so_that_the_busiest_link_carries_least() -> None:
    traffic = np.array([[[0.0, 5], [4, 1]]])
    found = place_clusters(traffic, link_costs(2, 1), Deadline(20))
    assert found[0].tolist() == found[1][::-1].tolist()
    assert tail(traffic, link_costs(2, 1), found) == BETWEEN


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(3, 1, 3), (3, 3, 1), (2, 2, 2), (4, 1, 2)]))
def test_moetuner_places_clusters_optimally(seed: int, shape: tuple[int, int, int]) -> None:
    layers, nodes, per_node = shape
    traffic, costs = chain_of(seed, layers, nodes * per_node), link_costs(nodes, per_node)
    orders = [np.array(order) for order in permutations(range(nodes * per_node))]
    best = min(tail(traffic, costs, list(gpus)) for gpus in product(orders, repeat=layers))
    found = place_clusters(traffic, costs, Deadline(30))
    assert tail(traffic, costs, found) == pytest.approx(best, abs=0.01)


# Loads 4, 3, 2, 1 pair up as {0, 3} and {1, 2} in both layers. All tokens of 0 and 3 go on to 1 and 2 and the other way
# round, so the pairs change ranks between the layers and nothing crosses.
def test_moetuner_balances_first_and_then_saves_what_it_can() -> None:
    transitions = np.array([[[0.0, 2, 2, 0], [2, 0, 0, 1], [1, 0, 0, 1], [0, 1, 0, 0]]])
    load = np.array([[4.0, 3, 2, 1], [4, 3, 2, 1]])
    first, second = moetuner(load, transitions, 1, 2, Deadline(20.0))
    assert first[0] == first[3] != first[1] == first[2]
    assert second[1] == second[2] == first[0]
    assert crossings(list(transitions), [first, second]) == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 6))
def test_the_narrowest_permutation_is_the_best_of_all(seed: int, n: int) -> None:
    cost = np.random.default_rng(seed).integers(0, 12, (n, n)).astype(np.float64)
    found = narrowest(cost)
    assert sorted(found.tolist()) == list(range(n))
    assert cost[range(n), found].max() == min(cost[range(n), list(order)].max() for order in permutations(range(n)))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000), layers=st.integers(1, 4), experts=st.integers(1, 9), nodes=st.integers(1, 3),
    per_node=st.integers(1, 3), kind=st.sampled_from(["random", "zero", "even"]),
)  # fmt: skip
def test_placements_of_any_shape_fill_every_rank_evenly(seed, layers, experts, nodes, per_node, kind) -> None:
    transitions = (
        chain_of(seed, layers, experts) if kind == "random" else np.full((layers - 1, experts, experts), kind == "even") * 1.0
    )
    load = (
        np.random.default_rng(seed).random((layers, experts))
        if kind == "random"
        else np.full((layers, experts), kind == "even") * 1.0
    )
    for found in (
        exflow(transitions, nodes, per_node, Deadline(0.3)),
        moetuner(load, transitions, nodes, per_node, Deadline(0.3)),
    ):
        assert_even(found, (layers, experts), nodes * per_node)


def test_one_rank_holds_everything() -> None:
    transitions = chain_of(0, 3, 4)
    assert not exflow(transitions, 1, 1, Deadline(1.0)).any()
    assert not moetuner(np.ones((3, 4)), transitions, 1, 1, Deadline(1.0)).any()


def test_without_time_an_even_placement_is_returned() -> None:
    transitions = chain_of(0, 20, 32)
    started = time.monotonic()
    assert_even(exflow(transitions, 2, 4, Deadline(0.0)), (20, 32), 8)
    assert_even(moetuner(transitions.sum(2)[[*range(19), 0]], transitions, 2, 4, Deadline(0.0)), (20, 32), 8)
    assert time.monotonic() - started < 30


def test_cbc_solves_where_highspy_is_not_installed(monkeypatch) -> None:
    def refuse(self, lp):
        raise AssertionError("HiGHS was called")

    monkeypatch.setattr(ilp, "highs_is_installed", lambda: False)
    monkeypatch.setattr(ilp.WarmHiGHS, "actualSolve", refuse)
    monkeypatch.setattr("coterie.placement.exflow.ROUNDS", 0)
    assert crossings(list(ALTERNATING), list(exflow(ALTERNATING, 1, 2, Deadline(20.0)))) == 1
    test_moetuner_clusters_are_as_even_as_can_be()
    test_moetuner_turns_layers_so_that_the_busiest_link_carries_least()


@pytest.mark.parametrize("installed", [True, False])
def test_a_solver_states_the_bound_it_proved(monkeypatch, installed: bool) -> None:
    monkeypatch.setattr(ilp, "highs_is_installed", lambda: installed)
    model = pulp.LpProblem("knapsack", pulp.LpMaximize)
    x = [model.add_variable(f"x_{i}", cat="Binary") for i in range(3)]
    model += 5 * x[0] + 4 * x[1] + 3 * x[2]
    model += 4 * x[0] + 3 * x[1] + 2 * x[2] <= 5  # the best is 4 + 3, of weight 5
    assert ilp.run(model, {"x_0": 1.0}, Deadline(20), 1, ilp.GAPS) == ilp.Outcome(True, pytest.approx(7))


@pytest.mark.parametrize("installed", [True, False])
def test_a_solver_that_gives_up_is_warned_about(monkeypatch, installed: bool) -> None:
    monkeypatch.setattr(ilp, "highs_is_installed", lambda: installed)
    model = pulp.LpProblem("impossible", pulp.LpMinimize)
    x = model.add_variable("x", cat="Binary")
    model += x
    model += x >= 2
    with pytest.warns(RuntimeWarning, match="impossible: the solver ended with"):
        assert not ilp.run(model, {}, Deadline(20), 1, ilp.GAPS).found
