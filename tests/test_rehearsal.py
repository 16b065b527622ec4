"""How long ranks wait for each other is tried out before strategies are chosen, and leaves no mark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from thread_ranks import load, on_ranks
from tiny_models import make_model

from coterie.moe.batch import Request
from coterie.moe.choose import Choice, Links, Pace, Traits, Trial, choose, decide, predict, untried
from coterie.moe.collectives import Group
from coterie.moe.families import ModelShape
from coterie.moe.probe import measure
from coterie.moe.rehearsal import Rehearsal
from coterie.placement.topology import Link

LINKS = Links(Link(1e9, 1e-6), Link(1e8, 1e-5))


PLAIN = Traits(row_bytes=1000, back_bytes=900, ranks=2.0, nodes=0.9, moves=3.0, top_k=2)
COMPUTING = Pace(2e-3, 1e-5)


def two_nodes() -> Group:
    group = Group()
    group.size, group.ranks_per_node = 4, 2
    return group


def test_strategies_that_were_not_tried_wait_as_the_first_one() -> None:
    trial = Trial(COMPUTING, {"all_to_all": Pace(2e-3, 1e-5)}, 5)
    alone, tried = (decide(PLAIN, LINKS, two_nodes(), 40, 8, trial=t).prefill_seconds for t in (None, trial))
    assert set(alone) == {"all_to_all", "hierarchical", "overlapped", "all_gather", "replicated"}
    for name, seconds in alone.items():
        assert tried[name] - seconds == pytest.approx(2e-3 + 40 * 1e-5), name


def test_links_that_do_better_than_measured_do_so_for_every_strategy() -> None:
    alone = decide(PLAIN, LINKS, two_nodes(), 40, 8).prefill_seconds
    better = Trial(COMPUTING, {"all_to_all": Pace(-0.25 * alone["all_to_all"])}, 5)
    tried = decide(PLAIN, LINKS, two_nodes(), 40, 8, trial=better).prefill_seconds
    assert tried == {name: pytest.approx(0.75 * seconds) for name, seconds in alone.items()}
    impossible = Trial(COMPUTING, {"all_to_all": Pace(-1.0)}, 5)
    assert set(decide(PLAIN, LINKS, two_nodes(), 40, 8, trial=impossible).prefill_seconds.values()) == {0.0}


def test_one_that_was_tried_is_chosen_by_how_long_it_took() -> None:
    slow_links = Links(Link(1e9, 1e-6), Link(1e6, 1e-5))
    trial = Trial(COMPUTING, {"all_to_all": Pace()}, 5)
    choice = decide(PLAIN, slow_links, two_nodes(), 40, 8, trial=trial)
    assert choice.prefill == "hierarchical"
    assert "hierarchical" in untried(choice, trial, 40, 8) and "all_to_all" not in untried(choice, trial, 40, 8)
    slower = replace(trial, waits={**trial.waits, "hierarchical": Pace(1.0)})
    again = decide(PLAIN, slow_links, two_nodes(), 40, 8, trial=slower)
    assert again.prefill != "hierarchical" and again.prefill_seconds["hierarchical"] > 1
    assert "hierarchical" not in untried(again, slower, 40, 8)


def test_of_equals_the_simplest_is_chosen() -> None:
    assert choose({"all_to_all": 1.0, "hierarchical": 0.99}) == "all_to_all"
    assert choose({"all_to_all": 1.0, "hierarchical": 0.9}) == "hierarchical"
    assert choose({"all_to_all": 1.0, "hierarchical": 0.9}, rest=10.0) == "all_to_all"


def rehearsed(folder: Path, group: Group) -> tuple[Trial, bool]:
    model = load(folder, strategy="all_to_all", dtype="float32", group=group)
    model.context.loads = torch.zeros(2, 8, dtype=torch.int64)
    traffic = group.traffic
    traffic.rows, traffic.step = 7, 3
    before = {name: getattr(traffic, name) for name in ("rows", "bytes", "overhead", "step", "layer")}
    context = dict(vars(model.context))
    strategy = model.dispatcher.strategy
    rehearsal = Rehearsal(model.transformers, model.context, strategy("all_to_all"), PLAIN, LINKS, 2, 9)
    found = rehearsal.compared([strategy("overlapped"), strategy("all_gather")], rehearsal.begin())
    unchanged = all(getattr(traffic, name) == value for name, value in before.items())
    same = all(vars(model.context)[name] is value for name, value in context.items())
    return found, unchanged and same and not model.context.loads.any() and not traffic.seconds


def test_a_rehearsal_is_the_same_on_all_ranks_and_leaves_no_mark(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)
    found = on_ranks(3, lambda group: rehearsed(tmp_path, group))
    trials = [trial for trial, _ in found]
    assert all(clean for _, clean in found)
    assert trials.count(trials[0]) == 3 and set(trials[0].waits) == {"all_to_all", "overlapped", "all_gather"}
    assert trials[0].computing.seconds(8) > 0 and trials[0].layers == 3


def test_what_was_rehearsed_is_predicted_as_it_went(tmp_path: Path, monkeypatch) -> None:
    """Steps of known length, by strategies that differ: the prediction for the sizes tried is their length."""
    make_model("mixtral", tmp_path)
    lengths = {"all_to_all": 0.08, "overlapped": 0.05}

    def speeds(group: Group) -> list[float]:
        model = load(tmp_path, dtype="float32", group=group)
        strategy = model.dispatcher.strategy
        rehearsal = Rehearsal(model.transformers, model.context, strategy("all_to_all"), PLAIN, LINKS, 2, 8)
        monkeypatch.setattr(Rehearsal, "_timed", lambda self, run: (run(), (lengths[self.context.strategy.name], 0.01, 64))[1])
        trial = rehearsal.compared([strategy("overlapped")], rehearsal.begin())
        known = rehearsal.seen, LINKS, group.size, group.ranks_per_node, 8, group.free_bytes, group.counts_inside
        return [trial.tokens_per_second(2, 8, predict(n, *known) + trial.waits[n].seconds(8)) for n in lengths]

    for found in on_ranks(2, speeds):
        assert found == [pytest.approx(2 * 8 / seconds) for seconds in lengths.values()]


def test_whole_steps_are_told_in_tokens_a_second() -> None:
    """Five layers of 2 ms and 8 tokens' 10 us each; what an exchange adds is the chosen strategy's."""
    assert decide(PLAIN, LINKS, two_nodes(), 40, 8).tokens_per_second == {}
    choice = decide(PLAIN, LINKS, two_nodes(), 40, 8, trial=Trial(COMPUTING, {"all_to_all": Pace(1e-3)}, 5))
    assert choice.tokens_per_second == {
        "prefill": pytest.approx(4 * 40 / (5 * (2e-3 + 40e-5 + choice.prefill_seconds[choice.prefill]))),
        "decode": pytest.approx(4 * 8 / (5 * (2e-3 + 8e-5 + choice.decode_seconds[choice.decode]))),
    }
    assert choice.describe().endswith("(decode)")


def test_a_choice_counts_no_rows_and_no_use_of_the_rehearsal(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)

    def chosen(group: Group) -> tuple[int, float]:
        model = load(tmp_path, dtype="float32", group=group)
        choice = model.dispatcher.choice([Request(0, (1, 2, 3), 4)], 2, model.transformers, model.context)
        assert isinstance(model.shape, ModelShape)
        return group.traffic.rows, min(choice.decode_seconds.values())

    for rows, least in on_ranks(2, chosen):
        assert rows == 0 and least >= 0


def test_a_batch_invariant_run_does_not_choose_what_refuses_it(tmp_path: Path, monkeypatch) -> None:
    make_model("mixtral", tmp_path)
    heard: list[frozenset[str]] = []

    def decided(traits, links, group, prompt_tokens, rows, steps, without, trial):
        heard.append(without)
        return Choice("all_to_all", "all_to_all", {"all_to_all": 1.0}, {"all_to_all": 1.0})

    monkeypatch.setattr("coterie.moe.dispatcher.decide", decided)
    for invariant in (False, True):

        def chosen(group: Group, invariant: bool = invariant) -> None:
            model = load(tmp_path, dtype="float32", group=group, batch_invariant=invariant)
            model.dispatcher.choice([Request(0, (1, 2, 3), 4)], 2, model.transformers, model.context)

        on_ranks(2, chosen)
    assert ["coherent" in without for without in heard] == [False, False, True, True]


def test_links_that_cannot_be_kept_end_nothing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="the measured links cannot be kept"):
        found = on_ranks(2, measure)
    assert found[0] == found[1] and found[0].within.bytes_per_second > 0
