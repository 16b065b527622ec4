"""Keys and values in memory with room: what attention is given is what transformers' own cache gives."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import COMMON, FAMILIES, make_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from coterie.moe.batch import Batch, Request, joined, keeps_only_attention, selected
from coterie.moe.generate import Sampling
from coterie.moe.kv import SLACK, GrowingCache, GrowingLayer
from coterie.moe.memory import estimate, workload
from coterie.moe.model import Model, load
from coterie.moe.sizes import _tensors, sizes_of

ROWS, HEADS, SIZE = 3, 2, 8
KEYS_AND_VALUES_ONLY = [  # others have transformers' own cache
    family for family in sorted(FAMILIES) if keeps_only_attention(AutoConfig.for_model(family, **COMMON | FAMILIES[family]))
]


def some(positions: int, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, HEADS, positions, SIZE), torch.randn(rows, HEADS, positions, SIZE + 1)


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["one", "many", "crop", "rows", "swap", "repeat", "reset"]), min_size=1, max_size=12),
    most=st.integers(0, 200),
)  # fmt: skip
def test_it_holds_what_transformers_own_holds_whatever_is_done_to_it(steps: list[str], most: int) -> None:
    mine, right = GrowingLayer(most), DynamicLayer()
    for step in ("many", *steps):
        rows = ROWS if right.keys is None or not right.keys.numel() else len(right.keys)
        if step in ("one", "many"):
            keys, values = some(1 if step == "one" else 30, rows)
            found = mine.update(keys, values)
            assert all(torch.equal(f, r) for f, r in zip(found, right.update(keys, values), strict=True))
            room = mine.rooms[0].shape[-2]  # type: ignore[union-attr]
            assert right.keys is not None and right.keys.shape[-2] <= room <= right.keys.shape[-2] + SLACK + 2 * steps.count(
                "crop"
            )
        for layer in (mine, right):
            if step == "crop":
                layer.crop(-2)
            elif step == "rows" and rows > 1:
                layer.batch_select_indices(torch.arange(rows - 1))
            elif step == "swap":
                layer.reorder_cache(torch.arange(rows).flip(0))
            elif step == "repeat" and rows < 10:
                layer.batch_repeat_interleave(2)
            elif step == "reset":
                layer.reset()
        assert mine.get_seq_length() == right.get_seq_length()
        assert right.keys is None or torch.equal(mine.keys, right.keys)


def test_positions_are_copied_once_in_a_while_and_room_ends_where_the_text_does() -> None:
    layer, places = GrowingLayer(SLACK + 29), []
    for step in range(SLACK + 20):
        keys, _ = layer.update(*some(10 if step == 0 else 1))
        places.append(keys.data_ptr())
    assert len(set(places)) == 2
    assert layer.rooms[0].shape[-2] == keys.shape[-2] == SLACK + 29
    layer.update(*some(1))
    assert layer.rooms[0].shape[-2] == 2 * SLACK + 30, "more than were expected"


def test_a_step_without_gradients_leaves_a_cache_that_others_can_go_on_with() -> None:
    layer = GrowingLayer(100)
    with torch.inference_mode():
        layer.update(*some(4))
    keys, _ = layer.update(*some(1))
    assert keys.shape[-2] == 5


def test_batches_that_join_and_rows_that_leave_hold_nothing_of_what_they_were() -> None:
    mask, other = torch.ones(1, 7, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64)
    caches = GrowingCache(7 + 5), GrowingCache(4 + 90)
    for one, rows, length in zip(caches, (1, 2), (7, 4), strict=True):
        one.update(*some(length, rows), 0)
    whole, both = joined(mask, caches[0], other, caches[1])
    assert both.most == 4 + 90 and both.layers[0].keys.shape == (3, HEADS, 7, SIZE)
    _, left = selected(whole, both, torch.tensor([1, 2]))
    assert left.most == 4 + 90 and left.layers[0].keys.shape == (2, HEADS, 4, SIZE)
    for one in (*caches, both):
        assert not _tensors(vars(one.layers[0]))


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=6), batch=st.integers(1, 4))
def test_no_more_is_held_than_was_told(sizes: list[tuple[int, int]], batch: int) -> None:
    model, seen = tiny(), [0]
    requests = [Request(index, tuple(range(3, 3 + prompt)), new) for index, (prompt, new) in enumerate(sizes)]
    forward = Batch._forward

    def watched(self, *arguments):
        logits, cache = forward(self, *arguments)
        seen[0] = max(seen[0], sum(room.nbytes for layer in cache.layers for room in layer.rooms))
        return logits, cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "_forward", watched)
        choice, _ = model.settle(requests, batch)
        model.run(requests, batch, Sampling(), choice)
    told = estimate(sizes_of(model.shape, model.transformers, torch.float32), model.plan, "local", workload(requests, batch))
    assert 0 < seen[0] <= told[0].states


@cache
def tiny() -> Model:
    with tempfile.TemporaryDirectory() as folder:
        made = load(make_model("qwen3_moe", Path(folder), num_hidden_layers=1), device="cpu")
    made.transformers.generation_config.eos_token_id = None
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", KEYS_AND_VALUES_ONLY)
def test_every_step_of_every_family_has_the_bits_of_transformers_cache(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(family, tmp_path), dtype=dtype).eval()
    caches, ids = (GrowingCache(0), DynamicCache()), torch.arange(2 * 90).view(2, 90) % 50 + 3
    with torch.inference_mode():
        for at in (slice(0, 12), *(slice(n, n + 1) for n in range(12, 90))):
            found, right = (model(ids[:, at], past_key_values=c, use_cache=True).logits for c in caches)
            assert torch.equal(found, right), at
