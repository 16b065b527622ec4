"""A new plan taken over while text is generated: the text does not change, and every rank ends with what the plan says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import random_plan
from references import expected_texts, tokens, uneven_plan
from thread_ranks import load, on_ranks
from tiny_models import make_model

import coterie
from coterie.moe.batch import Request
from coterie.moe.collectives import Group
from coterie.moe.dispatcher import Dispatcher
from coterie.moe.generate import Generator, Sampling
from coterie.moe.layer import StepContext
from coterie.moe.relocate import chunks, packed, transfers
from coterie.moe.replanning import AutoReplan, TakeOver
from coterie.placement.homes import HomeClass, Homes
from coterie.placement.plan import PlacementPlan, slots_from_assignment
from coterie.routing.errors import InputError
from coterie.routing.record import expert_modules
from coterie.routing.trace import LoadStatistics


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), ranks=st.integers(1, 5), per_step=st.integers(1, 3), copies=st.booleans())
def test_transfers_bring_each_rank_what_it_lacks_a_few_at_a_time(seed, ranks, per_step, copies) -> None:
    rng = np.random.default_rng(seed)
    old, new = random_plan(rng, 9, ranks, copies), random_plan(rng, 9, ranks, copies)
    moves = transfers(old, new)
    holds = old.holds().copy()
    for chunk in chunks(moves, per_step):
        for t in chunk:
            assert old.holds()[t.layer, t.expert, t.source] and not holds[t.layer, t.expert, t.to]
        for rank in range(ranks):
            assert max(sum(t.source == rank for t in chunk), sum(t.to == rank for t in chunk)) <= per_step
        for t in chunk:
            holds[t.layer, t.expert, t.to] = True
    assert not (new.holds() & ~holds).any() and sum(map(len, chunks(moves, per_step))) == len(moves)


def run(folder: Path, plan: PlacementPlan, group: Group, prompts: list[list[int]], make: Any, strategy: str, steps: int) -> Any:
    model = load(folder, plan, strategy=strategy, dtype="float32", group=group)
    requests = [Request(i, tuple(p), steps) for i, p in enumerate(prompts)]
    dispatcher: Dispatcher = model.dispatcher
    choice = dispatcher.choice(requests, 2, model.transformers, model.context)
    executor = dispatcher.executor(model.transformers, model.context, choice, None)
    boundary = make(model)
    generator = Generator(executor, group, model.transformers.generation_config, Sampling())
    done = generator.run(requests, 2, shared=strategy == "replicated", boundary=boundary)
    boundary.close()
    weights = [[packed(m, i) for i in range(len(m.coterie_layer.map.local))] for _, m in modules(model)]
    local = [m.coterie_layer.map.local for _, m in modules(model)]
    return {r.request.index: r.new_tokens for r in done}, local, weights


def modules(model: coterie.Model) -> Any:
    return expert_modules(model.transformers).values()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("strategy", ["all_to_all", "coherent", "replicated"])
def test_text_is_the_same_and_the_new_plan_is_held(tmp_path: Path, family: str, strategy: str) -> None:
    ranks, steps = 3, 24
    folder = make_model(family, tmp_path / family)
    old = uneven_plan(folder, ranks, tmp_path / "p.json")
    slots = np.roll(old.physical_to_logical.reshape(len(old.layer_ids), ranks, -1), 1, axis=1)
    new = PlacementPlan(slots.reshape(len(slots), -1), old.num_experts, old.layer_ids, old.topology, old.model)
    prompts = [tokens(n, n) for n in (4, 9, 2, 7, 5)]
    taken: list[int] = []

    def work(group: Group) -> Any:
        def make(model: coterie.Model) -> TakeOver:
            return TakeOver(model.transformers, group, old, new, lambda: taken.append(group.rank))

        return run(folder, old, group, prompts, make, strategy, steps)

    results = on_ranks(ranks, work)
    texts = {i: t for found, _, _ in results for i, t in found.items()}
    assert [texts[i] for i in range(5)] == expected_texts(folder, prompts, steps)[0]
    assert sorted(taken) == [0, 1, 2]
    whole = coterie.load(folder, dtype="float32")
    for rank, (_, local, weights) in enumerate(results):
        for layer, (_, module) in enumerate(modules(whole)):
            assert list(local[layer]) == list(new.experts_on(layer, rank))
            assert all(torch.equal(packed(module, e), w) for e, w in zip(local[layer], weights[layer], strict=True))


class Waiting(AutoReplan):
    """Waits for the planner, which takes longer than so short a text."""

    def notice(self) -> int:
        if self._planner is not None:
            self._planner.wait()
        return super().notice()


def test_a_drifted_load_is_planned_for_and_taken_over(tmp_path: Path) -> None:
    """Rank 0 holds all of layer 0's experts but one; a look at the load later it does not."""
    folder = make_model("olmoe", tmp_path / "m")
    shape = coterie.load(folder, dtype="float32").shape
    assignment = np.tile(np.arange(8) % 2, (len(shape.layer_ids), 1))
    assignment[0] = [0, 0, 0, 0, 0, 0, 0, 1]
    slots = slots_from_assignment(assignment, 2, 8)
    plan = PlacementPlan(slots, 8, shape.layer_ids, coterie.Topology(1, 2), shape.name)
    prompts, said, taken = [tokens(n, n) for n in (4, 9)], [], []

    def work(group: Group) -> Any:
        def make(model: coterie.Model) -> AutoReplan:
            return Waiting(model.transformers, group, model.context, plan, said.append, taken.append, interval=4)

        return run(folder, plan, group, prompts, make, "all_to_all", 60)

    results = on_ranks(2, work)
    texts = {i: t for found, _, _ in results for i, t in found.items()}
    assert [texts[i] for i in range(2)] == expected_texts(folder, prompts, 60)[0]
    assert any("the busiest rank has" in line for line in said)
    assert len(taken) >= 2 and len(results[0][1][0]) < 7


@pytest.mark.processes
@pytest.mark.parametrize("fails", [False, True])
def test_a_plan_with_homes_is_planned_anew_and_a_planner_that_fails_ends_nothing(fails: bool, monkeypatch) -> None:
    classes = tuple(HomeClass(rank, 0.0, (1.0,)) for rank in range(2))
    slots = slots_from_assignment(np.array([[0] * 7 + [1], [0, 1] * 4]), 2, 8)
    plan = PlacementPlan(slots, 8, (0, 1), coterie.Topology(1, 2), "m", homes=Homes(classes, ((0, 1),)))
    said: list[str] = []
    replan = AutoReplan(torch.nn.Linear(1, 1), Group(), StepContext(), plan, said.append, lambda taken: None)
    if fails:
        monkeypatch.setattr(sys, "executable", "false")
    replan._begin(LoadStatistics(np.full((1, 2, 8), 10, dtype=np.int64), "m", (0, 1), ("measured",)))
    assert replan._planner is not None
    replan._planner.wait()
    assert replan.notice() == 1
    found = replan._found()
    assert replan.notice() == 0
    replan.close()
    if fails:
        assert found is None and "the planner failed, the plan is kept" in said[-1]
    else:
        assert found is not None and found.homes == plan.homes and "would bring it from" in said[-1]


def test_a_run_that_ends_while_a_plan_is_made_leaves_nothing_for_the_next(monkeypatch) -> None:
    slots = slots_from_assignment(np.array([[0] * 7 + [1]]), 2, 8)
    plan = PlacementPlan(slots, 8, (0,), coterie.Topology(1, 2), "m")
    replan = AutoReplan(torch.nn.Linear(1, 1), Group(), StepContext(), plan, lambda text: None, lambda taken: None)
    replan._begin(LoadStatistics(np.full((1, 1, 8), 10, dtype=np.int64), "m", (0,), ("measured",)))
    replan.close()
    assert replan.notice() == 0
    replan.close()


def test_plans_of_other_models_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="--replan: ranks: found 3, expected 2 as is running"):
        transfers(random_plan(rng, 9, 2, False), random_plan(rng, 9, 3, False))
