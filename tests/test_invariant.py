"""The batch-invariant mode: logits are the same to the bit, whatever the batch, the rank and the strategy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_layers import random_plan
from references import tokens
from thread_ranks import load, on_ranks
from tiny_models import FOUR_RANK_FAMILIES, make_model

import coterie
from coterie.kernels.experts import grouped_experts
from coterie.moe.batch import Batch, Running
from coterie.moe.collectives import Group
from coterie.placement.plan import PlacementPlan
from coterie.routing.errors import InputError


def logits_by_prompt(
    folder: Path, group: Group, prompts: list[list[int]], batch_size: int, invariant: bool, steps: int = 4,
    plan: PlacementPlan | None = None, strategy: str = "all_to_all",
):  # fmt: skip
    """Of every prompt this rank runs: the logits of each step, of a greedy text."""
    model = load(folder, plan, dtype="float32", strategy=strategy if group.size > 1 else "local", group=group,
                         batch_invariant=invariant)  # fmt: skip
    requests = model.text.requests([coterie.Prompt(token_ids=tuple(p)) for p in prompts], steps)
    found: dict[int, list[torch.Tensor]] = {}
    batch = Batch(model.transformers, model.context)
    with torch.inference_mode():
        for first in range(0, len(requests), batch_size * group.size):
            part = requests[first : first + batch_size * group.size]
            assigned = [[Running(r, rank) for r in part[rank :: group.size]] for rank in range(group.size)]
            scored = batch.prefill(assigned)
            for step in range(steps):
                for sequence, logits in scored:
                    found.setdefault(sequence.request.index, []).append(logits.clone())
                    sequence.new_tokens.append(int(logits.argmax()))
                if step + 1 < steps:
                    scored = batch.decode(tuple(len(a) for a in assigned))
            for sequence in batch.sequences:
                sequence.finish_reason = "length"
            batch.drop_finished()
    return {index: torch.stack(rows) for index, rows in found.items()}


@pytest.mark.parametrize("family", [f for f in FOUR_RANK_FAMILIES if f != "jamba"])
def test_logits_do_not_depend_on_batch_or_ranks(tmp_path: Path, family: str) -> None:
    folder = make_model(family, tmp_path / family)
    prompts = [tokens(n, n) for n in (3, 21, 1, 40, 9, 17, 30)]
    alone = logits_by_prompt(folder, Group(), prompts, 1, True)
    together = logits_by_prompt(folder, Group(), prompts, 7, True)
    spread: dict[int, torch.Tensor] = {}
    for part in on_ranks(3, lambda group: logits_by_prompt(folder, group, prompts, 2, True)):
        spread |= part
    for index in range(len(prompts)):
        assert torch.equal(alone[index], together[index]), index
    one_rank_of_three: dict[int, torch.Tensor] = {}
    for part in on_ranks(3, lambda group: logits_by_prompt(folder, group, prompts[::-1], 1, True)):
        one_rank_of_three |= part
    for index in range(len(prompts)):
        assert torch.equal(spread[index], one_rank_of_three[len(prompts) - 1 - index]), index


def spread_over(ranks: int, prompts: list[list[int]], *args: Any) -> dict[int, torch.Tensor]:
    """By prompt, of all ranks."""
    folder, *rest = args
    parts = on_ranks(ranks, lambda group: logits_by_prompt(folder, group, prompts, 2, True, 3, *rest))
    return {index: rows for part in parts for index, rows in part.items()}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_neither_copies_nodes_nor_strategies_change_logits(tmp_path: Path, family: str) -> None:
    """A plan with copies on two nodes, every prompt at home on another rank the second time."""
    folder = make_model(family, tmp_path / family)
    shape = coterie.load(folder, dtype="float32").shape
    made = random_plan(np.random.default_rng(1), shape.num_experts, 4, True)
    slots = np.tile(made.physical_to_logical, (len(shape.layer_ids), 1))
    plan = replace(made, physical_to_logical=slots, layer_ids=shape.layer_ids, topology=coterie.Topology(2, 2))
    assert (plan.holds().sum(2) > 1).any()
    prompts = [tokens(n, n) for n in (3, 21, 1, 12, 9)]
    first = spread_over(4, prompts, folder, plan, "all_to_all")
    for strategy in ("all_gather", "overlapped"):
        other = spread_over(4, prompts, folder, plan, strategy)
        assert all(torch.equal(first[index], other[index]) for index in range(len(prompts))), strategy
    elsewhere = spread_over(4, prompts[::-1], folder, plan, "all_to_all")
    assert all(torch.equal(first[index], elsewhere[len(prompts) - 1 - index]) for index in range(len(prompts)))


def test_a_scan_over_states_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--batch-invariant: found JambaMamba"):
        coterie.load(make_model("jamba", tmp_path), batch_invariant=True)


def test_experts_with_few_rows_round_as_with_many() -> None:
    from dataclasses import replace

    import numpy as np
    from random_layers import random_experts

    experts = replace(random_experts(np.random.default_rng(0), 4, 64, 48), least_rows=16)
    x, ids, weights = torch.randn(200, 64), torch.randint(0, 4, (200, 2)), torch.rand(200, 2)
    whole = grouped_experts(experts, x, ids, weights)
    for rows in (1, 2, 5, 40):
        assert torch.equal(grouped_experts(experts, x[:rows], ids[:rows], weights[:rows]), whole[:rows])
