"""Packing that stops, fills the disk or meets another run: the same command goes on to the same bytes."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from packed_models import damage, files_in
from tiny_models import make_model

import coterie
from coterie.launch.packing import contents_of
from coterie.offload import pack as packer
from coterie.routing.errors import CoterieError, InputError


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
    out, contents = tmp_path / "k", contents_of(str(folder))
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
        packer.pack(contents_of(str(folder)), out)
    return ended


def test_ctrl_c_says_how_to_go_on(folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = stopped(folder, tmp_path / "k", monkeypatch, 5, KeyboardInterrupt)
    assert str(ended.value) == f"interrupted; the same command goes on after 5 of 24 experts in {tmp_path / 'k'}"
    packer.pack(contents_of(str(folder)), tmp_path / "k")
    assert files_in(tmp_path / "k") == files_in(packed)


@pytest.mark.parametrize("what", ["data", "zeros", "short", "journal", "lost"])
def test_what_a_stopped_run_left_is_checked_before_it_is_kept(
    what: str, folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "k"
    stopped(folder, out, monkeypatch, 12, KeyboardInterrupt)
    contents = contents_of(str(folder))
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


def test_going_on_with_another_checkpoint_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(folder, tmp_path / "k", monkeypatch, 5, KeyboardInterrupt)
    make_model("qwen3_moe", folder, seed=1)
    with pytest.raises(InputError, match=r"model.safetensors: byte \d+: found .*, expected .*has changed"):
        packer.pack(contents_of(str(folder)), tmp_path / "k")
    make_model("qwen3_moe", folder, moe_intermediate_size=40)
    with pytest.raises(InputError, match=r"\.experts\.journal: model.safetensors: size: found \d+, expected \d+"):
        packer.pack(contents_of(str(folder)), tmp_path / "k")


def test_a_checkpoint_that_changes_meanwhile_gives_no_sidecar(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = packer.Writer._write

    def write(self: packer.Writer, *given) -> None:
        original(self, *given)
        os.utime(folder / "model.safetensors", ns=(1, len(self.checksums)))

    monkeypatch.setattr(packer.Writer, "_write", write)
    with pytest.raises(CoterieError, match=r"has changed while it was packed; remove .* and pack again"):
        packer.pack(contents_of(str(folder)), tmp_path / "k")
    assert not (tmp_path / "k" / "index.json").exists()


def test_a_second_run_into_the_same_folder_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []
    original = packer.Writer._write

    def write(self: packer.Writer, *given) -> None:
        original(self, *given)
        if not refused:
            with pytest.raises(InputError) as found:
                packer.pack(contents_of(str(folder)), tmp_path / "p")
            refused.append(str(found.value))

    monkeypatch.setattr(packer.Writer, "_write", write)
    packer.pack(contents_of(str(folder)), tmp_path / "p")
    assert re.search(r"\.experts\.journal: another run is packing into .*, expected none; wait for it, or end it", refused[0])
    assert sorted(files_in(tmp_path / "p")) == ["experts-00000.bin", "index.json"]


def test_a_run_that_waits_behind_one_that_ends_finds_the_sidecar_complete(folder: Path, packed: Path, tmp_path: Path) -> None:
    """Stopped between naming the index and removing the journal; and a journal that goes while it is being locked."""
    whole = files_in(packed)
    (packed / ".experts.journal").write_text("left")
    done = packer.pack(contents_of(str(folder)), packed)
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
        packer.pack(contents_of(str(folder)), tmp_path / "p")
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
            packer.pack(contents_of(str(folder)), out / "p")
        with monkeypatch.context() as patched:
            patched.setattr(packer.Writer, "_check_space", lambda self: None)  # room that others take meanwhile
            with pytest.raises(
                CoterieError, match=r"p: cannot be written: No space left on device: needs \d+ more bytes, found"
            ) as full:
                packer.pack(contents_of(str(folder)), out / "p")
        kept = int(re.search(r"goes on after (\d+) of 24 experts", str(full.value))[1])
        assert 0 < kept < 24
        subprocess.run(["mount", "-o", "remount,size=4m", str(out)], check=True)
        done = packer.pack(contents_of(str(folder)), out / "p")
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
            packer.pack(contents_of(str(folder)), tmp_path / "k")
    packer.pack(contents_of(str(folder)), tmp_path / "k")
    assert files_in(tmp_path / "k") == files_in(packed)


def test_a_limit_on_the_size_of_files_is_told(folder: Path, packed: Path, tmp_path: Path) -> None:
    contents = contents_of(str(folder))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        with pytest.raises(CoterieError, match=r"k: cannot be written: File too large: needs \d+ more bytes"):
            packer.pack(contents, tmp_path / "k")

    assert in_a_child(limited) == 0
    assert packer.pack(contents, tmp_path / "k").resumed_bytes > 0
    assert files_in(tmp_path / "k") == files_in(packed)


def test_a_folder_with_something_else_in_it_is_left_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m: found 'config.json' in it, expected an empty folder or none; give another --out"):
        packer.pack(contents_of(str(folder)), folder)
    with pytest.raises(InputError, match=r"the folder .*none does not exist; create it first"):
        packer.pack(contents_of(str(folder)), tmp_path / "none" / "p")
    with pytest.raises(InputError, match=r"config.json: cannot be made or read"):
        packer.pack(contents_of(str(folder)), folder / "config.json")


def test_a_journal_of_another_format_is_refused_and_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    journal = tmp_path / "p" / ".experts.journal"
    journal.write_text('{"format": "coterie.pack-journal.v0"}\n')
    with pytest.raises(InputError, match=r"format: found 'coterie.pack-journal.v0', expected 'coterie.pack-journal.v1'"):
        packer.pack(contents_of(str(folder)), tmp_path / "p")
    assert files_in(tmp_path / "p") == {".experts.journal": b'{"format": "coterie.pack-journal.v0"}\n'}
