"""Rounded experts out of slots and a rounded copy: the bits of all rounded in memory; what they take; what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cached_models import PROMPTS, logits
from conftest import ROOT
from lines import Child
from packed_models import bytes_in, damage, files_in
from tiny_models import make_model

import coterie
from coterie.kernels import cpu
from coterie.kernels.cpu import Int4, Int8, Panels
from coterie.kernels.formats import LARGEST, Weights, quantise
from coterie.launch.cli import main
from coterie.launch.packing import contents_of
from coterie.moe.collectives import Group
from coterie.moe.memory import Workload, estimate
from coterie.moe.model import assembled
from coterie.moe.prepare import prepare
from coterie.moe.sizes import sizes_of
from coterie.offload import pack as packer
from coterie.offload.copies import scale_of, stored
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.record import expert_modules

WIDE = {
    "qwen3_moe": dict(hidden_size=128, moe_intermediate_size=128, head_dim=32),
    "gpt_oss": dict(hidden_size=128, intermediate_size=128, head_dim=32),  # transposed, with biases
    "mixtral": {},  # a tensor for each projection, and sizes that no operator of torch's takes
}


@pytest.fixture(scope="module", params=sorted(WIDE))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param) / "m", **WIDE[request.param])


def rounded_copy(folder: Path, format: str) -> Path:
    out = folder.parent / format
    packer.pack(contents_of(str(folder), format), out)
    return out


def model(folder: Path, dtype: str, format: str, slots: int | None = None, packed: Path | None = None) -> Any:
    share = replace(prepare(folder, None, dtype, 1, quantise=format, packed=packed), slots=slots)
    return assembled(share, share.read(0), None, Group())


@pytest.mark.parametrize("format", list(LARGEST))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_the_resident_rounded_ones_to_the_bit_at_every_room(family: Path, dtype: str, format: str) -> None:
    """Batches of eight and of one, prefill and decode."""
    packed, resident = rounded_copy(family, format), model(family, dtype, format)
    right = logits(resident)
    top_k, total = resident.shape.top_k, resident.shape.num_experts * len(resident.shape.layer_ids)
    for slots in (top_k, total // 2, total):
        made = model(family, dtype, format, slots, packed)
        for got, expected in zip(logits(made), right, strict=True):
            assert torch.equal(got, expected), slots
        assert made.cache.statistics.transfers > 0
        made.cache.store.close()


@pytest.mark.parametrize("format", list(LARGEST))
def test_a_rounded_copy_has_what_the_formats_definition_gives(family: Path, format: str) -> None:
    """And is smaller than the checkpoint's experts by what the format saves."""
    contents = contents_of(str(family), format)
    packer.pack(contents, family.parent / format)
    found = packer.sidecar.open_sidecar(family.parent / format, contents.checkpoint, contents.records, contents.how)
    assert packer.verify(contents, family.parent / format).bytes == found.bytes
    original, packed = contents.records[1][5], found.records[1][5]
    for name in contents.how.products:
        plain, kept = stored(original[name]), contents.how.kept(original[name].shape)
        right = quantise((plain.T if contents.how.transposed else plain)[None], format)
        data, scale = stored(packed[name]), stored(packed[scale_of(name)])
        if kept.kind is Int4:
            pair = Int4.pack(right)
            assert torch.equal(data, pair.data[0]) and torch.equal(scale, pair.scales[0])
        else:
            assert bytes_in(packed[name]) == right.data.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert torch.equal(scale, right.scale[0])
    whole, small = (sum(part.length for part in record.values()) for record in (original, packed))
    if "mixtral" not in str(family):
        assert small < whole * {"int8": 0.29, "fp8": 0.28, "int4": 0.17}[format]


@pytest.mark.parametrize(("format", "kind"), [("int8", Int8), ("int4", Int4), ("fp8", Panels)])
def test_products_are_torchs_own_where_sizes_allow_and_a_gpus_kernels_take_slots_too(format: str, kind: type) -> None:
    kept = cpu.kind_for(format, 256, 128)
    assert kept is kind and cpu.kind_for(format, 50, 60) is Panels
    on_gpu = replace(_kept(format), cpu=False)
    data, scale = on_gpu.made(torch.randn(256, 128))
    weights = on_gpu.over(data[None], scale[None])
    assert isinstance(weights, Weights) and weights.shape == (1, 256, 128) and on_gpu.order == ""


def _kept(format: str) -> Any:
    from coterie.kernels.rounded import Kept

    return Kept(format, 256, 128, True)


def test_scales_that_come_and_go_are_in_the_rows_dtype_or_refused() -> None:
    """Kept ones would be those of an expert that has left its slot."""
    for format in ("int8", "int4"):
        kept = _kept(format)
        data, scale = kept.made(torch.randn(256, 128))
        product = kept.over(data[None], scale[None])
        out = torch.empty(3, 256)
        product.multiply(0, torch.randn(3, 128), out)
        with pytest.raises(ValueError, match=r"x: found torch.bfloat16, expected torch.float32"):
            product.multiply(0, torch.randn(3, 128, dtype=torch.bfloat16), out.bfloat16())


@pytest.mark.parametrize("format", list(LARGEST))
def test_rounded_experts_take_what_was_told(family: Path, format: str) -> None:
    share = prepare(family, None, "bfloat16", 1, quantise=format)
    sizes = sizes_of(share.shape, share.empty, share.dtype, share.rounding)
    (told,) = estimate(sizes, share.plan, "local", Workload(1, 1, 8, 8))
    made = model(family, "bfloat16", format)
    held = 0
    for _, module in expert_modules(made.transformers).values():
        tensors = [t for p in module.coterie_products for t in _tensors(p)]
        held += sum(t.numel() * t.element_size() for t in (*tensors, *module.parameters(recurse=False)))
    assert told.experts == held
    assert estimate(sizes, share.plan, "local", Workload(1, 1, 8, 8), 5)[0].experts == 5 * max(sizes.expert)


def _tensors(product: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(product, Int4):
        return product.data, product.scales
    return product.weights.data, product.weights.scale


MEASURE = """
import sys
import coterie.moe.model
from coterie.moe.prepare import prepare
def read(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field))
share = prepare(sys.argv[1], None, "float32", 1, quantise=sys.argv[2] if len(sys.argv) > 2 else None)
open("/proc/self/clear_refs", "w").write("5")
before = read("VmRSS")
model = share.read(0)
print(read("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_loading_rounded_experts_never_holds_the_plain_ones(tmp_path: Path) -> None:
    """The most that loading takes is what is told of rounded experts, and far less than the plain ones."""
    folder = make_model(
        "qwen3_moe", tmp_path / "m", hidden_size=512, moe_intermediate_size=1024, num_hidden_layers=5, head_dim=32
    )
    plain = peak_of_loading(folder)
    for format in LARGEST:
        share = prepare(folder, None, "float32", 1, quantise=format)
        sizes = sizes_of(share.shape, share.empty, share.dtype, share.rounding)
        (told,) = estimate(sizes, share.plan, "local", Workload(1, 1, 8, 8))
        found = peak_of_loading(folder, format)
        assert told.experts * 0.9 < found < 1.1 * told.total and found < 0.7 * plain, format


def peak_of_loading(folder: Path, *format: str) -> int:
    command = [sys.executable, "-c", MEASURE, str(folder), *format]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_generate_with_a_budget_writes_what_all_in_memory_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model("qwen3_moe", tmp_path / "m", hidden_size=256, moe_intermediate_size=4096, head_dim=64)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"token_ids": row}) + "\n" for row in PROMPTS.tolist()))
    arguments = ["generate", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--json", "--max-new-tokens", "8"]
    arguments += ["--quantise", "int8"]

    assert main(["pack", str(folder), "--out", str(tmp_path / "packed"), "--quantise", "int8"]) == 0
    assert f"--packed {tmp_path / 'packed'} --quantise int8" in capsys.readouterr().err
    assert main(arguments) == 0
    alone = json.loads(capsys.readouterr().out)
    packed = ["--packed", str(tmp_path / "packed")]
    with Child() as child:
        refused = child.run(*arguments, *packed, "--memory", "1k")
        least = re.search(r"--memory: found 1.0 KB, expected ([0-9.]+) MB or more", refused.stderr)
        assert refused.returncode == 2 and least is not None, refused.stderr
        budget = ["--memory", f"{float(least[1]) + 8}MB"]
        told = child.run(*arguments, *packed, *budget, "--dry-run")
        unpacked = child.run(*arguments, *budget)
        ran = child.run(*arguments, *packed, *budget)
    found = json.loads(ran.stdout)
    assert found["outputs"] == alone["outputs"] and found["stats"]["hit_rate"] < 1
    assert found["stats"]["peak_memory_bytes"] < 1.03 * (float(least[1]) + 8) * 1e6
    (room,) = re.findall(r"room for (\d+) of 24 experts at once", ran.stderr)
    assert int(room) > 3 + 8e6 / (4 * 3 * 256 * 4096), "more than of plain experts"
    dry = json.loads(told.stdout)["memory"]["ranks"][0]
    assert abs(dry["experts"] - int(room) * (3 * 256 * 4096 + 4 * (2 * 4096 + 256))) < 4_000_000
    assert unpacked.returncode == 2
    assert "--memory: found less room than for all experts" in unpacked.stderr
    assert "coterie pack MODEL --out DIR --quantise int8, then --packed DIR" in unpacked.stderr


def test_a_copy_of_another_kind_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model("qwen3_moe", tmp_path / "m", **WIDE["qwen3_moe"])
    plain = tmp_path / "plain"
    packer.pack(contents_of(str(folder)), plain)
    assert "quantise" not in json.loads((plain / "index.json").read_text())
    int4 = rounded_copy(folder, "int4")
    for packed, format, message in (
        (plain, "int8", "index.json: quantise: found none, expected int8: .* pack into another folder with --quantise int8"),
        (int4, None, "index.json: quantise: found int4, expected none: give the --quantise that it was packed with"),
        (int4, "fp8", "index.json: quantise: found int4, expected fp8"),
    ):
        with pytest.raises(InputError, match=message):
            coterie.load(folder, slots=3, packed=packed, quantise=format)
        with pytest.raises(InputError, match=message):
            packer.pack(contents_of(str(folder), format), packed)
    with pytest.raises(InputError, match=r"slots: found less room than for all experts.*coterie pack MODEL --out DIR"):
        coterie.load(folder, slots=3, quantise="int8")
    monkeypatch.setattr("coterie.kernels.rounded.int4_order", lambda: "cpu-elsewhere")
    with pytest.raises(
        InputError, match=r"index.json: order: found cpu-[0-9a-f]{8}, expected cpu-elsewhere: .*on this machine"
    ):
        coterie.load(folder, slots=3, packed=int4, quantise="int4")


@pytest.mark.parametrize("format", list(LARGEST))
def test_a_stopped_rounding_goes_on_and_other_weights_are_found_out(family: Path, format: str, tmp_path: Path) -> None:
    contents, written = contents_of(str(family), format), 0

    def stop(count: int) -> None:
        nonlocal written
        written += 1
        if written == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the same command goes on after 7 of"):
        packer.pack(contents, tmp_path / "p", stop)
    with pytest.raises(InputError, match=r"journal: quantise: found .*, expected none"):
        packer.pack(contents_of(str(family)), tmp_path / "p")
    assert packer.pack(contents, tmp_path / "p").resumed_bytes > 0
    packer.pack(contents, tmp_path / "whole")
    assert files_in(tmp_path / "p") == files_in(tmp_path / "whole")
    found = packer.sidecar.open_sidecar(tmp_path / "p", contents.checkpoint, contents.records, contents.how)
    contents.how.check_sample(contents.records[1][2], found.records[1][2])
    with pytest.raises(InputError, match="the checkpoint is another or has changed"):
        contents.how.check_sample(contents.records[1][3], found.records[1][2])
    run = packer.sidecar.run_of(found.records[0][1])
    damage(run.file, run.offset + run.length // 2)
    with pytest.raises(CoterieError, match=r"expert 1 of layer .* are damaged"):
        packer.verify(contents, tmp_path / "p")


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model("qwen3_moe", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "experts" in n and "down_proj" in n)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = "model.safetensors: byte .*: down_proj of an expert: weights: found values that are not finite"
    with pytest.raises(InputError, match=message):
        coterie.load(folder, quantise="int8")
    with pytest.raises(InputError, match=message):
        packer.pack(contents_of(str(folder), "int8"), tmp_path / "p")
