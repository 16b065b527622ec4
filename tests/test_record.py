"""Recorded routing is what the routers chose, for the tokens of the prompts and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FOUR_RANK_FAMILIES, make_model
from transformers import AutoModelForCausalLM

import coterie
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.record import Recorder, TraceWriter, expert_modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model("qwen3_moe", tmp_path_factory.mktemp("model"))


def ids(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def test_recorded_experts_are_the_routers_top_k(folder: Path, tmp_path: Path, no_partial_files) -> None:
    prompts = [coterie.Prompt(token_ids=ids(n, n)) for n in (5, 12, 1)]
    model = coterie.load(folder)
    assert model.record(prompts, tmp_path / "t.safetensors", scenario="x") == 18
    trace = coterie.read_trace(tmp_path / "t.safetensors")
    assert (trace.phase, trace.scenario, trace.num_experts, trace.top_k, trace.layer_ids) == (
        "prefill",
        "x",
        8,
        3,
        (0, 1, 2),
    )
    assert trace.model == folder.name
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for number, prompt in enumerate(prompts):
        mine = trace.sequence_ids == number
        assert trace.positions[mine].tolist() == list(range(len(prompt.token_ids)))
        with torch.no_grad():
            logits = reference(torch.tensor([prompt.token_ids]), output_router_logits=True).router_logits
        for layer, scores in enumerate(logits):
            best = scores.softmax(-1).topk(3, -1)
            assert np.array_equal(np.sort(trace.expert_ids[mine, layer], 1), np.sort(best.indices.numpy(), 1))
            assert trace.router_weights[mine, layer].sum(1) == pytest.approx(np.ones(mine.sum()), abs=2e-3)


@pytest.mark.parametrize("family", FOUR_RANK_FAMILIES)
def test_any_family_can_be_recorded_and_a_plan_for_it_loads(family: str, tmp_path: Path) -> None:
    model = coterie.load(make_model(family, tmp_path / "model"))
    out = tmp_path / "t.safetensors"
    model.record([coterie.Prompt(token_ids=ids(30))], out, max_new_tokens=5)
    trace = coterie.read_trace(out)
    assert trace.tokens == 34 and trace.phase == "mixed" and trace.layer_ids == model.shape.layer_ids
    plan = coterie.plan(trace, coterie.PlanRequest(coterie.parse_topology("1x1"), time_limit=2))
    assert coterie.load(tmp_path / "model", plan).plan is plan


def test_decode_records_new_tokens_only_and_positions_go_on(folder: Path, tmp_path: Path) -> None:
    prompts = [coterie.Prompt(token_ids=ids(6)), coterie.Prompt(token_ids=ids(3))]
    model = coterie.load(folder)
    model.record(prompts, tmp_path / "d.safetensors", max_new_tokens=4, phase="decode")
    trace = coterie.read_trace(tmp_path / "d.safetensors")
    assert trace.phase == "decode"
    for number, start in enumerate((6, 3)):
        found = trace.positions[trace.sequence_ids == number].tolist()
        assert found == list(range(start, start + len(found))) and 0 < len(found) <= 3
    with pytest.raises(InputError, match="--phase: found 'prefill' with 4 new tokens, expected --max-new-tokens 0, or mixed"):
        model.record(prompts, tmp_path / "p.safetensors", max_new_tokens=4, phase="prefill")
    asked = [replace(prompt, max_new_tokens=4) for prompt in prompts]  # as their file says, of runs that generate
    model.record(asked, tmp_path / "p.safetensors", phase="prefill")
    assert coterie.read_trace(tmp_path / "p.safetensors").tokens == 9


def test_recording_stops_at_the_number_of_tokens_asked_for(folder: Path, tmp_path: Path) -> None:
    prompts = [coterie.Prompt(token_ids=ids(7, n)) for n in range(5)]
    assert coterie.load(folder).record(prompts, tmp_path / "t.safetensors", max_tokens=10, batch_size=2) == 10
    assert coterie.read_trace(tmp_path / "t.safetensors").tokens == 10


def test_batching_does_not_change_what_is_recorded(folder: Path, tmp_path: Path) -> None:
    prompts = [coterie.Prompt(token_ids=ids(n, n)) for n in (9, 2, 14, 5)]
    model = coterie.load(folder)
    for size in (1, 4):
        model.record(prompts, tmp_path / f"{size}.safetensors", batch_size=size)
    one, four = (coterie.read_trace(tmp_path / f"{size}.safetensors") for size in (1, 4))
    assert (one.expert_ids == four.expert_ids).all() and (one.positions == four.positions).all()


def test_any_transformers_model_can_be_recorded_without_coterie_loading_it(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    from coterie.routing.record import metadata_for

    writer = TraceWriter(tmp_path / "t.safetensors", metadata_for("m", 8, tuple(expert_modules(model)), "", "prefill"), 3, 3)
    recorder = Recorder(model, writer, 8, "prefill", None)
    with recorder.attached():
        recorder.sequences = [0]
        model(torch.tensor([ids(6)]))
        recorder.sequences = [0, 1]
        with pytest.raises(CoterieError, match="sequences: found 2 ids, expected 1"):
            model(torch.tensor([ids(6)]))
    writer.close()
    assert coterie.read_trace(tmp_path / "t.safetensors").tokens == 6


def test_an_interrupted_recording_leaves_nothing_behind(folder: Path, tmp_path: Path, monkeypatch, no_partial_files) -> None:
    model = coterie.load(folder)
    out = tmp_path / "t.safetensors"
    out.write_text("precious")
    monkeypatch.setattr(TraceWriter, "append", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.record([coterie.Prompt(token_ids=ids(6))], out)
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(phase="decode"), "--phase: found 'decode' with 0 new tokens, expected --max-new-tokens of 2 or more"),
        (dict(max_tokens=0), "--max-tokens: found 0, expected 1 or more"),
        (dict(prompts=[]), "prompts: found none"),
        (dict(prompts=["text"]), "has no tokenizer, expected prompts with token_ids"),
        (dict(prompts=[coterie.Prompt(token_ids=(97,))]), r"prompt 0 .*: token_ids: found 97, expected 0 to 96"),
        (dict(out=Path("/nowhere/t")), "/nowhere/t: the folder /nowhere does not exist"),
    ],
)
def test_wrong_arguments_are_named_before_anything_runs(
    folder: Path, tmp_path: Path, options, message, no_partial_files
) -> None:
    arguments = {"prompts": [coterie.Prompt(token_ids=(3, 4))], "out": tmp_path / "t", **options}
    with pytest.raises(InputError, match=message):
        coterie.load(folder).record(**arguments)
