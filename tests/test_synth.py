"""Synthetic traces have the structure that they are said to have."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.placement.cost import CostReport, evaluate
from coterie.placement.plan import PlacementPlan, slots_from_assignment
from coterie.placement.topology import Topology
from coterie.routing.affinity import expert_load, transition_counts
from coterie.routing.errors import InputError
from coterie.routing.synth import FAMILIES, aligned_groups, circle_places, make, misaligned_groups
from coterie.routing.trace import RoutingTrace

GOOD = dict(family="aligned", tokens=50, layers=2, num_experts=32, top_k=4, groups=4)


def report(trace: RoutingTrace, assignment: np.ndarray, ranks: int) -> CostReport:
    slots = slots_from_assignment(assignment, ranks, trace.num_experts // ranks)
    plan = PlacementPlan(slots, trace.num_experts, trace.layer_ids, Topology(1, ranks), trace.model)
    return evaluate(plan, trace)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), ranks=st.sampled_from([1, 2, 4, 8]), top_k=st.integers(1, 4), skew=st.sampled_from([0.0, 1.0]))
def test_aligned_tokens_never_hop_when_groups_share_a_rank(seed: int, ranks: int, top_k: int, skew: float) -> None:
    trace = make("aligned", 200, 4, 32, top_k, seed, groups=8, skew=skew)
    groups = aligned_groups(4, 32, 8, seed)
    assert report(trace, groups // (8 // ranks), ranks).hops == 0
    contiguous = np.tile(np.arange(32) * ranks // 32, (4, 1))
    assert ranks == 1 or report(trace, contiguous, ranks).hops > 0.25, "labels of each layer are drawn anew"


def test_noise_is_the_share_of_picks_outside_the_group() -> None:
    trace = make("aligned", 4000, 2, 64, 4, groups=8, noise=0.25)
    groups = aligned_groups(2, 64, 8)
    here = groups[np.arange(2)[None, :, None], trace.expert_ids]
    at_home = (here[..., None] == np.arange(8)).sum(2).max(2)  # [token, layer]: picks in the commonest group
    assert 1 - at_home.mean() / 4 == pytest.approx(0.25, abs=0.03)
    everything_strays = make("aligned", 200, 2, 16, 8, groups=2, noise=1.0)
    assert everything_strays.expert_ids.min() >= 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), groups=st.sampled_from([2, 4]), overlap=st.sampled_from([0.25, 0.5, 0.75]))
def test_misaligned_pairs_of_layers_can_do_without_hops_but_not_all_together(seed: int, groups: int, overlap: float) -> None:
    trace = make("misaligned", 600, 3, 32, 2, seed, groups=groups, overlap=overlap)
    incoming, outgoing = misaligned_groups(3, 32, groups, overlap, seed)
    for layer in range(2):
        counts = transition_counts(trace)[layer]
        assert counts.sum() == 600 * 4
        assert not counts[outgoing[layer][:, None] != incoming[layer + 1][None, :]].any()
    for grouping in (incoming, outgoing):
        assert report(trace, grouping, groups).hops > 0
    assert pieces(transition_counts(trace)) == 1, "so that any placement on two ranks has hops"


def pieces(transitions: np.ndarray) -> int:
    """Connected components of the experts that were used, joined where a token used both in consecutive layers."""
    layers, size = transitions.shape[0] + 1, transitions.shape[1]
    label = np.arange(layers * size).reshape(layers, size)
    edges = [(label[layer, e], label[layer + 1, f]) for layer, e, f in np.argwhere(transitions)]
    parent = list(range(layers * size))

    def root(x: int) -> int:
        while parent[x] != x:
            x = parent[x]
        return x

    for a, b in edges:
        parent[root(a)] = root(b)
    return len({root(x) for edge in edges for x in edge})


def test_overlap_is_the_share_of_a_group_that_stays_together() -> None:
    incoming, outgoing = misaligned_groups(5, 64, 4, overlap=0.75)
    assert ((incoming == outgoing).mean(1) == 0.75).all()
    assert all((np.bincount(row) == 16).all() for row in (*incoming, *outgoing))
    assert len({tuple(row) for row in incoming}) == 5


def test_geometric_affinity_falls_with_distance() -> None:
    trace = make("geometric", 20_000, 3, 64, 4, noise=0.2, drift=0.03)
    places = circle_places(3, 64)
    for layer, counts in enumerate(transition_counts(trace)):
        apart = np.abs(places[layer][:, None] - places[layer + 1][None, :])
        apart = np.minimum(apart, 64 - apart)
        means = [counts[apart == d].mean() for d in range(16)]
        assert all(near > far for near, far in zip(means[::2], means[2::2], strict=False) if near > 0)
        assert means[0] > 10 * means[12]


def test_geometric_tokens_without_noise_use_neighbouring_places() -> None:
    trace = make("geometric", 500, 3, 40, 4)
    at = np.sort(circle_places(3, 40)[np.arange(3)[None, :, None], trace.expert_ids], axis=2)
    gaps = np.diff(at, axis=2, append=at[..., :1] + 40)
    assert (np.sort(gaps, axis=2) == [1, 1, 1, 37]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_trace(family: str) -> None:
    first, again, other = (make(family, 300, 3, 32, 4, seed, noise=0.1, groups=4, skew=0.5) for seed in (1, 1, 2))
    assert (first.expert_ids == again.expert_ids).all()
    assert (first.expert_ids != other.expert_ids).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_skew_makes_some_experts_busier(family: str) -> None:
    even, skewed = (expert_load(make(family, 3000, 2, 64, 2, groups=4, skew=skew, noise=0.3)) for skew in (0.0, 1.0))
    assert even.max() / even.mean() < 1.5 < 2 < skewed.max() / skewed.mean()


def test_sequences_are_consecutive_and_counted_from_zero() -> None:
    trace = make("aligned", 10, 1, 8, 2, groups=2, sequences=3)
    assert trace.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert trace.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("experts", "top_k", "groups"), [(1, 1, 1), (4, 1, 2), (600, 10, 6), (16, 4, 2)])
def test_small_and_large_layers_are_made(family: str, experts: int, top_k: int, groups: int) -> None:
    if family == "misaligned" and experts == 1:
        experts, groups = 2, 1
    assert make(family, 70, 2, experts, top_k, groups=groups).expert_ids.shape == (70, 2, top_k)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(family="random"), "family: found 'random', expected aligned, misaligned, geometric"),
        (dict(tokens=0), "tokens: found 0, expected 1 or more"),
        (dict(layers=0), "layers: found 0"),
        (dict(num_experts=0), "num_experts: found 0, expected 1 to 32767"),
        (dict(top_k=33), r"top_k: found 33, expected 1 to 32 \(num_experts\)"),
        (dict(groups=5), r"groups: found 5, expected a divisor of 32 \(num_experts\)"),
        (dict(groups=16), "groups: found 16, expected at most 8"),
        (dict(noise=1.5), "noise: found 1.5, expected 0 to 1"),
        (dict(noise=float("nan")), "noise: found nan"),
        (dict(noise=0.1, groups=1), "noise: found 0.1, expected 0: 0 experts are outside a group"),
        (dict(skew=-1.0), "skew: found -1.0, expected 0 to 4"),
        (dict(drift=float("inf")), "drift: found inf, expected 0 to 1"),
        (dict(sequences=51), r"sequences: found 51, expected 1 to 50 \(tokens\)"),
        (dict(seed=-1), "seed: found -1, expected 0 or more"),
        (dict(family="geometric", seed=-1), "seed: found -1"),
        (dict(family="misaligned", overlap=2.0), "overlap: found 2.0, expected 0 to 1"),
        (dict(family="misaligned", overlap=0.9), r"overlap: found 0.9, expected a share that leaves both parts .* top_k = 4"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**GOOD | change)
