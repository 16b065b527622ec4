"""Every strategy on ranks that are threads of this process: the same sums as one rank, and as many rows as the sets say."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import random_experts, random_plan, random_routing, share_of
from references import expected_texts, tokens
from thread_ranks import load, on_ranks
from tiny_models import FOUR_RANK_FAMILIES, make_model

import coterie
from coterie.kernels.experts import grouped_experts, reference_experts
from coterie.moe import coherent
from coterie.moe.choose import MADE
from coterie.moe.coherent import next_anchor
from coterie.moe.collectives import Group
from coterie.moe.dispatch import needed_ranks, row_bytes
from coterie.moe.placement_map import layer_maps
from coterie.moe.strategy import Hierarchical, Overlapped, goes_beside
from coterie.placement.plan import PlacementPlan
from coterie.placement.topology import Topology

HIDDEN, TOP_K, EXPERTS = 8, 3, 9
NEVER = 1 << 62
PROMPTS = [tokens(n, n) for n in (5, 1, 60, 9, 17)]
BESIDE = "hierarchical, beside"
WAYS = {**MADE, BESIDE: lambda group: Hierarchical(group, 0)}


def on_nodes(plan: PlacementPlan, nodes: int) -> PlacementPlan:
    return PlacementPlan(plan.physical_to_logical, plan.num_experts, plan.layer_ids, Topology(nodes, plan.ranks // nodes))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), shape=st.sampled_from([(1, 2), (1, 3), (2, 2), (2, 4), (4, 1), (3, 2)]), copies=st.booleans(),
    name=st.sampled_from(["replicated", "all_gather", "all_to_all", "hierarchical", BESIDE]),
    free=st.sampled_from([0, 1 << 16]),
)  # fmt: skip
def test_every_strategy_sums_what_one_rank_would_and_counts_its_rows(seed, shape, copies, name, free) -> None:
    nodes, width = shape
    ranks = nodes * width
    rng = np.random.default_rng(seed)
    plan = on_nodes(random_plan(rng, EXPERTS, ranks, copies), nodes)
    weights = random_experts(rng, EXPERTS)
    counts = rng.integers(0, 7, ranks) if name != "replicated" else np.full(ranks, rng.integers(0, 7))
    if not counts.any():
        counts[:] = 1
    x = [torch.from_numpy(rng.standard_normal((n, HIDDEN)).astype(np.float32)) for n in counts]
    routing = [random_routing(rng, n, EXPERTS, TOP_K) for n in counts]
    if name == "replicated":
        x, routing = [x[0]] * ranks, [routing[0]] * ranks
    maps = [layer_maps(plan, r)[0] for r in range(ranks)]

    def work(group: Group):
        group.free_bytes = free
        r, strategy = group.rank, WAYS[name](group)
        sent = strategy.dispatch(x[r], *routing[r], maps[r], tuple(map(int, counts)))
        y = grouped_experts(share_of(weights, maps[r].local), sent.rows, sent.ids, sent.weights)
        return strategy.combine(y, sent), group.traffic

    results = on_ranks(ranks, work, width)
    for r, (out, _) in enumerate(results):
        torch.testing.assert_close(out, reference_experts(weights, x[r], *routing[r]), rtol=1e-4, atol=1e-4)
    rows, leaving = expected_rows(name, [t for t, _ in routing], maps, ranks, width, free, counts)
    assert sum(t.rows for _, t in results) == rows
    out_bytes, back = row_bytes(HIDDEN, TOP_K, torch.float32), HIDDEN * 4
    if name != "replicated":
        assert sum(t.bytes for _, t in results) == rows // 2 * (out_bytes + back)
    over = sum(n for r, (_, t) in enumerate(results) for to, n in t.bytes_to.items() if to // width != r // width)
    if free == 0 and name in ("all_to_all", "hierarchical", BESIDE):  # else padding is in it
        counts_sent = ranks * (ranks - width) * 8
        assert over == leaving // 2 * (out_bytes + back) + counts_sent


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), shape=st.sampled_from([(2, 2), (2, 3), (3, 2), (2, 4)]), copies=st.booleans(),
    free=st.sampled_from([0, 1 << 16]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_rows_inside_nodes_beside_those_between_are_the_same_bits_and_counts(seed, shape, copies, free, dtype) -> None:
    nodes, width = shape
    rng = np.random.default_rng(seed)
    plan = on_nodes(random_plan(rng, EXPERTS, nodes * width, copies), nodes)
    counts = rng.integers(0, 7, nodes * width) * rng.integers(0, 2, nodes * width)
    counts[rng.integers(nodes * width)] = 3
    x = [torch.from_numpy(rng.standard_normal((n, HIDDEN))).to(dtype) for n in counts]
    routing = [random_routing(rng, n, EXPERTS, TOP_K) for n in counts]
    maps = [layer_maps(plan, r)[0] for r in range(nodes * width)]

    def work(least: int):
        def run(group: Group):
            strategy = Hierarchical(group, least)
            group.free_bytes = strategy.node.free_bytes = free
            sent = strategy.dispatch(x[group.rank], *routing[group.rank], maps[group.rank], tuple(map(int, counts)))
            y = sent.rows * sent.weights.sum(1, keepdim=True).to(dtype)
            return (sent.rows, sent.ids, sent.weights, strategy.combine(y, sent)), group.traffic, len(sent.state.inside)

        return on_ranks(nodes * width, run, width)

    for (alone, one, exchanges), (beside, two, more) in zip(work(NEVER), work(0), strict=True):
        assert (exchanges, more) == (1, 2)
        assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
        assert (one.rows, one.bytes, one.rows_by_layer) == (two.rows, two.bytes, two.rows_by_layer)
        if free == 0:  # else padding is in it
            assert two.overhead == one.overhead + (width - 1) * 8


def test_rows_go_beside_where_there_are_several_nodes_of_several_ranks_and_enough_bytes() -> None:
    assert goes_beside(100, 64, 2, 2, 6400) and not goes_beside(99, 64, 2, 2, 6400)
    assert not goes_beside(1 << 30, 64, 1, 4, 0) and not goes_beside(1 << 30, 64, 4, 1, 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.integers(2, 4), chunks=st.integers(1, 4), copies=st.booleans())
def test_chunks_that_overlap_sum_and_count_as_one_exchange(seed, ranks, chunks, copies) -> None:
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, EXPERTS, ranks, copies)
    weights = random_experts(rng, EXPERTS)
    counts = rng.integers(0, 9, ranks)
    x = [torch.from_numpy(rng.standard_normal((n, HIDDEN)).astype(np.float32)) for n in counts]
    routing = [random_routing(rng, n, EXPERTS, TOP_K) for n in counts]
    maps = [layer_maps(plan, r)[0] for r in range(ranks)]

    def work(group: Group):
        r = group.rank
        mine = share_of(weights, maps[r].local)
        strategy = Overlapped(group, chunks)
        out = strategy.run(x[r], *routing[r], maps[r], lambda d: grouped_experts(mine, d.rows, d.ids, d.weights))
        return out, group.traffic.rows

    results = on_ranks(ranks, work)
    for r, (out, _) in enumerate(results):
        torch.testing.assert_close(out, reference_experts(weights, x[r], *routing[r]), rtol=1e-4, atol=1e-4)
    rows, _ = expected_rows("all_to_all", [t for t, _ in routing], maps, ranks, ranks, 0, counts)
    assert sum(n for _, n in results) == rows


def expected_rows(name, ids, maps, ranks, width, free, counts) -> tuple[int, int]:
    """(rows, rows that leave a node), dispatch and combine together, from the sets of ranks that tokens need."""
    tokens = int(sum(counts))
    if name == "all_gather":
        return 2 * (ranks - 1) * tokens, 0
    if name == "replicated":
        n = int(counts[0])
        small = (ranks - 1) * n * HIDDEN * 4 <= free
        return (ranks * (ranks - 1) * n if small else 2 * (ranks - 1) * n), 0
    remote = leaving = 0
    for r, routed in enumerate(ids):
        target = torch.where(routed >= 0, maps[r].destination[routed.clamp(min=0)], -1)
        for row in needed_ranks(target, ranks):
            found = set(row.nonzero()[:, 0].tolist())
            remote += len(found - {r})
            others = {f // width for f in found} - {r // width}
            leaving += len(others) if name in ("hierarchical", BESIDE) else sum(f // width != r // width for f in found)
    return 2 * remote, 2 * leaving


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[[str], tuple[Path, list[list[int]]]]:
    """By family: a model, and transformers' text of PROMPTS."""

    @cache
    def of(family: str) -> tuple[Path, list[list[int]]]:
        folder = make_model(family, tmp_path_factory.mktemp(family))
        return folder, expected_texts(folder, PROMPTS, 7)[0]

    return of


def by_every_strategy(folder: Path, asked: list[coterie.Prompt], new_tokens: int, batch_size: int) -> Callable[[Group], Any]:
    """What a rank writes, by strategy; loaded once."""

    def work(group: Group) -> dict[str, list[list[int]]]:
        model, found = load(folder, dtype="float32", group=group), {}
        walked = model.transformers.config.model_type in coherent.FAMILIES
        for name in MADE if walked else [n for n in MADE if n != "coherent"]:
            model.dispatcher.asked = name
            outputs, figures = model.generate(asked, new_tokens, batch_size=batch_size)
            assert name in figures.strategy
            found[name] = [list(output.token_ids) for output in outputs]
        return found

    return work


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_every_strategy_writes_transformers_text(ranks: int, written) -> None:
    limits = (7, 3, 7, 5, 7)
    asked = [coterie.Prompt(token_ids=tuple(p), max_new_tokens=n) for p, n in zip(PROMPTS, limits, strict=True)]
    for family in FOUR_RANK_FAMILIES if ranks == 4 else ("qwen3_moe",):
        folder, expected = written(family)
        wanted = [text[:limit] for text, limit in zip(expected, limits, strict=True)]
        for found in on_ranks(ranks, by_every_strategy(folder, asked, 7, 2), 2 if ranks % 2 == 0 else ranks):
            for name, texts in found.items():
                assert texts == wanted, (family, name)


LONG_PROMPTS = [tokens(n, n) for n in (1, 2000, 17, 400)]


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> tuple[Path, list[list[int]]]:
    folder = make_model("qwen3_moe", tmp_path_factory.mktemp("long"), max_position_embeddings=4096)
    return folder, expected_texts(folder, LONG_PROMPTS, 4)[0]


def test_prompts_of_one_to_two_thousand_tokens_run_together(long) -> None:
    folder, expected = long
    asked = [coterie.Prompt(token_ids=tuple(p)) for p in LONG_PROMPTS]
    for found in on_ranks(3, by_every_strategy(folder, asked, 4, 4)):
        for name, texts in found.items():
            assert texts == expected, name


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 5), tokens=st.integers(1, 12), here=st.integers(0, 4))
def test_the_next_anchor_is_the_planners(seed, ranks, tokens, here) -> None:
    from coterie.placement.cost import _next_anchor
    from coterie.placement.cost import needed_ranks as planned_ranks
    from coterie.routing.trace import RoutingTrace

    rng = np.random.default_rng(seed)
    here %= ranks
    ids, weights = random_routing(rng, tokens, EXPERTS, TOP_K)
    weights = weights.half().float()
    target = torch.where(ids >= 0, torch.from_numpy(rng.integers(0, ranks, EXPERTS))[ids.clamp(min=0)], -1)
    anchor = next_anchor(target, weights * (ids >= 0), here, ranks)
    zeros = np.zeros(tokens, dtype=np.int32)
    as_trace = ids.numpy().astype(np.int16)[:, None]
    trace = RoutingTrace(as_trace, zeros, zeros, "m", EXPERTS, (0,), "", "decode", weights.half().numpy()[:, None])
    used = target.numpy()
    expected = _next_anchor(trace, 0, used, planned_ranks(used, ranks), np.full(tokens, here))
    assert anchor.tolist() == expected.tolist()


@pytest.mark.parametrize("top_k", [1, 3])
def test_coherent_rows_are_those_of_the_sets_and_anchors(tmp_path: Path, top_k: int) -> None:
    """Prefill: two for each remote rank. Decode: each of R but the anchor, and back from each of R but the next one."""
    from references import tokens, uneven_plan

    folder = make_model("olmoe", tmp_path / "m", num_experts_per_tok=top_k)
    plan = uneven_plan(folder, 4, tmp_path / "p.json")
    prompts = [coterie.Prompt(token_ids=tuple(tokens(n, n))) for n in (5, 1, 12, 9)]
    coterie.load(folder, dtype="float32").record(prompts, tmp_path / "t.safetensors", max_new_tokens=8)
    trace = coterie.read_trace(tmp_path / "t.safetensors")

    def work(group: Group):
        return load(folder, plan, strategy="coherent", dtype="float32", group=group).generate(prompts, 8)[1].rows_sent

    assert on_ranks(4, work) == [coherent_rows_of(trace, plan, [len(p.token_ids) for p in prompts])] * 4


def coherent_rows_of(trace, plan: PlacementPlan, lengths: list[int]) -> int:
    maps = [[m.routes for m in layer_maps(plan, r)] for r in range(plan.ranks)]
    rows = 0
    order = np.lexsort((trace.positions, trace.sequence_ids))
    anchor: dict[int, int] = {}
    for t in order:
        sequence, decoding = int(trace.sequence_ids[t]), trace.positions[t] >= lengths[trace.sequence_ids[t]]
        at = anchor.get(sequence, sequence % plan.ranks)
        for layer in range(trace.layers):
            used = [int(maps[0][layer][at, e]) for e in trace.expert_ids[t, layer]]
            sets = set(used)
            if not decoding:
                rows += 2 * len(sets - {at})
                continue
            mass = {r: sum(float(w) for u, w in zip(used, trace.router_weights[t, layer], strict=True) if u == r) for r in sets}
            following = at if at in sets else min(sets, key=lambda r: (-mass[r], r))
            rows += len(sets - {at}) + len(sets - {following})
            at = following
        if decoding:
            anchor[sequence] = at
    return rows
