"""Checkpoints published in 8 or 4 bits: the weights, logits and text of transformers' own reading of them in bfloat16."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coded_models import BLOCK, edit_json, publish_fp8, publish_mxfp4, to_fp8, to_mxfp4
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import coterie
from coterie.launch.cli import main
from coterie.launch.memory import parse_bytes
from coterie.launch.packing import contents_of
from coterie.moe.load import load_share
from coterie.moe.prepare import not_packed, prepare
from coterie.moe.text import Prompt
from coterie.offload.checkpoint import Checkpoint
from coterie.offload.coded import from_fp8, from_mxfp4
from coterie.offload.pack import pack, verify
from coterie.routing.errors import InputError
from coterie.routing.record import expert_modules

IDS = torch.tensor([[5, 17, 33, 60, 8]])
GPT_OSS = {"hidden_size": 64, "intermediate_size": 96}
KINDS = ("qwen3_moe", "deepseek_v3", "gpt_oss")


def published(family: str, folder: Path) -> Path:
    return (
        publish_mxfp4(make_model(family, folder, **GPT_OSS)) if family == "gpt_oss" else publish_fp8(make_model(family, folder))
    )


def transformers_own(family: str, folder: Path) -> Any:
    how = (
        Mxfp4Config(dequantize=True) if family == "gpt_oss" else FineGrainedFP8Config(dequantize=True, weight_block_size=BLOCK)
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=how).eval()


@pytest.mark.parametrize("shape", [(16, 24), (17, 30), (3, 5)])
@pytest.mark.parametrize("block", [(8, 8), (128, 128), None])
def test_fp8_is_value_times_the_scale_of_its_block(shape: tuple[int, int], block: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    values, scales = to_fp8(torch.randn(shape), block)
    found = from_fp8(values, scales, block)
    for row in range(shape[0]):
        for column in range(shape[1]):
            scale = scales if block is None else scales[row // block[0], column // block[1]]
            assert found[row, column] == (values[row, column].float() * scale).bfloat16()


def test_every_byte_of_mxfp4_is_two_values_times_a_power_of_two() -> None:
    by_code = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    blocks = torch.arange(256, dtype=torch.uint8).view(4, 4, 16)
    scales = torch.tensor([[127, 130, 120, 2]] * 3 + [[127, 3, 127, 251]], dtype=torch.uint8)
    found = from_mxfp4(blocks, scales)
    assert found.shape == (128, 4) and found.dtype == torch.bfloat16 and found.is_contiguous()
    for row in range(4):
        for column in range(128):
            byte = int(blocks[row, column // 32, column % 32 // 2])
            value = by_code[byte >> 4 if column % 2 else byte & 15]
            assert float(found[column, row]) == value * 2.0 ** (int(scales[row, column // 32]) - 127)


@pytest.mark.parametrize("family", KINDS)
def test_weights_logits_and_text_are_those_of_transformers_reading(family: str, tmp_path: Path) -> None:
    folder = published(family, tmp_path / "m")
    theirs, made = transformers_own(family, folder), coterie.load(folder, dtype="bfloat16", device="cpu")
    weights = made.transformers.state_dict()
    for name, right in theirs.state_dict().items():
        assert torch.equal(weights[name], right), name
    assert made.transformers.config.__dict__.get("quantization_config") is None
    wide = coterie.load(folder, device="cpu")
    with torch.no_grad():
        right = theirs.float().generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, IDS.shape[1] :]
    wide.transformers.generation_config.eos_token_id = None
    (output,), _ = wide.generate([Prompt(token_ids=tuple(IDS[0].tolist()))], 12)
    assert list(output.token_ids) == right.tolist()


@pytest.mark.parametrize("family", KINDS)
def test_a_rank_reads_its_own_experts_alone(family: str, tmp_path: Path) -> None:
    folder = published(family, tmp_path / "m")
    read = []
    for ranks in (1, 2):
        share = prepare(folder, None, "bfloat16", ranks, device="cpu")
        share.read(0)
        read.append(share.checkpoint.counter.bytes)
    experts = sum(
        t.numel() * t.element_size() for n, t in load_file(folder / "model.safetensors").items()
        if ".experts." in n and "bias" not in n
    )  # fmt: skip
    biases = sum(t.numel() * 2 for n, t in load_file(folder / "model.safetensors").items() if ".experts." in n and "bias" in n)
    assert read[0] - read[1] == (experts + biases) // 2


@pytest.mark.parametrize("quantise", [None, "int8"])
@pytest.mark.parametrize("family", KINDS)
def test_out_of_a_packed_copy_logits_are_those_with_all_in_memory(family: str, quantise: str | None, tmp_path: Path) -> None:
    folder, copy = published(family, tmp_path / "m"), tmp_path / "packed"
    pack(contents_of(str(folder), quantise), copy)
    options: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu", "quantise": quantise}
    resident, cached = coterie.load(folder, **options), coterie.load(folder, slots=3, packed=copy, **options)
    with torch.inference_mode():
        for ids in (IDS, IDS[:, :1]):
            assert torch.equal(cached.transformers(ids).logits, resident.transformers(ids).logits)
    if quantise is None:
        theirs = transformers_own(family, folder).float()
        wide = coterie.load(folder, slots=3, packed=copy, device="cpu").transformers
        with torch.no_grad():
            assert torch.allclose(wide(IDS).logits, theirs(IDS).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_what_is_published_in_fp8_is_not_rounded_again(scales: torch.dtype, tmp_path: Path) -> None:
    folder = publish_fp8(make_model("qwen3_moe", tmp_path / "m", hidden_size=160, moe_intermediate_size=256), (128, 128))
    file, copy = folder / "model.safetensors", tmp_path / "packed"
    stored = {n: t.to(scales) if n.endswith("_scale_inv") else t for n, t in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    resident = coterie.load(folder, dtype="bfloat16", device="cpu", quantise="fp8")
    first, second = resident.transformers.model.layers[1].mlp.experts.coterie_products
    at = "model.layers.1.mlp.experts.3."
    for product, names in ((first, ("gate_proj", "up_proj")), (second, ("down_proj",))):
        values = torch.cat([stored[f"{at}{name}.weight"].view(torch.uint8) for name in names])
        assert torch.equal(product.weights.data[3].view(torch.uint8), values)
        right = torch.cat([stored[f"{at}{name}.weight_scale_inv"].float() for name in names])
        assert torch.equal(product.weights.scale[3], right)
    pack(contents_of(str(folder), "fp8"), copy)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    for packed in (copy, None):  # without one in place, right into slots
        cached = coterie.load(folder, dtype="bfloat16", device="cpu", quantise="fp8", slots=3, packed=packed)
        assert cached.cache is not None
        files = {piece.file for part in cached.cache.store.records[0][0].values() for piece in part.pieces}
        assert files == {copy / "experts-00000.bin" if packed else folder / "model.safetensors"}
        with torch.inference_mode():
            assert torch.equal(cached.transformers(IDS).logits, resident.transformers(IDS).logits)


def test_scales_that_are_exponents_are_read_too(tmp_path: Path) -> None:
    folder = published("qwen3_moe", tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = {n: t.log2().ceil().exp2() if n.endswith("_scale_inv") else t for n, t in load_file(file).items()}
    states = []
    for kept in (lambda t: t, lambda t: t.to(torch.float8_e8m0fnu), lambda t: t.to(torch.float8_e8m0fnu).view(torch.uint8)):
        made = {n: kept(t) if n.endswith("_scale_inv") else t for n, t in tensors.items()}
        save_file(made, file, metadata={"format": "pt"})
        states.append(coterie.load(folder, device="cpu").transformers.state_dict())
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())
    save_file({n: t.int() if n.endswith("_scale_inv") else t for n, t in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"_scale_inv.: found torch.int32, expected one of torch.float32, "):
        coterie.load(folder, device="cpu")


@pytest.mark.parametrize("quantise", [None, "fp8", "int8"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_copy_knows_the_checkpoint_that_it_is_of(family: str, quantise: str | None, tmp_path: Path) -> None:
    folder, copy = tmp_path / "m", tmp_path / "packed"
    if family == "gpt_oss":
        published(family, folder)
    else:
        publish_fp8(make_model(family, folder, hidden_size=160, moe_intermediate_size=256), (128, 128))
    pack(contents_of(str(folder), quantise), copy)
    file = folder / "model.safetensors"
    os.utime(file, ns=(1, 1))
    assert verify(contents_of(str(folder), quantise), copy).experts == 8 * 3
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith(("_scales", "_scale_inv")) and ".experts." in n]:
        tensors[name] = tensors[name] + 1 if tensors[name].dtype == torch.uint8 else tensors[name] * 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="the checkpoint is another or has changed since it was packed"):
        verify(contents_of(str(folder), quantise), copy)


def test_without_room_for_all_a_copy_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = make_model("qwen3_moe", tmp_path / "m", hidden_size=256, moe_intermediate_size=2048)
    folder = publish_fp8(large, (128, 128))
    asked = r"a checkpoint in fewer bits but without packed.*: coterie pack MODEL --out DIR, then --packed DIR"
    with pytest.raises(InputError, match=f"slots: .*{asked}"):
        coterie.load(folder, slots=3, device="cpu")
    generate = ["generate", str(folder), "--prompts", str(prompts(tmp_path)), "--dry-run", "--memory"]
    assert main([*generate, "1000"]) == 2
    least = capsys.readouterr().err.partition("expected ")[2].partition(" or more")[0].replace(" ", "")
    assert main([*generate, str(parse_bytes(least) + 20_000_000)]) == 2
    assert re.search(
        f"--memory: .*{asked}; --quantise fp8 needs none.*; all experts need --memory [0-9]+", capsys.readouterr().err
    )


def test_the_advice_is_given_on_gpus_without_fp8_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = publish_fp8(make_model("qwen3_moe", tmp_path / "m", hidden_size=160, moe_intermediate_size=256), (128, 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    share = replace(prepare(folder, None, "bfloat16", 1, device="cpu"), device=torch.device("cuda", 0))
    said = not_packed("slots", share)
    assert said.endswith("coterie pack MODEL --out DIR, then --packed DIR"), said


def test_what_has_become_no_numbers_is_told_by_its_place(tmp_path: Path) -> None:
    folder, copy = published("gpt_oss", tmp_path / "m"), tmp_path / "packed"
    pack(contents_of(str(folder), "int8"), copy)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith("_scales")]:
        tensors[name] = torch.full_like(tensors[name], 255)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"model.safetensors: byte [0-9]+: .* of an expert: weights: found values that are not"
    ):
        verify(contents_of(str(folder), "int8"), copy)


def prompts(folder: Path) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text(json.dumps({"token_ids": [5, 17, 33]}) + "\n")
    return file


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    folder = published("qwen3_moe", tmp_path / "m")
    config, file = folder / "config.json", folder / "model.safetensors"
    right = json.loads(config.read_text())["quantization_config"]
    for changes, message in (
        (
            {"quant_method": "gptq", "bits": 4},
            "found 'gptq', expected none, fp8 or mxfp4: convert the checkpoint",
        ),
        ({**right, "expert_dtype": "fp4"}, "expert_dtype: found 'fp4', expected fp8"),
        ({**right, "weight_block_size": [16, 16]}, r"weight_scale_inv': found shape \[.*\], expected \[.*\], one for 16 x 16"),
        ({**right, "weight_block_size": [0, 8]}, "weight_block_size: found"),
        ({"quant_method": "mxfp4"}, "found torch.float8_e4m3fn, expected .*_scale_inv. beside it"),
    ):
        edit_json(config, quantization_config=changes)
        with pytest.raises(InputError, match=message):
            coterie.load(folder, device="cpu")
    edit_json(config, quantization_config=right)
    tensors = load_file(file)
    name = next(n for n in tensors if ".experts." in n and n.endswith("_scale_inv"))
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"found torch.float8_e4m3fn, expected .*_scale_inv. beside it"):
        coterie.load(folder, device="cpu")


def test_scales_of_mxfp4_fit_their_blocks(tmp_path: Path) -> None:
    folder = published("gpt_oss", tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("_scales"))
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"found torch.uint8 .* expected uint8 \[E, N, K / 32, 16\] and \[E, N, K / 32\]"):
        coterie.load(folder, device="cpu")
    blocks = name.replace("_scales", "_blocks")
    save_file({**tensors, blocks: tensors[blocks][..., :8].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"expected uint8 \[E, N, K / 32, 16\]"):
        coterie.load(folder, device="cpu")
    blocks, scales = to_mxfp4(torch.randn(2, 64, 5))
    assert blocks.shape == (2, 5, 2, 16) and scales.shape == (2, 5, 2)


@pytest.mark.parametrize("block", [(128, 128), None])
def test_experts_in_one_stack_are_those_by_themselves(block: tuple[int, int] | None, tmp_path: Path) -> None:
    folder = publish_fp8(make_model("qwen3_moe", tmp_path / "m", hidden_size=160, moe_intermediate_size=256), block)
    file = folder / "model.safetensors"
    tensors, logits = load_file(file), []
    for layer in range(3):  # gate and up with one scale, so that they can be one tensor of a stack
        for expert in range(8 if block is None else 0):
            at = f"model.layers.{layer}.mlp.experts.{expert}."
            tensors[f"{at}up_proj.weight_scale_inv"] = tensors[f"{at}gate_proj.weight_scale_inv"].clone()
    stacked_too = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(3):
        for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            at = f"model.layers.{layer}.mlp.experts."
            values = [torch.cat([tensors[f"{at}{e}.{p}.weight"].view(torch.uint8) for p in parts]) for e in range(8)]
            stacked_too[at + name] = torch.stack(values).view(torch.float8_e4m3fn)
            scales = [[tensors[f"{at}{e}.{p}.weight_scale_inv"] for p in parts] for e in range(8)]
            joined = [torch.cat(of) if block is not None else of[0] for of in scales]
            stacked_too[f"{at}{name}_scale_inv"] = torch.stack(joined)
    options: list[dict[str, Any]] = [{}, {"quantise": "fp8"}]
    for made in (tensors, stacked_too):
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, file, metadata={"format": "pt"})
        for more in options if block is None else [*options, {"quantise": "fp8", "slots": 3}]:
            with torch.inference_mode():
                logits.append(coterie.load(folder, dtype="bfloat16", device="cpu", **more).transformers(IDS).logits)
    half = len(logits) // 2
    assert all(torch.equal(a, b) for a, b in zip(logits[:half], logits[half:], strict=True))
    if block is None:  # one of all experts
        one = {n: t.flatten()[0].clone() if t.shape == (8,) and n.endswith("_scale_inv") else t for n, t in stacked_too.items()}
        save_file({name: tensor.contiguous() for name, tensor in one.items()}, file, metadata={"format": "pt"})
        found = coterie.load(folder, dtype="bfloat16", device="cpu").transformers.model.layers[0].mlp.experts.down_proj
        at = "model.layers.0.mlp.experts.down_proj"
        assert torch.equal(found, (one[at].float() * one[f"{at}_scale_inv"]).bfloat16())


def test_layers_that_transformers_leaves_out_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published("deepseek_v3", tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    more = {n.replace("layers.2.", "layers.61."): t.clone() for n, t in tensors.items() if ".layers.2." in n}
    save_file({**tensors, **more}, file, metadata={"format": "pt"})
    told: list[tuple[int, int]] = []
    share = prepare(folder, None, "bfloat16", 1, device="cpu")
    share.read(0, lambda count, whole: told.append((count, whole)))
    assert sum(count for count, _ in told) == told[0][1] == sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_rank_without_experts_reads_what_is_not_experts(tmp_path: Path) -> None:
    folder = published("gpt_oss", tmp_path / "m")
    share = prepare(folder, None, "bfloat16", 1, device="cpu")
    bare = load_share(share.shape, share.empty, share.checkpoint, dict.fromkeys(share.shape.layer_ids, ()), torch.bfloat16,
                      torch.device("cpu"), "coterie")  # fmt: skip
    assert all(module.down_proj.shape == (0, 96, 64) for _, module in expert_modules(bare).values())


def test_plain_experts_under_coded_dense_layers_need_no_copy(tmp_path: Path) -> None:
    folder = published("qwen3_moe", tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if ".experts." in n and not n.endswith("_scale_inv")]:
        tensors[name] = from_fp8(tensors[name], tensors.pop(f"{name}_scale_inv"), BLOCK)
    save_file(tensors, file, metadata={"format": "pt"})
    resident, cached = (coterie.load(folder, dtype="bfloat16", device="cpu", slots=slots) for slots in (None, 3))
    with torch.inference_mode():
        assert torch.equal(cached.transformers(IDS).logits, resident.transformers(IDS).logits)


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("model.norm.weight", torch.ones(3), r"found shape \[3\], expected"),
        ("model.layers.0.self_attn.q_proj.weight", torch.ones(2), r"found shape \[2\], expected"),
    ],
)
def test_scales_that_fit_nothing_are_refused(name: str, scale: torch.Tensor, message: str, tmp_path: Path) -> None:
    folder = published("qwen3_moe", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        coterie.load(folder, device="cpu")


def test_a_checkpoint_tells_where_its_scales_lie(tmp_path: Path) -> None:
    folder = published("qwen3_moe", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    parts = {
        "a": {n: t for n, t in tensors.items() if "scale" not in n},
        "b": {n: t for n, t in tensors.items() if "scale" in n},
    }
    for shard, part in parts.items():
        save_file(part, folder / f"{shard}.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: f"{shard}.safetensors" for shard, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.coded and [file.name for file in checkpoint.files] == ["a.safetensors", "b.safetensors"]
    name = next(n for n in checkpoint.tensors if ".experts." in n)
    one = checkpoint.slice(name)
    assert one.dtype == torch.bfloat16 and one.length == tensors[name].numel() + 4 * tensors[f"{name}_scale_inv"].numel()
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes() + b"x")
    with pytest.raises(InputError, match=r"b.safetensors: was changed since its header was read"):
        one.read()
