"""Sidecars of experts: the checkpoint's bytes, the same logits; what has changed or is damaged is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import thread_ranks
import torch
from cached_models import PROMPTS, logits
from lines import Child
from packed_models import bytes_in, damage, files_in
from tiny_models import FAMILIES, make_model

import coterie
from coterie.launch.cli import main
from coterie.launch.packing import contents_of
from coterie.moe.collectives import Group
from coterie.offload import pack as packer
from coterie.offload.checksum import Checksum
from coterie.offload.sidecar import open_sidecar, run_of
from coterie.offload.transfer import STAGE_BYTES, Part, Piece
from coterie.routing.errors import CoterieError, InputError


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


def test_an_expert_is_one_aligned_run_of_the_checkpoints_own_bytes(family: Path, tmp_path: Path, small_files: None) -> None:
    contents = contents_of(str(family))
    done = packer.pack(contents, tmp_path / "p")
    assert done.files == len(list((tmp_path / "p").glob("*.bin"))) > 1 and done.resumed_bytes == 0
    assert done.bytes == sum(p.stat().st_size for p in (tmp_path / "p").glob("*.bin"))
    found = open_sidecar(tmp_path / "p", contents.checkpoint, contents.records)
    taken: list[tuple[str, int, int]] = []
    for originals, copies in zip(contents.records, found.records, strict=True):
        for original, copy in zip(originals, copies, strict=True):
            run = run_of(copy)
            assert run.offset % 4096 == 0 and original.keys() == copy.keys()
            start = run.offset
            for name, part in copy.items():
                assert (part.dtype, part.shape) == (original[name].dtype, original[name].shape)
                assert part.pieces == (Piece(run.file, start, len(bytes_in(original[name]))),)
                assert bytes_in(part) == bytes_in(original[name])
                start += part.pieces[0].length
            assert start == run.offset + run.length
            taken.append((run.file.name, run.offset, start))
    taken.sort()
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(taken)), "experts overlap"
    assert packer.verify(contents, tmp_path / "p").experts == done.experts == len(taken)


def test_biases_and_tensors_per_expert_are_packed_too(tmp_path: Path) -> None:
    biased = contents_of(str(make_model("gpt_oss", tmp_path / "g")))
    assert set(biased.records[0][0]) == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    several = contents_of(str(make_model("mixtral", tmp_path / "x")))
    assert len(several.records[0][0]["gate_up_proj"].pieces) == 2, "gate and up are tensors of their own in this checkpoint"


def test_logits_are_the_same_from_the_sidecar(family: Path, tmp_path: Path) -> None:
    contents = contents_of(str(family))
    packer.pack(contents, tmp_path / "p")
    slots = len(contents.layer_ids) * 2 + 1
    without = coterie.load(family, dtype="float32", slots=slots)
    made = coterie.load(family, dtype="float32", slots=slots, packed=tmp_path / "p")
    assert {p.file.parent for r in made.cache.store.records[0] for part in r.values() for p in part.pieces} == {tmp_path / "p"}
    for got, expected in zip(logits(made), logits(without), strict=True):
        assert torch.equal(got, expected)
    assert made.cache.statistics.transfers > 0
    for one in (made, without):
        one.cache.store.close()


def test_ranks_read_one_sidecar_and_write_what_one_does(folder: Path, packed: Path) -> None:
    prompts = [coterie.Prompt(token_ids=tuple(row)) for row in PROMPTS.tolist()]
    right = [o.token_ids for o in coterie.load(folder).generate(prompts, 6)[0]]

    def run(group: Group) -> list[tuple[int, ...]]:
        return [o.token_ids for o in thread_ranks.load(folder, group=group, slots=3, packed=packed).generate(prompts, 6)[0]]

    assert all(found == right for found in thread_ranks.on_ranks(2, run))


def test_the_verb_tells_what_it_did_and_verifies(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for resumed, extra in ((0, []), (1, []), (1, ["--verify"])):
        assert main(["pack", str(folder), "--out", str(tmp_path / "p"), "--json", *extra]) == 0
        said = json.loads(capsys.readouterr().out)
        assert set(said) == {"out", "experts", "bytes", "seconds", "files", "resumed_bytes"}
        assert said["experts"] == 24 and said["files"] == 1 and said["resumed_bytes"] == resumed * said["bytes"]
        assert sorted(files_in(tmp_path / "p")) == ["experts-00000.bin", "index.json"]


def test_one_changed_byte_ends_the_run_and_is_found_by_verify(folder: Path, packed: Path) -> None:
    contents = contents_of(str(folder))
    run = run_of(open_sidecar(packed, contents.checkpoint, contents.records).records[1][6])
    damage(run.file, run.offset + run.length // 2 + 1)
    named = (
        rf"{run.file.name}: expert 6 of layer 1 \(.*\): found checksum [0-9a-f]{{16}}, expected [0-9a-f]{{16}}: .* pack again"
    )
    with pytest.raises(CoterieError, match=rf"{named} \(1 of 24 experts are damaged\)"):
        packer.verify(contents, packed)
    made = coterie.load(folder, slots=24, packed=packed)
    with torch.no_grad(), pytest.raises(CoterieError, match=named):
        made.transformers(torch.arange(1, 96)[None])
    assert not any(made.cache.slot_of[8 + 6 : 8 + 7] >= 0), "what was read wrong counts as there"
    made.cache.store.close()


def test_an_expert_longer_than_the_reading_buffer_is_checked_whole(tmp_path: Path) -> None:
    from coterie.offload.checkpoint import ReadCounter
    from coterie.offload.store import ExpertStore

    values = np.random.default_rng(0).integers(0, 256, 2 * STAGE_BYTES + 4 * 777, dtype=np.uint8)
    file = tmp_path / "f"
    file.write_bytes(values.tobytes())
    sums = Checksum()
    sums.update(values.tobytes())
    parts, start = {}, 0
    for name, length in (("a", 4 * 123), ("b", len(values) - 4 * 123)):
        parts[name], start = Part(torch.int32, (length // 4,), (Piece(file, start, length),)), length
    store = ExpertStore([[parts]], ReadCounter(), [[sums.hexdigest()]])
    into = {name: torch.zeros(part.shape, dtype=torch.int32) for name, part in parts.items()}
    store.start(0, 0, into).result()
    assert torch.equal(torch.cat(list(into.values())), torch.from_numpy(values).view(torch.int32))
    damage(file, len(values) - 1)
    with pytest.raises(CoterieError, match="f: expert 0 of layer 0"):
        store.start(0, 0, into).result()
    store.close()


def test_a_file_cut_short_or_missing_is_refused(folder: Path, packed: Path) -> None:
    first, last = sorted(packed.glob("*.bin"))[:2]
    size = last.stat().st_size
    os.truncate(last, size - 4096)
    with pytest.raises(
        InputError, match=rf"{last.name}: found {size - 4096} bytes, expected {size} bytes; remove .* pack again"
    ):
        coterie.load(folder, slots=3, packed=packed)
    first.unlink()
    with pytest.raises(InputError, match=rf"{first.name}: no such file, expected"):
        packer.verify(contents_of(str(folder)), packed)


def test_a_checkpoint_that_has_changed_is_refused_and_a_copy_is_not(folder: Path, packed: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    os.utime(file, ns=(1, 1))
    coterie.load(folder, slots=3, packed=packed).cache.store.close()
    make_model("qwen3_moe", folder, seed=1)
    for use in (
        lambda: coterie.load(folder, slots=3, packed=packed),
        lambda: packer.pack(contents_of(str(folder)), packed),
        lambda: packer.verify(contents_of(str(folder)), packed),
    ):
        with pytest.raises(
            InputError, match=r"model.safetensors: byte \d+: found \w+..., expected \w+.*has changed.*pack again"
        ):
            use()
    make_model("qwen3_moe", folder, moe_intermediate_size=40)
    with pytest.raises(InputError, match=r"index.json: model.safetensors: size: found \d+, expected \d+.*pack again"):
        coterie.load(folder, slots=3, packed=packed)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    make_model("qwen3_moe", folder)
    other = make_model("qwen3_moe", tmp_path / "other") / "model.safetensors"
    content = other.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"format":"pt"', b'"format":"tp"')
    assert header != content[8 : 8 + length]
    file.write_bytes(content[:8] + header + content[8 + length :])
    with pytest.raises(InputError, match=r"model.safetensors: header_sha256: found \w+, expected \w+.*pack again"):
        coterie.load(folder, slots=3, packed=packed)


def expert(index: dict) -> dict:
    return index["layers"][2]["experts"][3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(format="coterie.experts.v0"), "format: found 'coterie.experts.v0', expected 'coterie.experts.v1'"),
        (lambda i: i.pop("layers"), "layers: found None experts, expected [8, 8, 8]"),
        (lambda i: i["layers"].pop(), "layers: found [8, 8] experts, expected [8, 8, 8]"),
        (lambda i: i["layers"][1]["experts"].pop(), "layers: found [8, 7, 8] experts"),
        (
            lambda i: i["layers"][0].update(parameters={"down_proj": 1}),
            "layers[0].parameters: found {'down_proj': 1}, expected",
        ),
        (lambda i: expert(i).update(offset=17), "'offset': 17"),
        (lambda i: expert(i).update(offset="0"), "'offset': '0'"),
        (lambda i: expert(i).update(length=4), "'length': 4"),
        (lambda i: expert(i).update(file="../x"), "'file': '../x'"),
        (lambda i: expert(i).pop("checksum"), "expected file, offset, length and checksum"),
        (lambda i: i["layers"][2]["experts"].__setitem__(3, 7), "layers[2].experts[3]: found 7, expected file"),
        (lambda i: i.update(checkpoint=3), "checkpoint: found 3, expected file, size"),
        (lambda i: i["checkpoint"].append({"file": "x"}), "checkpoint: found files ['model.safetensors'], expected"),
    ],
)
def test_an_index_that_is_not_as_it_should_be_is_refused(
    change: Callable[[dict], object], message: str, folder: Path, packed: Path
) -> None:
    index = json.loads((packed / "index.json").read_text())
    change(index)
    (packed / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=re.escape(message)) as found:
        coterie.load(folder, slots=3, packed=packed)
    assert str(packed / "index.json") in str(found.value)


def test_an_experts_weights_of_another_dtype_are_refused(folder: Path, tmp_path: Path) -> None:
    contents = contents_of(str(folder))
    odd = {n: replace(part, dtype=torch.bfloat16) for n, part in contents.records[1][3].items()}
    records = [[odd if (i, e) == (1, 3) else r for e, r in enumerate(layer)] for i, layer in enumerate(contents.records)]
    with pytest.raises(InputError, match=r"expert 3 of layer 1: found .*bfloat16.*, expected .*float32"):
        packer.pack(replace(contents, records=records), tmp_path / "p")


def test_packed_needs_memory(folder: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--prompt", "x", "--packed", str(packed)]) == 2
    assert (
        "--packed: found" in (said := capsys.readouterr().err) and "without --memory, expected --memory SIZE beside it" in said
    )
    with pytest.raises(InputError, match="packed: found it without slots, expected slots with it"):
        coterie.load(folder, packed=packed)


def test_generate_reads_experts_from_the_sidecar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own where the budget matters: it is that of the whole process."""
    folder = make_model("qwen3_moe", tmp_path / "m", hidden_size=256, moe_intermediate_size=2048, head_dim=64)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"token_ids": row}) + "\n" for row in PROMPTS.tolist()))
    packer.pack(contents_of(str(folder)), tmp_path / "packed")
    arguments = ["generate", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--json", "--max-new-tokens", "8"]
    sidecar = ["--packed", str(tmp_path / "packed")]

    assert main(arguments) == 0
    alone = json.loads(capsys.readouterr().out)
    assert main([*arguments, *sidecar, "--memory", "64GiB", "--dry-run"]) == 0
    assert f"all experts fit, {tmp_path / 'packed'} is not used" in capsys.readouterr().err
    with Child() as child:
        refused = child.run(*arguments, *sidecar, "--memory", "1k")
        least = re.search(r"--memory: found 1.0 KB, expected ([0-9.]+) MB or more", refused.stderr)
        assert refused.returncode == 2 and least is not None, refused.stderr
        ran = json.loads(child.run(*arguments, *sidecar, "--memory", f"{float(least[1]) + 15}MB").stdout)
        assert ran["outputs"] == alone["outputs"] and ran["stats"]["hit_rate"] < 1
        for file in (tmp_path / "packed").glob("*.bin"):
            content = np.fromfile(file, dtype=np.uint8)
            content[::4096] ^= 1
            content.tofile(file)
        # what the first run leaves in memory is taken already
        failed = child.run(*arguments, *sidecar, "--memory", f"{float(least[1]) + 60}MB")
    assert failed.returncode == 1, failed.stderr
    assert re.search(r"experts-00000.bin: expert \d of layer \d .*pack again", failed.stderr), failed.stderr
