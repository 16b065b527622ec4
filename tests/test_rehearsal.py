"""How long ranks wait for each other is tried out before strategies are chosen, and leaves no mark."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from thread_ranks import load, on_ranks
from tiny_models import make_model

from coterie.moe.batch import Request
from coterie.moe.choose import Choice, Links, Traits, Waits, predict
from coterie.moe.collectives import Group
from coterie.moe.families import ModelShape
from coterie.moe.probe import measure
from coterie.moe.rehearsal import rehearse
from coterie.placement.topology import Link

LINKS = Links(Link(1e9, 1e-6), Link(1e8, 1e-5))


def test_waiting_is_told_of_every_strategy_alike() -> None:
    plain = Traits(row_bytes=1000, back_bytes=900, ranks=2.0, nodes=0.9, moves=3.0, top_k=2)
    waiting = Traits(**{**vars(plain), "waits": Waits(fixed=2e-3, per_token=1e-5)})
    for name in ("all_to_all", "hierarchical", "all_gather", "replicated", "coherent", "overlapped"):
        before, after = (predict(name, traits, LINKS, 4, 2, 30, 1 << 10, True) for traits in (plain, waiting))
        assert after - before == pytest.approx(2e-3 + 30 * 1e-5), name


def rehearsed(folder: Path, group: Group) -> tuple[Waits, bool]:
    model = load(folder, strategy="all_to_all", dtype="float32", group=group)
    model.context.loads = torch.zeros(2, 8, dtype=torch.int64)
    traffic = group.traffic
    traffic.rows, traffic.step = 7, 3
    before = {name: getattr(traffic, name) for name in ("rows", "bytes", "overhead", "step", "layer")}
    context = dict(vars(model.context))
    found = rehearse(model.transformers, model.context, model.dispatcher.strategy("all_to_all"), LINKS, 2, 9)
    unchanged = all(getattr(traffic, name) == value for name, value in before.items())
    same = all(vars(model.context)[name] is value for name, value in context.items())
    return found, unchanged and same and not model.context.loads.any() and not traffic.seconds


def test_a_rehearsal_is_the_same_on_all_ranks_and_leaves_no_mark(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)
    found = on_ranks(3, lambda group: rehearsed(tmp_path, group))
    waits = [waits for waits, _ in found]
    assert all(clean for _, clean in found)
    assert waits.count(waits[0]) == 3 and waits[0].seconds(9) > 0 and waits[0].per_token >= 0


def test_a_choice_counts_no_rows_and_no_use_of_the_rehearsal(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)

    def chosen(group: Group) -> tuple[int, float]:
        model = load(tmp_path, dtype="float32", group=group)
        choice = model.dispatcher.choice([Request(0, (1, 2, 3), 4)], 2, model.transformers, model.context)
        assert isinstance(model.shape, ModelShape)
        return group.traffic.rows, min(choice.decode_seconds.values())

    for rows, least in on_ranks(2, chosen):
        assert rows == 0 and least > 0


def test_a_batch_invariant_run_does_not_choose_what_refuses_it(tmp_path: Path, monkeypatch) -> None:
    make_model("mixtral", tmp_path)
    heard: list[frozenset[str]] = []

    def decided(traits, links, group, prompt_tokens, rows, steps, without):
        heard.append(without)
        return Choice("all_to_all", "all_to_all", {}, {})

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
