"""One process: every family's logits and text equal transformers' own; every family that cannot run is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from thread_ranks import load, on_ranks
from tiny_models import COMMON, FAMILIES, make_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import coterie
from coterie.moe.families import supported_families
from coterie.moe.placement_map import contiguous_plan
from coterie.moe.prepare import device_of
from coterie.routing.errors import InputError

TOLERANCE = 1e-4  # of the largest logit, float32


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_text_equal_transformers(family: str, tmp_path: Path) -> None:
    make_model(family, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = coterie.load(tmp_path, dtype="float32")
    prompts = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)) for n in (21, 8, 1)]
    with torch.no_grad():
        expected = reference(prompts[0][None]).logits
        found = model.transformers(prompts[0][None]).logits
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    outputs, statistics = model.generate([coterie.Prompt(token_ids=tuple(p.tolist())) for p in prompts], 16)
    for prompt, output in zip(prompts, outputs, strict=True):
        text = reference.generate(prompt[None], max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
        assert list(output.token_ids) == text
    assert statistics.rows_sent == 0 and statistics.strategy == "local"
    assert len({t for o in outputs for t in o.token_ids}) > 5, "the text is too plain to tell anything"


def test_our_experts_can_be_chosen_in_plain_transformers(tmp_path: Path) -> None:
    import coterie.moe.layer  # noqa: F401 (registers the implementation)

    make_model("gpt_oss", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="coterie")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_sharded_checkpoint_with_an_expert_split_over_two_files_loads(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    model.save_pretrained(tmp_path / "split", max_shard_size="40KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 4
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(
            coterie.load(tmp_path / "split", dtype="float32").transformers(ids).logits,
            coterie.load(tmp_path / "whole", dtype="float32").transformers(ids).logits,
        )


def test_dtypes_are_the_checkpoints_the_callers_or_float32_on_a_cpu(tmp_path: Path) -> None:
    make_model("olmoe", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for asked, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        assert next(coterie.load(tmp_path, dtype=asked).transformers.parameters()).dtype == expected
    with pytest.raises(InputError, match="--dtype: found 'int3', expected auto, float32, bfloat16, float16"):
        coterie.load(tmp_path, dtype="int3")


def test_every_family_of_the_issue_is_listed() -> None:
    assert set(FAMILIES) <= set(supported_families())


def test_a_model_without_experts_is_refused_with_the_families_that_work(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**COMMON)).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"config\.json: model_type 'llama' has no experts that go through.*mixtral.*qwen3_moe"
    ):
        coterie.load(tmp_path)


def test_a_family_whose_experts_take_another_way_is_refused_by_name(tmp_path: Path) -> None:
    config = dict(
        model_type="longcat_flash",
        vocab_size=97,
        hidden_size=32,
        ffn_hidden_size=48,
        num_layers=2,
        num_attention_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        expert_ffn_hidden_size=16,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"model_type 'longcat_flash' has no experts that go through.*olmoe"):
        coterie.load(tmp_path)


def test_a_moe_family_configured_without_moe_layers_says_so(tmp_path: Path) -> None:
    make_model("qwen3_moe", tmp_path, mlp_only_layers=[0, 1, 2])
    with pytest.raises(InputError, match=r"'qwen3_moe': this configuration has no layer with routed experts"):
        coterie.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a configuration that transformers"),
        ("{}", "not a configuration that transformers"),
        ('{"model_type": "no_such_family"}', "not a configuration that transformers"),
    ],
)
def test_a_wrong_configuration_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        coterie.load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_what_is_no_model_at_all_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: no such file, expected a transformers checkpoint folder"):
        coterie.load(tmp_path)
    with pytest.raises(InputError, match="MODEL: found '/no/where', expected a checkpoint folder, a hub id"):
        coterie.load("/no/where")
    with pytest.raises(InputError, match="'nobody/nothing' is no folder here and could not be fetched from the hub"):
        coterie.load("nobody/nothing")


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = "model.layers.1.self_attn.q_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"the checkpoint lacks 1 tensors, among them '{gone}'"):
        coterie.load(tmp_path)
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != expert}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"the checkpoint lacks expert 3 of 'model.layers.1.mlp.experts.gate_up_proj'"):
        coterie.load(tmp_path)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_weights_in_fewer_bits_need_a_configuration_that_says_so(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model("gpt_oss", tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mlp.experts.down_proj"
    for changed, message in (
        ({f"{name}_blocks": torch.zeros(8, 4, dtype=torch.uint8)}, "found an unknown tensor among the experts"),
        ({name: tensors[name].to(torch.float8_e4m3fn)}, "found torch.float8_e4m3fn, expected .* beside it"),
    ):
        save_file({**tensors, **changed}, weights, metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"{message}.*quantization_config"):
            coterie.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_beams=4), "num_beams: found 4, which coterie does not carry out"),
        (dict(penalty_alpha=0.6), "penalty_alpha: found 0.6"),
        (dict(repetition_penalty=-1.0), "generation_config.json"),
        (dict(eos_token_id="x"), "generation_config.json"),
    ],
)
def test_generation_settings_that_would_be_ignored_are_refused(tmp_path: Path, changes, message) -> None:
    edit_json(make_model("mixtral", tmp_path) / "generation_config.json", **changes)
    with pytest.raises(InputError, match=message):
        coterie.load(tmp_path).generate([coterie.Prompt(token_ids=(3,))], 2)


def test_more_experts_per_token_than_there_are_is_refused(tmp_path: Path) -> None:
    edit_json(make_model("mixtral", tmp_path) / "config.json", num_experts_per_tok=9)
    with pytest.raises(InputError, match="experts per token: found 9, expected 1 to 8"):
        coterie.load(tmp_path)


def test_a_plan_for_a_strategy_is_run_by_it(tmp_path: Path) -> None:
    from dataclasses import replace

    model = coterie.load(make_model("mixtral", tmp_path))
    planned = replace(model.plan, strategy="coherent")
    assert coterie.load(tmp_path, planned).dispatcher.asked is None  # one process: every expert is here
    two = replace(contiguous_plan(model.shape, 2), strategy="coherent")
    assert on_ranks(2, lambda group: load(tmp_path, two, group=group).dispatcher.asked) == ["coherent"] * 2
    jamba = make_model("jamba", tmp_path / "jamba")
    with pytest.raises(InputError, match="found 'coherent' for model_type 'jamba', expected one of mixtral"):
        on_ranks(2, lambda group: load(jamba, strategy="coherent", group=group))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    make_model("mixtral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(InputError, match=r"do(es)? .*fit"):
        coterie.load(tmp_path)


def test_a_gpu_is_named_by_its_number(monkeypatch) -> None:
    """Threads of transformers' loader have another default than the one that this process chose."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device_of(None) == device_of("cuda") == torch.device("cuda", 3)
    assert device_of("cuda:1") == torch.device("cuda", 1) and device_of("cpu") == torch.device("cpu")
