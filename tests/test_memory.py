"""Memory told before loading: equal to what is then allocated, checked against what is free, with a way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, make_model
from transformers import AutoModelForCausalLM

import coterie
from coterie.launch.available import resident_bytes, shared_out_bytes, system_bytes
from coterie.launch.cli import main
from coterie.launch.generating import Asked
from coterie.launch.memory import check_memory, sizes_on_device
from coterie.moe.batch import Batch, Request
from coterie.moe.choose import STRATEGIES
from coterie.moe.collectives import Group
from coterie.moe.generate import Sampling
from coterie.moe.kv import SLACK, GrowingLayer
from coterie.moe.memory import (
    LayerState,
    ModelSizes,
    RankMemory,
    Room,
    Workload,
    check_fits,
    estimate,
    most_held,
    most_slots,
    workload,
)
from coterie.moe.prepare import prepare
from coterie.moe.sizes import _kept, sizes_of, weight_bytes
from coterie.moe.text import Prompt, Text
from coterie.placement.plan import PlacementPlan, save_plan, slots_from_assignment
from coterie.placement.topology import Topology
from coterie.routing.errors import InputError

SIZES = ModelSizes(4, 1000, (10, 20), (LayerState(0, 8), LayerState(5, 8, 30)), 16, 50, 2, 0)
WORK = Workload(4, 100, 20, 50)


def plan_of(assignment: list[list[int]], ranks: int) -> PlacementPlan:
    there = np.array(assignment)
    return PlacementPlan(slots_from_assignment(there, ranks, there.shape[1]), there.shape[1], (0, 1), Topology(1, ranks))


PLAN = plan_of([[0, 0, 0, 1], [1, 1, 1, 0]], 2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_and_caches_take_what_was_told(family: str, tmp_path: Path, monkeypatch) -> None:
    folder = make_model(family, tmp_path / "m")
    requests = [Request(i, tuple(range(3, 3 + n)), 9) for i, n in enumerate((40, 40, 5, 17))]
    for dtype in ("float32", "bfloat16"):
        share = prepare(folder, None, dtype, 1)
        sizes = sizes_of(share.shape, share.empty, share.dtype)
        (told,) = estimate(sizes, share.plan, "local", workload(requests[:2], 2))
        model = coterie.load(folder, dtype=dtype)
        dense, expert = weight_bytes(model.transformers, 8)
        few_in_float32 = 0 if dtype == "float32" else dense // 50  # that families keep so in any dtype
        assert dense - few_in_float32 <= told.dense <= dense and told.experts == 8 * sum(expert)
    seen = [0]
    forward = Batch._forward

    def kept(layer) -> int:
        return sum(room.nbytes for room in layer.rooms) if isinstance(layer, GrowingLayer) else _kept(layer)

    def watched(self, *arguments):
        logits, cache = forward(self, *arguments)
        seen[0] = max(seen[0], 0 if cache is None else sum(map(kept, cache.layers)))
        return logits, cache

    monkeypatch.setattr(Batch, "_forward", watched)
    model = coterie.load(folder)
    model.transformers.generation_config.eos_token_id = None
    sizes = sizes_of(model.shape, share.empty, torch.float32)
    choice, _ = model.settle(requests, 2)
    model.run(requests[:2], 2, Sampling(), choice)
    assert seen[0] == estimate(sizes, model.plan, "local", workload(requests[:2], 2))[0].states
    seen[0] = 0
    model.run(requests, 2, Sampling(), choice)
    assert 0 < seen[0] <= estimate(sizes, model.plan, "local", workload(requests, 2))[0].states


def test_the_arithmetic_by_hand() -> None:
    first, second = estimate(SIZES, PLAN, "all_to_all", WORK)
    assert (first.dense, first.experts, second.experts) == (1000, 3 * 10 + 1 * 20, 1 * 10 + 3 * 20)
    assert first.states == second.states == 4 * (8 * 50 + 5 + 8 * 30)
    coherent = estimate(SIZES, PLAN, "coherent", WORK)[0]
    assert coherent.states == 2 * 4 * (8 * (50 + SLACK) + 5 + 8 * 30)
    assert estimate(SIZES, PLAN, "coherent", replace(WORK, prompts=5))[0].states == coherent.states * 5 // 8
    assert first.total == first.dense + first.experts + first.states + first.buffers


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 64), prompts=st.integers(1, 200), length=st.integers(1, 20_000), new=st.integers(1, 500),
    strategy=st.sampled_from(["all_to_all", "hierarchical", "all_gather", "replicated", "coherent"]),
)  # fmt: skip
def test_more_of_anything_never_takes_less(batch, prompts, length, new, strategy) -> None:
    work = Workload(batch, prompts, length, length + new - 1)
    needed = estimate(SIZES, PLAN, strategy, work)
    for field in ("batch_size", "prompts", "tokens"):
        more = replace(work, **{field: getattr(work, field) + 1})
        assert all(b.total >= a.total for a, b in zip(needed, estimate(SIZES, PLAN, strategy, more), strict=True))
    assert all(isinstance(n, RankMemory) and n.buffers > 0 for n in needed)


def test_what_does_not_fit_says_what_would() -> None:
    whole = max(n.total for n in estimate(SIZES, PLAN, "all_to_all", WORK))
    check_fits(SIZES, "all_to_all", WORK, Room(PLAN, {0: whole, 1: whole}))
    with pytest.raises(InputError, match=r"memory: rank 1 needs .* KB, found .* KB free, expected --batch-size 3 \(or less\)"):
        check_fits(SIZES, "all_to_all", WORK, Room(PLAN, {0: whole, 1: whole - 1}))
    room = Room(PLAN, {0: whole, 1: whole - 1})
    batch = room.largest_batch(SIZES, "all_to_all", WORK)
    assert room.fits(SIZES, "all_to_all", replace(WORK, batch_size=batch))
    assert not room.fits(SIZES, "all_to_all", replace(WORK, batch_size=batch + 1))
    with pytest.raises(InputError, match="--strategy all_to_all, which keeps a sequence on one rank only"):
        check_fits(SIZES, "coherent", WORK, Room(PLAN, {0: whole}))
    with pytest.raises(InputError, match="expected more memory"):
        check_fits(SIZES, "all_to_all", WORK, Room(PLAN, {0: 10.0}))
    with pytest.raises(InputError, match="--dtype bfloat16"):
        check_fits(SIZES, "all_to_all", WORK, Room(PLAN, {1: whole * 0.6}))


def asked_for(folder: Path, **more: Any) -> Asked:
    """Two long prompts for four ranks with two experts a layer each."""
    plan = PlacementPlan(
        slots_from_assignment(np.arange(24).reshape(3, 8) % 4, 4, 2), 8, (0, 1, 2), Topology(1, 4), folder.name
    )
    share, prompts = prepare(folder, plan, "float32", 4, 1), [Prompt(token_ids=tuple(range(1, 90)) * 40)] * 8
    text = Text(share.shape)
    return Asked(share, None, text, prompts, text.requests(prompts, 8), Sampling(), False, **more)


def test_a_strategy_that_would_break_the_budget_is_not_chosen(tmp_path: Path) -> None:
    """`coherent` keeps the keys and values of all four ranks on each."""
    asked = asked_for(make_model("mixtral", tmp_path / "m"))
    sizes, work = sizes_on_device(asked.share), workload(asked.requests, 4)
    needs = {name: estimate(sizes, asked.share.plan, name, work)[0].total for name in ("all_to_all", "coherent")}
    assert needs["coherent"] > needs["all_to_all"] + 1_000_000
    options = SimpleNamespace(batch_size=4, memory=None, dry_run=True)
    assert check_memory(asked, sizes, options, Group()).too_large == frozenset()
    for budget, left_out in ((sum(needs.values()) // 2, True), (2 * needs["coherent"], False)):
        options.memory = str(budget + resident_bytes())
        found = check_memory(asked, sizes, options, Group()).too_large
        assert ("coherent" in found) == left_out and "all_to_all" not in found


def test_what_a_plan_to_come_needs_counts_too(tmp_path: Path) -> None:
    asked = asked_for(make_model("mixtral", tmp_path / "m"))
    options = SimpleNamespace(batch_size=4, memory=None, dry_run=True)
    sizes, plan = sizes_on_device(asked.share), asked.share.plan
    copies = replace(plan, physical_to_logical=np.tile(np.arange(8, dtype=np.int32), (3, 4)))  # all experts on every rank
    before, after = (
        check_memory(replace(asked, replan=wish), sizes, options, Group()).told["memory"]["ranks"] for wish in (None, copies)
    )
    assert [rank["experts"] for rank in after] == [4 * rank["experts"] for rank in before]


def test_a_dry_run_needs_one_process_for_any_plan(tmp_path: Path, capsys) -> None:
    folder = make_model("mixtral", tmp_path / "m")
    capsys.readouterr()  # what libraries print when they are first imported
    plan = PlacementPlan(slots_from_assignment(np.arange(24).reshape(3, 8) % 4, 4, 2), 8, (0, 1, 2), Topology(2, 2), "m")
    save_plan(plan, tmp_path / "p.json")
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 6, 7]}\n{"token_ids": [5]}\n')
    files = ["--prompts", str(tmp_path / "p.jsonl"), "--plan", str(tmp_path / "p.json")]
    arguments = ["generate", str(folder), *files, "--dry-run"]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert told["ranks"] == 4 and told["strategy"] is None and told["memory"]["fits"] is None
    assert len(told["memory"]["ranks"]) == 4
    assert {*told["memory"]["by_strategy"], "local"} == set(STRATEGIES)
    assert all(r["total"] == r["dense"] + r["experts"] + r["states"] + r["buffers"] for r in told["memory"]["ranks"])
    assert "its ranks run elsewhere" in captured.err
    assert main([*arguments, "--json", "--strategy", "coherent"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["strategy"] == "coherent" and set(told["memory"]["by_strategy"]) == {"coherent"}
    assert main([*arguments, "--strategy", "local"]) == 2
    assert "--strategy: found 'local' on 4 process" in capsys.readouterr().err


def test_a_run_that_would_not_fit_ends_before_loading(tmp_path: Path, capsys, monkeypatch) -> None:
    folder = make_model("mixtral", tmp_path / "m")
    monkeypatch.setattr("coterie.launch.memory.free_bytes", lambda device: 300_000)
    monkeypatch.setattr("coterie.moe.prepare.load_share", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 6, 7]}\n' * 40)
    out = tmp_path / "o.jsonl"
    assert main(["generate", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--out", str(out)]) == 2
    assert "memory: rank 0 needs" in capsys.readouterr().err
    assert not list(tmp_path.glob("*o.jsonl*")) and not list(tmp_path.glob(".*"))


def test_a_model_that_does_not_fit_leaves_experts_on_disk(tmp_path: Path, capsys, monkeypatch) -> None:
    folder = make_model("mixtral", tmp_path / "m", hidden_size=256, intermediate_size=512, num_local_experts=16)
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 6, 7]}\n')
    arguments = ["generate", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--json", "--max-new-tokens", "4"]
    assert main(arguments) == 0
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([*arguments, "--dry-run"]) == 0
    need = json.loads(capsys.readouterr().out)["memory"]["largest"]
    monkeypatch.setattr("coterie.launch.memory.free_bytes", lambda device: need - 8_000_000)
    assert main(arguments) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["outputs"] == whole["outputs"] and 0 <= found["stats"]["hit_rate"] < 1
    assert "what is free, for each process" in captured.err and "experts at once, the others on disk" in captured.err


def test_memory_that_is_not_there_is_refused_on_one_process_too(tmp_path: Path, capsys, monkeypatch) -> None:
    folder = make_model("qwen3_moe", tmp_path, hidden_size=256, moe_intermediate_size=2048, head_dim=64)
    monkeypatch.setattr("coterie.launch.memory.free_bytes", lambda device: 10_000_000)
    monkeypatch.setattr("coterie.launch.memory.resident_bytes", lambda: 0)
    (tmp_path / "p").write_text('{"token_ids": [1, 2, 3]}\n')
    assert main(["generate", str(folder), "--prompts", str(tmp_path / "p"), "--memory", "190MB"]) == 2
    assert "--memory: found 190MB for each process, but 0.01 GB are free; give at most that" in capsys.readouterr().err


def test_no_more_slots_are_told_than_there_are_experts() -> None:
    """Where reading whole layers into memory takes more than reading them into slots does."""
    sizes, plan = replace(SIZES, expert=(10**8, 10**8), process=1), plan_of([[0] * 4, [0] * 4], 1)
    assert most_held(plan) == 8
    assert most_slots(sizes, plan, "local", WORK, 1_500_000_000, 0) == 8
    assert most_slots(sizes, plan, "local", WORK, 1_700_000_000, 0) == 8, "a process with all takes a quarter more than told"
    assert most_slots(sizes, plan, "local", WORK, 2_100_000_000, 0) is None


def test_what_is_held_while_it_is_cast_is_told(tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    cast = prepare(tmp_path / "half", None, "float32", 1)
    same = prepare(tmp_path / "half", None, "bfloat16", 1)
    largest = sorted(p.numel() * 2 for n, p in model.named_parameters() if "experts" not in n)[-4:]
    assert sizes_of(cast.shape, cast.empty, cast.dtype, None, cast.checkpoint).casting == sum(largest)
    assert sizes_of(same.shape, same.empty, same.dtype, None, same.checkpoint).casting == 0


def test_free_memory_is_the_least_of_the_system_and_the_control_groups(tmp_path: Path) -> None:
    assert system_bytes(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100 kB\nMemAvailable:  50 kB\n")
    assert system_bytes(tmp_path) == 50 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    step = tmp_path / "sys/fs/cgroup/job/step"
    step.mkdir(parents=True)
    for folder, limit in ((step, "max"), (step.parent, "40000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("30000\n")
    (step.parent / "memory.stat").write_text("anon 5\ninactive_file 7000\n")
    assert system_bytes(tmp_path) == 17_000
    (tmp_path / "proc/self/cgroup").write_text("5:memory:/\n3:cpu:/\n")
    old = tmp_path / "sys/fs/cgroup/memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("20000\n")
    (old / "memory.usage_in_bytes").write_text("15000\n")
    assert system_bytes(tmp_path) == 5000


MEASURE = """
import gc, sys
from pathlib import Path
import coterie
from coterie.moe.prepare import prepare
def resident():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmRSS"))
import coterie.moe.model
share = prepare(sys.argv[1], None, "float32", 1)
before = resident()
read = share.read(0)
gc.collect()
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_loading_leaves_the_process_no_larger_than_told(family: str, tmp_path: Path) -> None:
    """A process once stayed twice as large as its weights: small tensors, read and stacked, were never given back."""
    folder = make_model(
        family, tmp_path / "m", hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
        **({"moe_intermediate_size": 1024} if family == "qwen3_moe" else {}),
    )  # fmt: skip
    share = prepare(folder, None, "float32", 1)
    (told,) = estimate(sizes_of(share.shape, share.empty, share.dtype), share.plan, "local", Workload(1, 1, 8, 8))
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 0.95 * (told.dense + told.experts) <= int(done.stdout) <= 1.15 * told.total


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="the system does not say")
def test_what_processes_share_is_counted_once_and_children_are_counted() -> None:
    own = shared_out_bytes(os.getpid())
    assert own is not None and 0 < own <= 1.05 * resident_bytes()
    script = "import sys; kept = bytearray(b'x' * 60_000_000); print('there', flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "there\n"
        alone, both = shared_out_bytes(child.pid), shared_out_bytes(os.getpid())
        assert alone is not None and alone > 60_000_000
        assert both is not None and both >= own / 2 + 60_000_000
    finally:
        child.communicate()
    assert shared_out_bytes(child.pid) is None, "it has ended"
