"""Predictors on cases worked by hand; what the learned policy makes of routing that repeats; reading ahead in the simulator."""

from __future__ import annotations

import json
import warnings
from pathlib import Path as FilePath

import numpy as np
import pytest
from conftest import make_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.launch.cli import main
from coterie.offload.ahead import Guesser
from coterie.offload.learned import Foresight
from coterie.offload.policies import MAKERS, Lru, LruTags, Tags
from coterie.offload.predictors import PREDICTORS, Activation, Path, Popularity, Predictor, Transition
from coterie.offload.simulate import Belady, Simulation, begins_of, likeliest, simulate, steps_of
from coterie.routing.trace import save_trace

Tokens = list[list[list[int]]]


def show(predictor: Predictor, tokens: Tokens) -> None:
    """Play tokens, each a list of layers' experts."""
    for token in tokens:
        for layer, experts in enumerate(token):
            predictor.observe(layer, np.array(experts, dtype=np.int64))


def test_popularity_counts() -> None:
    popularity = Popularity(2, 3)
    show(popularity, [[[0], [1, 2]], [[0], [2]], [[1]]])
    assert popularity.scores(1).tolist() == [0, 1, 2] and popularity.scores(2).tolist() == [2, 1, 0]


def test_a_transition_is_the_share_of_uses_that_led_there() -> None:
    transition = Transition(2, 3, (1, 2))
    show(transition, [[[0], [1]], [[0], [2]], [[0]]])
    uses = 2 + 4 / 3 + 4  # two complete tokens, what every row starts with, and what a row needs to count for half
    assert transition.scores(1) == pytest.approx([0, 1 / uses, 1 / uses])
    assert transition.scores(2) == pytest.approx([1 / uses, 0, 0])  # 0 followed 0 in the same layer once
    show(transition, [[[0], [1]]])
    assert transition.evidence(1)[1] == pytest.approx(4 / (1 + 4 / 3 + 4))  # expert 1 of layer 1 was used once before


def test_a_sequence_follows_nothing() -> None:
    joined, parted = Transition(2, 3, (1,)), Transition(2, 3, (1,))
    for one in (joined, parted):
        show(one, [[[0], [1]]])
        if one is parted:
            one.begin()
        show(one, [[[2], [1]], [[0], [1]]])
    assert joined.scores(1)[2] > 0 and parted.scores(1)[2] == 0


def test_a_prior_counts_for_so_many_tokens() -> None:
    steps = [[np.array([0]), np.array([1])]] * 128
    transition = Transition(2, 3, (1,))
    transition.learn(steps, np.arange(128) == 0, worth=32)
    assert transition.counts[1][0, 0, 1] == 32
    show(transition, [[[0]]])
    assert likeliest(transition.scores(1), 1).tolist() == [1]


def test_a_path_goes_on_as_those_did_that_were_alike() -> None:
    path = Path(2, 4, tokens=8, fade=0.5, sharpness=1.5)
    show(path, [[[0], [1]], [[2], [3]], [[0]]])  # tokens A and B, and the first layer of C: as alike as 1 and 0
    b = float(np.exp(-1.5))
    whole = 1 + b + 1  # and as much as the best for knowing nothing
    assert path.scores(1) == pytest.approx([0, 1 / whole, 0, b / whole])
    assert path.scores(2) == pytest.approx([b / whole, 0, 1 / whole, 0])  # after A came B, after B what is at hand
    assert path.evidence(1)[1] == pytest.approx(1 / whole)
    show(path, [[[0, 1], [1, 2]]])
    # D has half of its experts in common with A in both layers, with C in the first; B goes on from A's match with C
    assert path.alike[:4] == pytest.approx([0.75, 0.25, 0.25, -np.inf])


def test_a_path_forgets_the_oldest_token() -> None:
    path = Path(1, 4, tokens=2)
    show(path, [[[0]], [[1]], [[2]], [[3]], [[1]]])
    assert path.by_token[0].sum(0).tolist() == [0, 1, 0, 1]
    assert path.scores(1) == pytest.approx([0, 0.5, 0, 0])  # after 3, the one token left to be alike, came 1


def test_an_earlier_sequence_is_found_by_its_cosine() -> None:
    activation = Activation(2, 4, sequences=2)
    show(activation, [[[0], [1]]])
    assert activation.scores(1).tolist() == [1, 0, 0, 0]  # nothing kept yet: the counts of this sequence
    activation.begin()
    show(activation, [[[2], [3]], [[2], [3]]])
    activation.begin()
    show(activation, [[[0, 2], [1]], [[0]]])  # 3 / (sqrt 2) of the first, 1 / sqrt 2 of the second
    assert activation.scores(1) == pytest.approx([0, 2**-0.5, 0, 0])
    activation.begin()  # no room: the first, most alike, gives way
    show(activation, [[[2]]])
    assert activation.held == 2 and activation.scores(1) == pytest.approx([0, 0, 0, 2**-0.5])


def test_likeliest_are_ordered_and_above_zero() -> None:
    assert likeliest(np.array([0.0, 0.2, 0.5, 0.1]), 2).tolist() == [2, 1]
    assert likeliest(np.array([0.0, 0.0, 0.5, 0.0]), 3).tolist() == [2]
    assert likeliest(np.ones(3), 0).tolist() == []


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), max_size=40), slots=st.integers(3, 9))
def test_lru_by_order_holds_as_much_as_lru_by_time(steps: list[list[int]], slots: int) -> None:
    """Of equals in time either may go."""
    both_lru(steps, slots)


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(st.integers(0, 9), min_size=10, max_size=80), slots=st.integers(1, 9))
def test_lru_by_order_is_lru_by_time(steps: list[int], slots: int) -> None:
    for ordered, timed in both_lru([[expert] for expert in steps], slots):
        assert ordered == timed


def both_lru(steps: list[list[int]], slots: int) -> list[tuple[int, int]]:
    """What each missed, by step."""
    ordered, tags, policy = LruTags(slots), Tags(10, slots), Lru(1, 10)
    missed = []
    for step in steps:
        at = np.array(sorted(step), dtype=np.int64)
        policy.observe(0, at)
        absent = tags.absent(at)
        tags.admit(at, absent, policy)
        missed.append((ordered.use(at.tolist()), len(absent)))
        assert len(ordered.order) == tags.held
    return missed


def markov(tokens: int = 400, layers: int = 4, experts: int = 24, top_k: int = 2, kinds: int = 24) -> list[list[np.ndarray]]:
    """Tokens of so many kinds, each with its own experts and followed by one of two kinds."""
    rng = np.random.default_rng(1)
    picks = np.stack([[rng.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(kinds)])
    followers, kind, steps = np.stack([rng.permutation(kinds)[:2] for _ in range(kinds)]), 0, []
    for _ in range(tokens):
        steps.append([np.sort(row) for row in picks[kind]])
        kind = followers[kind][rng.integers(2)]
    return steps


@pytest.mark.parametrize("slots", [12, 24])
def test_foresight_knows_what_follows(slots: int) -> None:
    steps = markov()
    rate = {
        n: simulate(steps, 24, slots, MAKERS[n](4, 24, 2, slots)).hit_rate for n in ("lru", "reuse", "foresight", "coterie")
    }
    assert rate["foresight"] > rate["reuse"] + 0.015 > rate["lru"] + 0.1, rate
    assert rate["coterie"] > rate["reuse"] + 0.01, rate


def test_foresight_stands_routing_without_choice() -> None:
    """Every expert always, which makes the evidence collinear, for long enough to forget the start; then none at all."""
    policy = Foresight(1, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30_000):
            policy.observe(0, np.arange(3))
        for _ in range(100):
            policy.observe(0, np.zeros(0, dtype=np.int64))
    assert np.isfinite(policy.keep()).all() and np.isfinite(policy.weights).all()


def test_a_step_larger_than_the_cache_leaves_it_full() -> None:
    tags, policy = Tags(12, 4), Lru(1, 12)
    for step, held in (([0, 1], 2), ([3, 4, 5, 6, 7, 8], 4), ([9], 4)):
        at = np.array(step)
        policy.observe(0, at)
        tags.admit(at, tags.absent(at), policy)
        assert tags.held == tags.resident.sum() == held
    assert tags.resident[9]


class Clairvoyant:
    """Knows the next layer's experts, or those that are wrong."""

    name = "clairvoyant"

    def __init__(self, steps: list[list[np.ndarray]], experts: int, wrong: bool) -> None:
        self.flat, self.experts, self.wrong, self.now = [s for token in steps for s in token], experts, wrong, 0

    def begin(self) -> None:
        pass

    def observe(self, layer: int, experts: np.ndarray) -> None:
        self.now += 1

    def scores(self, ahead: int) -> np.ndarray:
        known = np.zeros(self.experts)
        known[self.flat[min(self.now + ahead, len(self.flat)) - 1]] = 1
        return 1 - known if self.wrong else known


def test_what_is_read_ahead_counts_used_or_not() -> None:
    steps = [[np.array([0]), np.array([1])], [np.array([2]), np.array([3])], [np.array([4]), np.array([5])]]
    right = simulate(steps, 6, 4, MAKERS["lru"](2, 6, 1, 4), Clairvoyant(steps, 6, wrong=False))
    assert right.hit_rate == pytest.approx(-1 / 6)  # six reads, and one for the token that did not come
    assert right.hidden == pytest.approx(5 / 6)  # all but the first
    wrong = simulate(steps, 6, 4, MAKERS["lru"](2, 6, 1, 4), Clairvoyant(steps, 6, wrong=True))
    assert wrong.hit_rate < 0 and wrong.hidden == 0
    assert simulate(steps, 6, 4, MAKERS["lru"](2, 6, 1, 4)).hidden is None


@pytest.mark.parametrize("name", sorted(PREDICTORS))
def test_reading_ahead_never_transfers_less_than_belady(name: str) -> None:
    trace = make_trace(tokens=150, layers=4)
    simulation = Simulation(trace, 0.25)
    steps = steps_of(trace)
    best = simulate(steps, 8, simulation.slots, Belady(steps, 8)).hit_rate
    found = simulation.run(f"coterie+{name}")
    assert found.hit_rate <= best and found.hidden is not None and 0 < found.hidden < 1


def test_recall_is_what_structure_allows(tmp_path: FilePath, capsys: pytest.CaptureFixture[str]) -> None:
    save_trace(make_trace(tokens=300, layers=4), tmp_path / "t.safetensors")
    assert main(["cache-sim", str(tmp_path / "t.safetensors"), "--slots", "0.25", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["predictors"]
    assert set(found) == set(PREDICTORS) and all(set(one["recall"]) == {"1", "2", "3"} for one in found.values())
    assert found["transition"]["recall"]["1"] > found["popularity"]["recall"]["1"] + 0.1


def test_a_prior_helps_from_the_start(tmp_path: FilePath, capsys: pytest.CaptureFixture[str]) -> None:
    trace = make_trace(tokens=400, layers=4)
    save_trace(trace.select(np.arange(390)), tmp_path / "prior.safetensors")
    save_trace(trace.select(np.arange(390, 400)), tmp_path / "t.safetensors")
    recalls = []
    for more in ([], ["--prior", str(tmp_path / "prior.safetensors")]):
        assert main(["cache-sim", str(tmp_path / "t.safetensors"), "--slots", "0.25", "--json", *more]) == 0
        recalls.append(json.loads(capsys.readouterr().out)["predictors"])
    assert recalls[1]["transition"]["recall"]["1"] > recalls[0]["transition"]["recall"]["1"] + 0.1
    assert recalls[1]["path"]["recall"] == recalls[0]["path"]["recall"]


def test_a_prior_of_another_model_is_refused(tmp_path: FilePath, capsys: pytest.CaptureFixture[str]) -> None:
    save_trace(make_trace(tokens=10), tmp_path / "t.safetensors")
    save_trace(make_trace(tokens=10, layers=2), tmp_path / "prior.safetensors")
    assert (
        main(["cache-sim", str(tmp_path / "t.safetensors"), "--slots", "0.25", "--prior", str(tmp_path / "prior.safetensors")])
        == 2
    )
    assert "--prior: layer_ids: found (0, 1), expected (0, 1, 2), as the trace has" in capsys.readouterr().err


def test_sequences_begin_where_the_id_changes() -> None:
    trace = make_trace(tokens=50)
    begins = begins_of(trace)
    assert begins[0] and begins.sum() == len(np.unique(trace.sequence_ids))


def test_the_better_guesser_decides_and_none_where_both_are_wrong() -> None:
    """Layer 1 asks for what layer 0 did: the path learns it; the router is always wrong."""
    guesser, rng = Guesser(2, 16), np.random.default_rng(0)
    said: list[list[int]] = []
    for _ in range(600):
        first = rng.permutation(16)[:2].tolist()
        guesser.observe(0, first)
        said.append(list(guesser.guess(1, [(first[0] + 1) % 16], 2)))
        guesser.observe(1, first)
    assert guesser.right["router"] < 0.3 and guesser.right["path"] > 0.6
    assert said[0] and len(said[-1]) == 2, "the router is believed at first, the path in the end"
    for _ in range(600):  # now nothing follows from anything
        guesser.observe(0, rng.permutation(16)[:2].tolist())
        said.append(list(guesser.guess(1, [int(rng.integers(16))], 2)))
        guesser.observe(1, rng.permutation(16)[:2].tolist())
    assert said[-1] == []
