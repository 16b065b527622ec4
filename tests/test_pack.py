"""Sidecars of experts: the checkpoint's bytes, the same logits; stops, full disks, two at once; changes are refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import thread_ranks
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cached import PROMPTS, logits
from tiny_models import FAMILIES, make_model

import coterie
from coterie.launch.cli import main
from coterie.launch.packing import _contents
from coterie.moe.collectives import Group
from coterie.offload import pack as packer
from coterie.offload.checksum import AT_ONCE, ROW, Checksum
from coterie.offload.sidecar import open_sidecar, run_of
from coterie.offload.store import STAGE_BYTES, Part, Piece
from coterie.routing.errors import CoterieError, InputError

SEVERAL = 100_000  # bytes a file: tiny models then fill several


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer, "FILE_BYTES", SEVERAL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model("qwen3_moe", tmp_path / "m")


@pytest.fixture
def packed(folder: Path, tmp_path: Path, small_files: None) -> Path:
    packer.pack(_contents(str(folder)), tmp_path / "p")
    return tmp_path / "p"


def bytes_in(part: Part) -> bytes:
    return b"".join(piece.file.read_bytes()[piece.offset : piece.offset + piece.length] for piece in part.pieces)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 0x80
    file.write_bytes(content)


def test_an_expert_is_one_aligned_run_of_the_checkpoints_own_bytes(family: Path, tmp_path: Path, small_files: None) -> None:
    contents = _contents(str(family))
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
    biased = _contents(str(make_model("gpt_oss", tmp_path / "g")))
    assert set(biased.records[0][0]) == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    several = _contents(str(make_model("mixtral", tmp_path / "x")))
    assert len(several.records[0][0]["gate_up_proj"].pieces) == 2, "gate and up are tensors of their own in this checkpoint"


def test_logits_are_the_same_from_the_sidecar(family: Path, tmp_path: Path) -> None:
    contents = _contents(str(family))
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


def in_a_child(work: Callable[[], object]) -> int:
    """Do it in a process that shares nothing with this one; returns how that ended, as `os.waitpid` tells it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killing(place: str, count: int) -> None:
    """Have this process killed in the middle of a call of `place`."""
    calls, original = [], getattr(packer.Writer, place)

    def counted(self: packer.Writer, *given) -> object:
        calls.append(given)
        if len(calls) < count:
            return original(self, *given)
        match place:
            case "_write":
                os.pwrite(self._opened(given[1].file), b"half an expert", given[1].offset)
            case "_append":
                os.write(self.journal.fileno(), b'{"expert": ')
            case "_write_index":
                (self.folder / ".index.json.part").write_text("{")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    setattr(packer.Writer, place, counted)


@pytest.mark.parametrize(
    ("place", "count", "kept"),
    [("_append", 1, 0), ("_append", 2, 0), ("_append", 9, 7), ("_write", 13, 12), ("_write", 24, 23), ("_write_index", 1, 24)],
)
def test_after_kill_9_the_same_command_writes_the_same_bytes(
    place: str, count: int, kept: int, folder: Path, packed: Path, tmp_path: Path
) -> None:
    """By calls: the first line of the journal is its header."""
    out, contents = tmp_path / "k", _contents(str(folder))
    ended = in_a_child(lambda: (killing(place, count), packer.pack(contents, out)))
    assert os.WTERMSIG(ended) == signal.SIGKILL
    with pytest.raises(InputError, match=r"index.json: no such file, .*packing was not finished: go on with coterie pack"):
        coterie.load(folder, slots=3, packed=out)
    done = packer.pack(contents, out)
    assert done.resumed_bytes == done.bytes * kept // 24
    assert files_in(out) == files_in(packed)


def stopped(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int, how: type[BaseException]
) -> pytest.ExceptionInfo:
    """What a run says that ends after so many experts."""
    written, original = [], packer.Writer._write

    def write(self: packer.Writer, *given) -> None:
        if len(written) == after:
            raise how
        original(self, *given)
        written.append(given)

    with monkeypatch.context() as patched, pytest.raises(how) as ended:
        patched.setattr(packer.Writer, "_write", write)
        packer.pack(_contents(str(folder)), out)
    return ended


def test_ctrl_c_says_how_to_go_on(folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = stopped(folder, tmp_path / "k", monkeypatch, 5, KeyboardInterrupt)
    assert str(ended.value) == f"interrupted; the same command goes on after 5 of 24 experts in {tmp_path / 'k'}"
    packer.pack(_contents(str(folder)), tmp_path / "k")
    assert files_in(tmp_path / "k") == files_in(packed)


@pytest.mark.parametrize("what", ["data", "zeros", "short", "journal", "lost"])
def test_what_a_stopped_run_left_is_checked_before_it_is_kept(
    what: str, folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "k"
    stopped(folder, out, monkeypatch, 12, KeyboardInterrupt)
    contents = _contents(str(folder))
    runs = packer.layout(contents.records, out)
    match what:
        case "data":
            damage(runs[7].file, runs[7].offset + 5)
        case "zeros":
            damage(runs[7].file, runs[7].offset + runs[7].length + 1)
        case "short":
            os.truncate(runs[7].file, runs[7].offset + runs[7].length - 1)
        case "journal":
            lines = (out / ".experts.journal").read_bytes().split(b"\n")
            lines[8] = b"\0" * 40
            (out / ".experts.journal").write_bytes(b"\n".join(lines))
        case "lost":
            runs[11].file.unlink()
    kept = next(i for i, run in enumerate(runs) if run.file == runs[11].file) if what == "lost" else 7
    done = packer.pack(contents, out)
    assert done.resumed_bytes == done.bytes * kept // 24
    assert files_in(out) == files_in(packed)


def test_one_changed_byte_ends_the_run_and_is_found_by_verify(folder: Path, packed: Path) -> None:
    contents = _contents(str(folder))
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
        packer.verify(_contents(str(folder)), packed)


def test_a_checkpoint_that_has_changed_is_refused_and_a_copy_is_not(folder: Path, packed: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    os.utime(file, ns=(1, 1))
    coterie.load(folder, slots=3, packed=packed).cache.store.close()
    make_model("qwen3_moe", folder, seed=1)
    for use in (
        lambda: coterie.load(folder, slots=3, packed=packed),
        lambda: packer.pack(_contents(str(folder)), packed),
        lambda: packer.verify(_contents(str(folder)), packed),
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


def test_going_on_with_another_checkpoint_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(folder, tmp_path / "k", monkeypatch, 5, KeyboardInterrupt)
    make_model("qwen3_moe", folder, seed=1)
    with pytest.raises(InputError, match=r"model.safetensors: byte \d+: found .*, expected .*has changed"):
        packer.pack(_contents(str(folder)), tmp_path / "k")
    make_model("qwen3_moe", folder, moe_intermediate_size=40)
    with pytest.raises(InputError, match=r"\.experts\.journal: model.safetensors: size: found \d+, expected \d+"):
        packer.pack(_contents(str(folder)), tmp_path / "k")


def test_a_checkpoint_that_changes_meanwhile_gives_no_sidecar(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = packer.Writer._write

    def write(self: packer.Writer, *given) -> None:
        original(self, *given)
        os.utime(folder / "model.safetensors", ns=(1, len(self.checksums)))

    monkeypatch.setattr(packer.Writer, "_write", write)
    with pytest.raises(CoterieError, match=r"has changed while it was packed; remove .* and pack again"):
        packer.pack(_contents(str(folder)), tmp_path / "k")
    assert not (tmp_path / "k" / "index.json").exists()


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


def test_a_second_run_into_the_same_folder_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []
    original = packer.Writer._write

    def write(self: packer.Writer, *given) -> None:
        original(self, *given)
        if not refused:
            with pytest.raises(InputError) as found:
                packer.pack(_contents(str(folder)), tmp_path / "p")
            refused.append(str(found.value))

    monkeypatch.setattr(packer.Writer, "_write", write)
    packer.pack(_contents(str(folder)), tmp_path / "p")
    assert re.search(r"\.experts\.journal: another run is packing into .*, expected none; wait for it, or end it", refused[0])
    assert sorted(files_in(tmp_path / "p")) == ["experts-00000.bin", "index.json"]


def test_a_run_that_waits_behind_one_that_ends_finds_the_sidecar_complete(folder: Path, packed: Path, tmp_path: Path) -> None:
    """Stopped between naming the index and removing the journal; and a journal that goes while it is being locked."""
    whole = files_in(packed)
    (packed / ".experts.journal").write_text("left")
    done = packer.pack(_contents(str(folder)), packed)
    assert done.resumed_bytes == done.bytes and files_in(packed) == whole
    first = packer._locked(tmp_path)
    assert first is not None
    (tmp_path / ".experts.journal").unlink()
    second = packer._locked(tmp_path)
    assert second is not None
    with pytest.raises(BlockingIOError), (tmp_path / ".experts.journal").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    first.close()
    second.close()


def test_too_little_room_is_told_beforehand(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = packer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packer.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(
        CoterieError, match=r"p: needs \d{6} more bytes, found 100000 free; make room, then the same command"
    ) as found:
        packer.pack(_contents(str(folder)), tmp_path / "p")
    assert not isinstance(found.value, InputError) and not list((tmp_path / "p").glob("*.bin"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_fills_up_is_told_and_gone_on_with(
    folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "disk"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "none", str(out)], capture_output=True).returncode:
        pytest.skip("this root may not mount")
    try:
        with pytest.raises(CoterieError, match=r"p: needs \d{6} more bytes, found \d+ free; make room"):
            packer.pack(_contents(str(folder)), out / "p")
        with monkeypatch.context() as patched:
            patched.setattr(packer.Writer, "_check_space", lambda self: None)  # room that others take meanwhile
            with pytest.raises(
                CoterieError, match=r"p: cannot be written: No space left on device: needs \d+ more bytes, found"
            ) as full:
                packer.pack(_contents(str(folder)), out / "p")
        kept = int(re.search(r"goes on after (\d+) of 24 experts", str(full.value))[1])
        assert 0 < kept < 24
        subprocess.run(["mount", "-o", "remount,size=4m", str(out)], check=True)
        done = packer.pack(_contents(str(folder)), out / "p")
        assert done.resumed_bytes == done.bytes * kept // 24
        assert files_in(out / "p") == files_in(packed)
    finally:
        subprocess.run(["umount", str(out)], check=True)


@pytest.mark.parametrize("failing", [1, 2, 3, 30, 31, 32])
def test_a_write_that_fails_at_any_place_is_told_and_gone_on_with(
    failing: int, folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write fails half done, as on a full disk. By calls: a header, then data, zeros and a line for each expert."""
    calls = 0

    def limited(original: Callable[..., int]) -> Callable[..., int]:
        def write(descriptor: int, view: memoryview, *at: int) -> int:
            nonlocal calls
            calls += 1
            if calls == failing:
                original(descriptor, view[: len(view) // 2], *at)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(descriptor, view, *at)

        return write

    with monkeypatch.context() as patched:
        patched.setattr(packer.os, "write", limited(os.write))
        patched.setattr(packer.os, "pwrite", limited(os.pwrite))
        with pytest.raises(
            CoterieError, match=r"k: cannot be written: No space left on device: needs \d+ more bytes, found \d+ free"
        ):
            packer.pack(_contents(str(folder)), tmp_path / "k")
    packer.pack(_contents(str(folder)), tmp_path / "k")
    assert files_in(tmp_path / "k") == files_in(packed)


def test_a_limit_on_the_size_of_files_is_told(folder: Path, packed: Path, tmp_path: Path) -> None:
    contents = _contents(str(folder))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(CoterieError, match=r"k: cannot be written: File too large: needs \d+ more bytes"):
            packer.pack(contents, tmp_path / "k")

    assert in_a_child(limited) == 0
    assert packer.pack(contents, tmp_path / "k").resumed_bytes > 0
    assert files_in(tmp_path / "k") == files_in(packed)


def test_a_folder_with_something_else_in_it_is_left_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m: found 'config.json' in it, expected an empty folder or none; give another --out"):
        packer.pack(_contents(str(folder)), folder)
    with pytest.raises(InputError, match=r"the folder .*none does not exist; create it first"):
        packer.pack(_contents(str(folder)), tmp_path / "none" / "p")
    with pytest.raises(InputError, match=r"config.json: cannot be made or read"):
        packer.pack(_contents(str(folder)), folder / "config.json")


def test_a_journal_of_another_format_is_refused_and_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    journal = tmp_path / "p" / ".experts.journal"
    journal.write_text('{"format": "coterie.pack-journal.v0"}\n')
    with pytest.raises(InputError, match=r"format: found 'coterie.pack-journal.v0', expected 'coterie.pack-journal.v1'"):
        packer.pack(_contents(str(folder)), tmp_path / "p")
    assert files_in(tmp_path / "p") == {".experts.journal": b'{"format": "coterie.pack-journal.v0"}\n'}


def test_an_experts_weights_of_another_dtype_are_refused(folder: Path, tmp_path: Path) -> None:
    contents = _contents(str(folder))
    odd = {n: replace(part, dtype=torch.bfloat16) for n, part in contents.records[1][3].items()}
    records = [[odd if (i, e) == (1, 3) else r for e, r in enumerate(layer)] for i, layer in enumerate(contents.records)]
    with pytest.raises(InputError, match=r"expert 3 of layer 1: found .*bfloat16.*, expected .*float32"):
        packer.pack(replace(contents, records=records), tmp_path / "p")


def test_packed_needs_memory(folder: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--prompt", "x", "--packed", str(packed)]) == 2
    assert "--packed: found" in (said := capsys.readouterr().err) and "without --memory, expected both" in said
    with pytest.raises(InputError, match="packed: found it without slots, expected slots with it"):
        coterie.load(folder, packed=packed)


def test_generate_reads_experts_from_the_sidecar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes of their own where the budget matters: it is that of the whole process."""
    folder = make_model("qwen3_moe", tmp_path / "m", hidden_size=256, moe_intermediate_size=512, head_dim=64)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"token_ids": row}) + "\n" for row in PROMPTS.tolist()))
    packer.pack(_contents(str(folder)), tmp_path / "packed")
    arguments = ["generate", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--json", "--max-new-tokens", "8"]
    sidecar = ["--packed", str(tmp_path / "packed")]

    def generate(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "coterie", *arguments, *sidecar, *more]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    assert main(arguments) == 0
    alone = json.loads(capsys.readouterr().out)
    assert main([*arguments, *sidecar, "--memory", "64GiB", "--dry-run"]) == 0
    assert f"all experts fit, {tmp_path / 'packed'} is not used" in capsys.readouterr().err
    refused = generate("--memory", "1k")
    least = re.search(r"--memory: found 1.0 KB, expected ([0-9.]+) MB or more", refused.stderr)
    assert refused.returncode == 2 and least is not None, refused.stderr
    budget = ["--memory", f"{float(least[1]) + 15}MB"]
    ran = json.loads(generate(*budget).stdout)
    assert ran["outputs"] == alone["outputs"] and ran["stats"]["hit_rate"] < 1
    for file in (tmp_path / "packed").glob("*.bin"):
        content = np.fromfile(file, dtype=np.uint8)
        content[::4096] ^= 1
        content.tofile(file)
    failed = generate(*budget)
    assert failed.returncode == 1, failed.stderr
    assert re.search(r"experts-00000.bin: expert \d of layer \d .*pack again", failed.stderr), failed.stderr


def of(*parts: bytes) -> str:
    made = Checksum()
    for part in parts:
        made.update(part)
    return made.hexdigest()


def plain(content: bytes) -> str:
    """The definition, in one piece."""
    from hashlib import blake2b

    rows = np.frombuffer(content.ljust(-(-len(content) // ROW) * ROW, b"\0"), dtype="<u8").reshape(-1, ROW // 8).astype(object)
    sums = [int(row.sum()) % 2**64 for row in rows] + [int(sum(rows[:, i])) % 2**64 for i in range(ROW // 8)]
    whole = b"".join(value.to_bytes(8, "little") for value in sums) + len(content).to_bytes(8, "little")
    return blake2b(whole, digest_size=8).hexdigest()


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_checksum_is_that_of_the_bytes_however_they_come(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 2 * AT_ONCE + 3 * ROW) | st.integers(0, 3 * ROW))
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=6)))
    assert of(*(content[a:b] for a, b in zip([0, *cuts], [*cuts, size], strict=True))) == plain(content)


def test_a_checksum_finds_what_disks_do() -> None:
    rng = np.random.default_rng(1)
    content = rng.integers(0, 256, 64 * ROW, dtype=np.uint8)
    right, seen = of(content.tobytes()), set()

    def wrong(change: Callable[[np.ndarray], object]) -> None:
        copy = content.copy()
        change(copy)
        assert (copy != content).any()
        assert of(copy.tobytes()) != right
        seen.add(of(copy.tobytes()))

    def put(copy: np.ndarray, where: slice, what: object) -> None:
        copy[where] = what

    rows = content.reshape(64, ROW)
    wrong(lambda c: put(c, slice(5, 6), c[5] ^ 128))
    wrong(lambda c: put(c, slice(7 * ROW, 8 * ROW), 0))
    wrong(lambda c: put(c, slice(7 * ROW, 8 * ROW), rows[9]))  # a page of another place
    wrong(lambda c: put(c.reshape(64, ROW), slice(3, 5), rows[[4, 3]]))  # two pages exchanged
    wrong(lambda c: put(c.reshape(-1, 512), slice(8, 10), content.reshape(-1, 512)[[9, 8]]))  # two sectors of a page exchanged
    wrong(lambda c: put(c, slice(0, 64 * ROW - 8), content[8:]))  # shifted by a word
    wrong(lambda c: put(c[7::8], slice(None), c[7::8] | 128))  # a line that is stuck
    for first, second in rng.integers(0, 64 * ROW // 8, (200, 2)):  # the same bit of two words
        if first != second:
            bit = 1 << int(rng.integers(8))
            wrong(lambda c, at=[8 * first + 7, 8 * second + 7], bit=bit: put(c, at, c[at] ^ bit))
    assert len(seen) > 200 and of(content.tobytes() + b"\0") != right != of(content.tobytes()[:-1])
