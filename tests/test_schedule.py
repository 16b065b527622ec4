"""Which prompts run side by side where experts are on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from thread_ranks import load, on_ranks
from tiny_models import make_model
from torch import nn

import coterie
from coterie.moe.batch import Request
from coterie.moe.collectives import Group
from coterie.moe.schedule import in_order


def test_alike_prompts_run_side_by_side() -> None:
    """Tokens 0 to 3 go to experts 0 and 1, tokens 4 to 7 to experts 2 and 3, in every layer."""
    embed = nn.Embedding(8, 4, _weight=torch.eye(4).repeat_interleave(2, 0) + 0.01)
    routers = [torch.eye(4), torch.eye(4)]
    requests = [Request(i, tuple(range(4 * (i % 2), 4 * (i % 2) + 4)), 5) for i in range(12)]
    order = [request.index % 2 for request in in_order(requests, routers, embed, 3)]
    assert order == [0] * 6 + [1] * 6
    assert sorted(r.index for r in in_order(requests, routers, embed, 3)) == list(range(12))


def test_what_fits_in_one_batch_or_has_no_router_stays_as_given() -> None:
    requests = [Request(i, (i,), 5) for i in range(4)]
    assert in_order(requests, [torch.eye(4)], nn.Embedding(8, 4), 4) == requests
    assert in_order(requests, [], nn.Embedding(8, 4), 2) == requests


def test_outputs_come_in_the_order_of_the_prompts_and_invariant_text_stays_the_same(tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", tmp_path)
    prompts = [coterie.Prompt(token_ids=(1 + i * 7 % 90, 2 + i * 31 % 90, 5)) for i in range(9)]
    given = coterie.load(folder, batch_invariant=True)
    cached = coterie.load(folder, batch_invariant=True, slots=6)
    requests = cached.text.requests(prompts, 6)
    assert [r.index for r in cached.scheduled(requests, 3)] != list(range(9)) == [r.index for r in given.scheduled(requests, 3)]
    right, found = (model.generate(prompts, 6, batch_size=3)[0] for model in (given, cached))
    assert [o.token_ids for o in found] == [o.token_ids for o in right]


def test_every_rank_runs_prompts_in_the_first_ones_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each rank's processor rounded in its own way."""
    folder = make_model("qwen3_moe", tmp_path)
    orders = iter([[2, 0, 1], [1, 2, 0]])
    monkeypatch.setattr("coterie.moe.model.in_order", lambda requests, *_: [requests[i] for i in next(orders)])

    def order(group: Group) -> list[int]:
        model = load(folder, dtype="float32", group=group, slots=4)
        return [r.index for r in model.scheduled([Request(i + 7, (5, 6), 1) for i in range(3)], 1)]

    assert on_ranks(2, order) == [[9, 7, 8]] * 2
