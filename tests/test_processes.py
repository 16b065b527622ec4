"""Real processes over gloo: the same text as one process of transformers, only own experts read, rows as the plan predicts."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from jobs import torchrun
from references import expected_texts, tokens, uneven_plan
from safetensors import safe_open
from tiny_models import FOUR_RANK_FAMILIES, make_model

sys.path.insert(0, str(ROOT / "bench"))

import coterie
from coterie.moe import coherent
from coterie.moe.choose import MADE
from coterie.moe.dispatch import row_bytes
from coterie.placement.plan import PlacementPlan, slots_from_assignment

pytestmark = pytest.mark.processes


def run_cases(tmp_path: Path, ranks: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (tmp_path / "job.json").write_text(json.dumps(cases))
    done = torchrun(ranks, str(ROOT / "tests" / "ep_worker.py"), str(tmp_path / "job.json"), str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((tmp_path / "result.json").read_text())


def share_bytes(folder: Path, experts_by_layer: dict[int, list[int]], num_experts: int) -> int:
    """Bytes of the dense tensors and of these experts, counted from the file's own header."""
    total = 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            size = tensor.numel() * tensor.element_size()
            parts = name.split(".")
            layer = next((int(p) for p in parts if p.isdigit()), -1)
            stacked = tensor.ndim >= 2 and tensor.shape[0] == num_experts and ("experts" in name or "_linear" in name)
            if "experts" in parts and parts[parts.index("experts") + 1].isdigit():
                total += size if int(parts[parts.index("experts") + 1]) in experts_by_layer[layer] else 0
            elif stacked:
                total += size // num_experts * len(experts_by_layer[layer])
            else:
                total += size
    return total


def test_four_ranks_equal_transformers_on_every_family_with_and_without_a_plan(tmp_path: Path) -> None:
    """By each strategy in turn, and once by the one that is chosen."""
    prompts = [tokens(n, n) for n in (17, 3, 40, 1, 9, 22)]
    cases, expected, plans = [], [], []
    for family in FOUR_RANK_FAMILIES:
        folder = make_model(family, tmp_path / family)
        texts, reference = expected_texts(folder, prompts, 12)
        with torch.no_grad():
            logits = [reference(torch.tensor([p])).logits[0, -1] for p in prompts[:4]]
        plan = uneven_plan(folder, 4, tmp_path / f"{family}.json")
        for plan_file in ("", str(tmp_path / f"{family}.json")):
            case = {"model": str(folder), "plan": plan_file, "prompts": prompts, "new_tokens": 12, "batch_size": 2}
            named = [name for name in MADE if name != "coherent" or family in coherent.FAMILIES]
            cases.append({**case, "strategy": named[len(cases) % len(named)] if cases else None})
            expected.append((texts, logits))
            plans.append(plan if plan_file else None)
    for case, result, (texts, logits), plan in zip(cases, run_cases(tmp_path, 4, cases), expected, plans, strict=True):
        where = f"{case['model']} with plan {case['plan']!r} by {case['strategy']}"
        assert result["texts"] == texts, where
        assert result["repeatable"], where
        for found, wanted in zip(result["logits"], logits, strict=True):
            assert (torch.tensor(found) - wanted).abs().max() <= 1e-4 * wanted.abs().max(), where
        for rank in range(4):
            held = result["experts"][rank]
            if plan is not None:
                assert held == [plan.experts_on(i, rank) for i in range(len(plan.layer_ids))], where
            layer_ids = plans[cases.index(case) ^ 1 if plan is None else cases.index(case)].layer_ids
            by_layer = dict(zip(layer_ids, held, strict=True))
            assert result["bytes"][rank] == share_bytes(Path(case["model"]), by_layer, 8), where


@pytest.mark.parametrize("ranks", [2, 3])
def test_more_ranks_than_prompts_and_uneven_batches_stay_in_step(tmp_path: Path, ranks: int) -> None:
    folder = make_model("qwen3_moe", tmp_path / "m")
    uneven_plan(folder, ranks, tmp_path / "p.json")
    sets = [[tokens(6, 1)], [tokens(n, n) for n in range(2, 9)]]
    cases = [
        {"model": str(folder), "plan": str(tmp_path / "p.json"), "prompts": p, "new_tokens": 9, "batch_size": 2} for p in sets
    ]
    for result, prompts in zip(run_cases(tmp_path, ranks, cases), sets, strict=True):
        assert result["texts"] == expected_texts(folder, prompts, 9)[0]


def test_rows_sent_are_the_rows_the_plan_predicts(tmp_path: Path) -> None:
    """The counters of a prefill equal what `evaluate` says of the same tokens; bytes are rows times row size."""
    folder = make_model("olmoe", tmp_path / "m")
    plan = uneven_plan(folder, 4, tmp_path / "p.json")
    prompts = [tokens(n, n) for n in (11, 5, 30, 2, 8)]
    coterie.load(folder).record([coterie.Prompt(token_ids=tuple(p)) for p in prompts], tmp_path / "t.safetensors")
    trace = coterie.read_trace(tmp_path / "t.safetensors")
    report = coterie.evaluate(plan, trace)
    case = {
        "model": str(folder),
        "plan": str(tmp_path / "p.json"),
        "prompts": prompts,
        "new_tokens": 1,
        "batch_size": 2,
        "strategy": "all_to_all",
    }
    result = run_cases(tmp_path, 4, [case])[0]
    predicted = report.remote_rows * trace.tokens * trace.layers
    assert result["rows"] == round(predicted) and abs(predicted - round(predicted)) < 1e-6
    out, back = row_bytes(32, 3, torch.float32), 32 * 4  # a dispatched row with its header, and a returned one
    assert result["bytes_sent"] == result["rows"] // 2 * (out + back)


def generate(tmp_path: Path, ranks: int, *options: str) -> subprocess.CompletedProcess[str]:
    return torchrun(ranks, "-m", "coterie", "generate", *options)


def test_the_command_line_prints_one_object_on_rank_0_alone(tmp_path: Path) -> None:
    folder = make_model("mixtral", tmp_path / "m")
    prompts = [tokens(5, 1), tokens(9, 2), tokens(2, 3)]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"token_ids": p, "id": f"n{i}"}) + "\n" for i, p in enumerate(prompts))
    )
    done = generate(
        tmp_path,
        2,
        str(folder),
        "--prompts",
        str(tmp_path / "p.jsonl"),
        "--max-new-tokens",
        "6",
        "--json",
        "--dtype",
        "float32",
        "--strategy",
        "all_to_all",
        "--out",
        str(tmp_path / "o.jsonl"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert [o["id"] for o in result["outputs"]] == ["n0", "n1", "n2"]
    assert [o["token_ids"] for o in result["outputs"]] == expected_texts(folder, prompts, 6)[0]
    assert set(result["stats"]) == {
        "prompt_tokens",
        "new_tokens",
        "seconds",
        "tokens_per_second",
        "strategy",
        "ranks",
        "bytes_read",
        "rows_sent",
        "hit_rate",
        "peak_memory_bytes",
    }
    assert result["stats"]["ranks"] == 2 and result["stats"]["strategy"] == "all_to_all" and result["stats"]["rows_sent"] > 0
    assert [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()] == result["outputs"]


def test_a_new_plan_is_taken_over_while_text_is_written(tmp_path: Path) -> None:
    folder = make_model("mixtral", tmp_path / "m")
    for seed, name in enumerate(("p", "q")):
        experts = np.random.default_rng(seed).permutation(8)
        slots = slots_from_assignment(np.stack([experts % 2, experts // 4 % 2, (experts + 1) % 2]), 2, 4)
        plan = PlacementPlan(slots, 8, (0, 1, 2), coterie.Topology(1, 2), "m")
        coterie.save_plan(plan, tmp_path / name)
    prompts = [tokens(5, 1), tokens(9, 2)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"token_ids": p}) + "\n" for p in prompts))
    line = [str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--max-new-tokens", "24", "--json", "--dtype", "float32"]
    line += ["--plan", str(tmp_path / "p"), "--replan", str(tmp_path / "q"), "--strategy", "all_to_all"]
    done = generate(tmp_path, 2, *line)
    assert done.returncode == 0 and "the new plan has been taken over in step" in done.stderr, done.stderr[-3000:]
    assert [o["token_ids"] for o in json.loads(done.stdout)["outputs"]] == expected_texts(folder, prompts, 24)[0]


def test_a_plan_that_does_not_fit_fails_on_all_ranks_with_one_message(tmp_path: Path) -> None:
    folder = make_model("mixtral", tmp_path / "m")
    uneven_plan(folder, 4, tmp_path / "p.json")
    done = generate(tmp_path, 2, str(folder), "--prompt", "x", "--plan", str(tmp_path / "p.json"))
    assert done.returncode != 0 and done.stdout == ""
    ours = [line for line in done.stderr.splitlines() if line.startswith("coterie: ")]
    assert ours == [f"coterie: {tmp_path / 'p.json'}: ranks: the plan is for 4, found 2 processes; start 4, or plan for 2"]


def test_what_fails_on_one_rank_ends_all_with_its_message(tmp_path: Path) -> None:
    """An expert that only rank 1 needs is missing: rank 0 must neither hang nor go on alone."""
    from safetensors.torch import load_file, save_file

    folder = make_model("mixtral", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if ".experts.7.w2." not in k},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 6]}')
    done = generate(tmp_path, 2, str(folder), "--prompts", str(tmp_path / "p.jsonl"))
    ours = [line for line in done.stderr.splitlines() if line.startswith("coterie: ")]
    assert done.returncode != 0 and len(ours) == 1
    assert "rank 1: " in ours[0] and "lacks expert 7" in ours[0]


def test_more_processes_than_experts_is_an_error(tmp_path: Path) -> None:
    folder = make_model("mixtral", tmp_path / "m", num_local_experts=2)
    done = generate(tmp_path, 3, str(folder), "--prompt", "x")
    assert done.returncode != 0
    assert "coterie: ranks: found 3 processes, expected at most 2: the model has that many experts" in done.stderr


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_model("mixtral", tmp_path / "m")
    plan = coterie.load(folder).plan
    other_experts = np.arange(9, dtype=np.int32)[None].repeat(3, 0)
    for changes, message in (
        (dict(model="other"), "model: the plan has 'other', expected 'm'"),
        (dict(layer_ids=(0, 1, 3)), r"layer_ids: the plan has \(0, 1, 3\), expected \(0, 1, 2\)"),
        (dict(num_experts=9, physical_to_logical=other_experts), "num_experts: the plan has 9, expected 8"),
    ):
        with pytest.raises(coterie.InputError, match=message):
            coterie.load(folder, replace(plan, **changes))
