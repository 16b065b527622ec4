"""Homes carried out: prompts run where the plan wants them, rows are those `evaluate` predicts, the text is the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jobs import torchrun
from references import tokens
from thread_ranks import load, on_ranks
from tiny_models import make_model

import coterie
from coterie.moe.batch import Request
from coterie.moe.generate import Sampling
from coterie.moe.home_ranks import UseCounter
from coterie.placement.cost import plan_homes
from coterie.placement.homes import HomeClass, Homes, uses
from coterie.placement.plan import PlacementPlan, read_plan, save_plan, slots_from_assignment

PROMPTS = [coterie.Prompt(token_ids=tuple(tokens(n, n))) for n in (17, 3, 40, 9, 22, 31, 5, 12, 28, 6, 14, 19)]
RANKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model("qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trace(folder: Path, tmp_path_factory) -> coterie.RoutingTrace:
    """The prompts' own routing, as one process records it."""
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    coterie.load(folder, dtype="float32").record(PROMPTS, path)
    return coterie.read_trace(path)


def plan_with(look_at: int | None, strategy: str = "all_to_all", ranks: int = RANKS) -> PlacementPlan:
    """Experts dealt out, and homes by made-up weights of a few experts: what matters is that both sides apply the same rule."""
    rng = np.random.default_rng(3)
    watched = tuple((layer, expert) for layer in range(3) for expert in (1, 4, 6))
    classes = tuple(HomeClass(r, 1.0, tuple(rng.normal(0, 1, len(watched)).tolist())) for r in range(ranks))
    slots = slots_from_assignment(np.arange(24).reshape(3, 8) % ranks, ranks, 8)
    homes = Homes(classes, watched, look_at, 1.3)
    return PlacementPlan(slots, 8, (0, 1, 2), coterie.Topology(1, ranks), strategy=strategy, homes=homes)


@pytest.mark.parametrize("look_at", [1, 4, None])
def test_rows_of_a_prefill_are_those_that_evaluate_predicts(folder: Path, trace, look_at: int | None) -> None:
    plan = plan_with(look_at)

    def work(group):
        model = load(folder, plan, "float32", "all_to_all", group=group)
        requests = model.text.requests(PROMPTS, 1)
        choice, homes = model.settle(requests, len(PROMPTS))
        rows = group.traffic.rows
        done = model.run(requests, len(PROMPTS), Sampling(), choice, homes=homes.ranks)
        return homes, group.traffic.rows - rows, {r.request.index: group.rank for r in done}

    results = on_ranks(RANKS, work)
    first = np.unique(trace.sequence_ids, return_index=True)[1]
    expected = plan_homes(plan, trace)[first].tolist()
    assert len(set(expected)) > 1
    for homes, _, ran in results:
        assert list(homes.ranks) == expected
        assert all(expected[index] == rank for index, rank in ran.items())
    assert homes.tokens == sum(min(len(p.token_ids), look_at or 99) for p in PROMPTS)
    predicted = coterie.evaluate(plan, trace).remote_rows * trace.tokens * trace.layers
    assert sum(rows for _, rows, _ in results) == round(predicted)


def test_homes_by_token_ids_are_those_of_evaluate_and_nothing_is_run_for_them(folder: Path, tmp_path: Path) -> None:
    coterie.load(folder, dtype="float32").record(PROMPTS, tmp_path / "t", token_ids=True)
    trace, rng = coterie.read_trace(tmp_path / "t"), np.random.default_rng(5)
    watched = tuple(int(i) for i in np.unique(trace.token_ids)[::3])
    classes = tuple(HomeClass(r, 1.0, tuple(rng.normal(0, 1, len(watched)).tolist())) for r in range(RANKS))
    plan = replace(plan_with(None), homes=Homes(classes, (), None, 1.3, watched))

    def work(group):
        model = load(folder, plan, "float32", "all_to_all", group=group)
        _, homes = model.settle(model.text.requests(PROMPTS, 1), len(PROMPTS))
        return homes, group.traffic.rows

    expected = plan_homes(plan, trace)[np.unique(trace.sequence_ids, return_index=True)[1]].tolist()
    assert len(set(expected)) > 1
    for homes, rows in on_ranks(RANKS, work):
        assert list(homes.ranks) == expected and (homes.tokens, rows) == (0, 0)


def test_the_counter_counts_what_a_trace_says(trace) -> None:
    watched = ((0, 1), (2, 6), (1, 0))
    counter = UseCounter(watched, trace.layer_ids, range(len(PROMPTS)))
    for part in np.array_split(np.random.default_rng(0).permutation(trace.tokens), 5):
        counter.append(trace.expert_ids[part], np.zeros(0), trace.sequence_ids[part], trace.positions[part], np.zeros(0))
    lengths = np.bincount(trace.sequence_ids)
    assert counter.tokens == trace.tokens
    assert np.array_equal(counter.counts / lengths[:, None], uses(trace, Homes((), watched)))


@pytest.mark.parametrize("strategy", ["all_to_all", "all_gather", "coherent", "replicated"])
def test_the_text_does_not_depend_on_homes(folder: Path, strategy: str) -> None:
    expected = [o.token_ids for o in coterie.load(folder, dtype="float32").generate(PROMPTS, 7)[0]]

    def work(group):
        model = load(folder, plan_with(4), "float32", strategy, group=group)
        requests = model.text.requests(PROMPTS, 7)
        homes = model.settle(requests, 2)[1]
        return model.generate(PROMPTS, 7, batch_size=2)[0], homes

    for outputs, homes in on_ranks(RANKS, work):
        assert [o.token_ids for o in outputs] == expected
        assert (homes is None) == (strategy == "replicated")


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sampled_text_is_the_same_on_any_ranks_and_in_any_batch(folder: Path, ranks: int) -> None:
    warm = Sampling(temperature=1.0, top_k=20, top_p=0.95, seed=3)
    same = [*PROMPTS, *PROMPTS[:3]]  # the same prompt twice draws differently
    expected = [o.token_ids for o in coterie.load(folder, dtype="float32").generate(same, 9, warm)[0]]
    assert expected[:3] != expected[-3:]

    def work(group):
        for plan in (None, plan_with(4, ranks=ranks)):
            model = load(folder, plan, "float32", "all_to_all", group=group)
            for batch_size in (1, 2, 16):
                texts = [o.token_ids for o in model.generate(same, 9, warm, batch_size=batch_size)[0]]
                assert texts == expected, (plan is not None, batch_size)

    on_ranks(ranks, work)


def test_indices_of_a_continued_run_keep_their_homes_apart(folder: Path) -> None:
    """Requests of a resumed run have gaps in their indices and any order."""

    def work(group):
        model = load(folder, plan_with(4), "float32", "all_to_all", group=group)
        requests = [Request(i, PROMPTS[i].token_ids, 3) for i in (7, 2, 11, 5)]
        return model.settle(requests, 2)[1].ranks, model.settle(requests[::-1], 2)[1].ranks

    for there, back in on_ranks(RANKS, work):
        assert there == back[::-1]


@pytest.mark.processes
def test_the_command_line_carries_homes_out_and_says_so(folder: Path, trace, tmp_path: Path) -> None:
    plan = replace(plan_with(4, ranks=2), model=folder.name)
    save_plan(plan, tmp_path / "p.json")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"token_ids": list(p.token_ids)}) + "\n" for p in PROMPTS))
    options = [str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "5", "--json", "--temperature", "0.8"]
    texts = []
    for more in ([], ["--strategy", "all_to_all"], ["--strategy", "replicated"]):
        given = ["--plan", str(tmp_path / "p.json"), *more] if more else []
        done = torchrun(2 if more else 1, "-m", "coterie", "generate", *options, *given)
        assert done.returncode == 0, done.stderr[-3000:]
        texts.append([o["token_ids"] for o in json.loads(done.stdout)["outputs"]])
        told = [line for line in done.stderr.splitlines() if line.startswith("homes: ")]
        wanted = {"": None, "all_to_all": "homes: told by ", "replicated": "homes: not carried out: with strategy replicated"}
        assert len(told) == bool(more) and (not told or told[0].startswith(wanted[more[-1]]))
    assert texts[0] == texts[1] == texts[2]
    assert read_plan(tmp_path / "p.json").homes == plan.homes
