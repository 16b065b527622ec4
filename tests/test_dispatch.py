"""The dispatch arithmetic without processes, and ranks simulated in one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import random_experts, random_plan, random_routing, share_of
from thread_ranks import on_ranks

from coterie.kernels.experts import grouped_experts, reference_experts
from coterie.moe.choose import check_group, make_strategy
from coterie.moe.collectives import Group
from coterie.moe.dispatch import (
    combine_rows,
    looked_up,
    merge_sources,
    pack_rows,
    plan_dispatch,
    plan_rows,
    planned,
    row_bytes,
    split_sources,
    unpack_rows,
)
from coterie.moe.placement_map import layer_maps
from coterie.moe.strategy import Local
from coterie.routing.errors import InputError


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), ranks=st.integers(1, 5), experts=st.integers(5, 9), top_k=st.integers(1, 4),
    tokens=st.lists(st.integers(0, 7), min_size=5, max_size=5), copies=st.booleans(),
)  # fmt: skip
def test_ranks_together_compute_what_one_rank_would(seed, ranks, experts, top_k, tokens, copies) -> None:
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, experts, ranks, copies)
    weights = random_experts(rng, experts)
    x = [torch.from_numpy(rng.standard_normal((tokens[r], 8)).astype(np.float32)) for r in range(ranks)]
    routing = [random_routing(rng, tokens[r], experts, top_k) for r in range(ranks)]
    maps = [layer_maps(plan, r)[0] for r in range(ranks)]
    plans = [plan_dispatch(*routing[r], maps[r].destination, maps[r].position, ranks) for r in range(ranks)]
    sent = [pack_rows(x[r][p.token_of_row], p.ids, p.weights).split(list(p.counts)) for r, p in enumerate(plans)]
    returned: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    for there in range(ranks):
        mine = share_of(weights, maps[there].local)
        for here in range(ranks):
            rows, ids, row_weights = unpack_rows(sent[here][there], top_k, torch.float32)
            assert (ids < len(maps[there].local)).all()
            returned[here].append(grouped_experts(mine, rows, ids, row_weights))
    for r in range(ranks):
        got = combine_rows(plans[r], torch.cat(returned[r]))
        expected = reference_experts(weights, x[r], *routing[r])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 6), tokens=st.integers(0, 12), top_k=st.integers(1, 4))
def test_a_cpu_plans_what_any_device_would(seed, ranks, tokens, top_k) -> None:
    rng = np.random.default_rng(seed)
    ids, weights = random_routing(rng, tokens, 8, top_k)
    layer = layer_maps(random_plan(rng, 8, ranks, True), 0)[0]
    target, where = looked_up(ids, layer.destination, layer.position)
    known = ids.clamp(min=0)
    assert torch.equal(target, torch.where(ids >= 0, layer.destination[known], -1))
    assert torch.equal(where, torch.where(ids >= 0, layer.position[known], -1))
    one, other = (vars(plan(target, where, weights.bfloat16(), ranks)) for plan in (plan_rows, planned))
    for name, value in other.items():
        same = torch.equal(one[name], value) if isinstance(value, torch.Tensor) else one[name] == value
        assert same and type(one[name]) is type(value) and getattr(one[name], "dtype", 0) == getattr(value, "dtype", 0), name


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 6), tokens=st.integers(0, 12), top_k=st.integers(1, 4))
def test_one_row_goes_to_each_distinct_rank_of_a_token(seed, ranks, tokens, top_k) -> None:
    rng = np.random.default_rng(seed)
    ids, weights = random_routing(rng, tokens, 8, top_k)
    layer = layer_maps(random_plan(rng, 8, ranks, True), 0)[0]
    plan = plan_dispatch(ids, weights, layer.destination, layer.position, ranks)
    wanted = [sorted({int(layer.destination[e]) for e in row if e >= 0}) for row in ids]
    assert sum(plan.counts) == sum(map(len, wanted)) == len(plan.token_of_row)
    start = 0
    for rank, count in enumerate(plan.counts):
        rows = plan.token_of_row[start : start + count].tolist()
        assert rows == [t for t, ranks_of in enumerate(wanted) if rank in ranks_of]
        start += count
    assert len(set(plan.place.tolist())) == len(plan.place)
    assert plan.weights.sum() == pytest.approx(float(weights[ids >= 0].sum()), abs=1e-5)
    assert ((plan.ids >= 0).sum() == (ids >= 0).sum()) and not plan.weights[plan.ids < 0].any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), ranks=st.integers(1, 4), tokens=st.lists(st.integers(0, 6), min_size=8, max_size=8),
    cut=st.integers(0, 6),
)  # fmt: skip
def test_exchanges_of_parts_merge_into_that_of_all_tokens_and_are_split_again(seed, ranks, tokens, cut) -> None:
    rng = np.random.default_rng(seed)

    def rows(source: int, part: slice) -> list[torch.Tensor]:
        """What `source` sends to each rank of those of its tokens: the token's number, the source's number."""
        plan = plan_rows(target[source][part], target[source][part], weights[source][part], ranks)
        number = torch.arange(tokens[source])[part][plan.token_of_row]
        return list(torch.stack([number, torch.full_like(number, source)], 1).split(list(plan.counts)))

    target = [torch.from_numpy(rng.integers(-1, ranks, (tokens[r], 3))) for r in range(ranks)]
    weights = [torch.ones(tokens[r], 3) for r in range(ranks)]
    for here in range(ranks):
        whole = torch.cat([rows(source, slice(None))[here] for source in range(ranks)])
        parts, counts = [], []
        for part in (slice(0, cut), slice(cut, None)):
            came = [rows(source, part)[here] for source in range(ranks)]
            parts.append(torch.cat(came))
            counts.append([len(c) for c in came])
        assert torch.equal(merge_sources(parts, counts), whole)
        assert all(torch.equal(a, b) for a, b in zip(split_sources(whole, counts), parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_packed_row_comes_back_to_the_bit(dtype: torch.dtype, rows: int) -> None:
    x, ids, weights = torch.randn(rows, 6).to(dtype), torch.randint(-1, 30_000, (rows, 3)), torch.rand(rows, 3)
    message = pack_rows(x, ids, weights)
    assert message.shape == (rows, row_bytes(6, 3, dtype))
    back = unpack_rows(message, 3, dtype)
    for a, b in zip(back, (x, ids, weights), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_combining_is_bit_identical_whatever_the_order_of_tokens() -> None:
    rng = np.random.default_rng(0)
    ids, weights = random_routing(rng, 9, 8, 3)
    layer = layer_maps(random_plan(rng, 8, 4, False), 0)[0]
    partial = torch.randn(200, 4)
    results = []
    for order in (torch.arange(9), torch.arange(8, -1, -1)):
        plan = plan_dispatch(ids[order], weights[order], layer.destination, layer.position, 4)
        ranks = torch.repeat_interleave(torch.arange(4), torch.tensor(plan.counts))
        result = combine_rows(plan, partial[order[plan.token_of_row] * 4 + ranks])
        results.append(result[order.argsort()])
    assert torch.equal(*results)


def test_strategies_fit_the_group_or_say_what_would() -> None:
    alone, two = Group(), on_ranks(2, lambda group: group)[0]
    assert isinstance(make_strategy("local", alone), Local)
    check_group(None, alone)
    check_group(None, two)
    for name, group, message in (
        ("all_to_all", alone, r"found 'all_to_all' on 1 process.*expected local, or several"),
        ("local", two, r"found 'local' on 2 process.*expected replicated"),
        ("magic", two, "found 'magic', expected local, replicated, .* or coherent"),
    ):
        with pytest.raises(InputError, match=message):
            make_strategy(name, group)
