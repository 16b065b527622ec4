"""`--out`, `--resume`: whatever stops a run, on however many processes it goes on, the file is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from jobs import torchrun, until_finished
from references import tokens
from tiny_models import make_model

from coterie.launch.cli import main
from coterie.moe.journal import Entry, Journal, journal_of
from coterie.routing.errors import CoterieError, InputError

COUNT = 60
OFTEN = str(ROOT / "tests" / "often.py")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with a model, prompts and the output of an undisturbed run on one process."""
    folder = tmp_path_factory.mktemp("job")
    make_model("qwen3_moe", folder / "m")
    lines = [{"token_ids": tokens(2 + i % 17, i), "id": f"n{i}", "max_new_tokens": 3 + 7 * i % 30} for i in range(COUNT)]
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(arguments(folder, folder / "whole.jsonl")) == 0
    return folder


@pytest.fixture(scope="module")
def ended(job: Path, tmp_path_factory) -> bytes:
    """The journal of a run that ended just before the output took its name."""
    out = tmp_path_factory.mktemp("ended") / "o.jsonl"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("coterie.launch.generating.atomic_output", lambda path: (_ for _ in ()).throw(CoterieError("stopped")))
        assert main(arguments(job, out)) == 1
    assert not out.exists()
    return journal_of(out).read_bytes()


def arguments(job: Path, out: Path, *more: str) -> list[str]:
    return ["generate", str(job / "m"), "--prompts", str(job / "p.jsonl"), "--out", str(out), "--batch-size", "3", *more]


@contextmanager
def started(command: list[str], hang_after: int) -> Iterator[subprocess.Popen[str]]:
    """A run that goes no further once so many prompts more are in the journal; killed in the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HANG_AFTER": str(hang_after)}
    process = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def stopped_after(out: Path, entries: int) -> None:
    """A journal as a run that was stopped after so many prompts leaves it: the whole one, cut."""
    lines = journal_of(out).read_bytes().splitlines(keepends=True)
    journal_of(out).write_bytes(b"".join(lines[: 1 + entries]))


def test_an_undisturbed_run_leaves_the_output_in_order_and_no_journal(job: Path) -> None:
    rows = [json.loads(line) for line in (job / "whole.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"n{i}" for i in range(COUNT)]
    assert all(len(row["token_ids"]) <= 3 + 7 * i % 30 for i, row in enumerate(rows))
    assert sorted(p.name for p in job.iterdir()) == ["m", "p.jsonl", "whole.jsonl"]


@pytest.mark.parametrize("entries", [0, 1, 17, COUNT])
@pytest.mark.parametrize("torn", [b"", b'{"index": 3, "tok'])
def test_a_stopped_run_is_continued_and_what_is_finished_is_not_run_again(
    job: Path, tmp_path: Path, entries: int, torn: bytes, ended, capsys
) -> None:
    out = tmp_path / "o.jsonl"
    journal_of(out).write_bytes(ended)
    stopped_after(out, entries)
    with journal_of(out).open("ab") as file:
        file.write(torn)
    finished = [json.loads(line)["index"] for line in journal_of(out).read_text().splitlines()[1 : 1 + entries]]
    capsys.readouterr()
    assert main([*arguments(job, out, "--resume"), "--json"]) == 0
    captured = capsys.readouterr()
    assert out.read_bytes() == (job / "whole.jsonl").read_bytes()
    assert not journal_of(out).exists()
    assert f"{entries} of {COUNT} prompts are finished" in captured.err
    assert ("17 bytes of a line that the stop cut short dropped" in captured.err) == bool(torn)
    result = json.loads(captured.out)
    rows = [json.loads(line) for line in (job / "whole.jsonl").read_text().splitlines()]
    assert result["outputs"] == rows
    assert result["stats"]["new_tokens"] == sum(len(r["token_ids"]) for i, r in enumerate(rows) if i not in finished)


def test_a_torn_header_is_an_empty_journal(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    for torn in (b"", b'{"format": "cot'):
        journal_of(out).write_bytes(torn)
        assert main(arguments(job, out, "--resume")) == 0
        assert out.read_bytes() == (job / "whole.jsonl").read_bytes()
        out.unlink()


def test_without_resume_a_journal_is_an_error_that_says_the_ways_out(job: Path, tmp_path: Path, ended, capsys) -> None:
    out = tmp_path / "o.jsonl"
    journal_of(out).write_bytes(ended)
    before = journal_of(out).read_bytes()
    assert main(arguments(job, out)) == 2
    error = capsys.readouterr().err
    assert "a stopped run left it, expected none; --resume continues that run, removing the file starts over" in error
    assert journal_of(out).read_bytes() == before


def test_a_journal_of_something_else_is_refused(job: Path, tmp_path: Path, ended, capsys) -> None:
    out = tmp_path / "o.jsonl"
    journal_of(out).write_bytes(ended)
    before = journal_of(out).read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text((job / "p.jsonl").read_text().replace('"id": "n7"', '"id": "x7"'))
    changes = {
        "max_new_tokens: found 64, expected 5": ["--max-new-tokens", "5"],
        "seed: found 0, expected 3": ["--seed", "3"],
        "temperature: found 0.0, expected 0.5": ["--temperature", "0.5"],
        "dtype: found float32, expected bfloat16": ["--dtype", "bfloat16"],
        "batch_invariant: found False, expected True": ["--batch-invariant"],
        "prompts: found ": ["--prompts", str(other)],
    }
    for message, options in changes.items():
        assert main([*arguments(job, out, "--resume"), *options]) == 2
        assert message in capsys.readouterr().err
    make_model("qwen3_moe", tmp_path / "m", seed=1)  # the same name and sizes, other weights
    assert main(["generate", str(tmp_path / "m"), *arguments(job, out, "--resume")[2:]]) == 2
    assert "weights: found" in capsys.readouterr().err
    make_model("qwen3_moe", tmp_path / "m", num_hidden_layers=2)
    assert main(["generate", str(tmp_path / "m"), *arguments(job, out, "--resume")[2:]]) == 2
    assert "config: found" in capsys.readouterr().err
    assert journal_of(out).read_bytes() == before


def test_resuming_what_is_complete_does_nothing_and_says_so(job: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "o.jsonl"
    out.write_bytes((job / "whole.jsonl").read_bytes())
    assert main([*arguments(job, out, "--resume"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "complete, nothing to do" in captured.err
    result = json.loads(captured.out)
    assert [o["id"] for o in result["outputs"]] == [f"n{i}" for i in range(COUNT)] and result["stats"]["new_tokens"] == 0
    lines = out.read_text().splitlines(keepends=True)
    for wrong in ("".join(lines[:-1]), "".join([*lines, lines[0]]), "".join(lines[1:] + lines[:1]), "x\n", lines[0] * COUNT):
        out.write_text(wrong)
        assert main(arguments(job, out, "--resume")) == 2
        assert "leave --resume out to replace it" in capsys.readouterr().err
        assert out.read_text() == wrong


def test_resume_without_an_output_begins(job: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "o.jsonl"
    assert main(arguments(job, out, "--resume")) == 0
    assert "nothing to resume yet: begins" in capsys.readouterr().err
    assert out.read_bytes() == (job / "whole.jsonl").read_bytes()
    assert main(["generate", str(job / "m"), "--prompts", str(job / "p.jsonl"), "--resume"]) == 2
    assert "--resume: found no --out" in capsys.readouterr().err


@pytest.mark.processes
def test_a_run_is_continued_on_another_number_of_processes(job: Path, tmp_path: Path, ended) -> None:
    out = tmp_path / "o.jsonl"
    journal_of(out).write_bytes(ended)
    stopped_after(out, 11)
    done = torchrun(3, "-m", "coterie", *arguments(job, out, "--resume", "--strategy", "all_to_all"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert out.read_bytes() == (job / "whole.jsonl").read_bytes()


@pytest.mark.processes
def test_killed_again_and_again_nothing_is_lost_and_nothing_runs_twice(job: Path, tmp_path: Path) -> None:
    """SIGKILL while a run writes its first, eighteenth and twenty-fifth prompt more."""
    out, seen = tmp_path / "o.jsonl", 0
    for more in (1, 18, 25):
        with started([sys.executable, OFTEN, *arguments(job, out, "--resume")], more) as process:
            until_finished(journal_of(out), seen + more, process)
        found = finished_in(journal_of(out))
        assert len(set(found)) == len(found) >= seen + more
        seen = len(found)
    assert seen < COUNT
    assert main(arguments(job, out, "--resume")) == 0
    assert out.read_bytes() == (job / "whole.jsonl").read_bytes()
    assert not journal_of(out).exists()


def finished_in(journal: Path) -> list[int]:
    return [json.loads(line)["index"] for line in journal.read_bytes().splitlines(keepends=True)[1:] if line.endswith(b"\n")]


@pytest.mark.processes
def test_killed_on_two_processes_and_continued_on_one(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", OFTEN]
    with started([*launcher, *arguments(job, out, "--resume", "--strategy", "all_to_all")], 5) as process:
        until_finished(journal_of(out), 5, process)
        process.send_signal(signal.SIGTERM)  # torchrun ends its workers
        process.communicate(timeout=60)
    assert 0 < len(finished_in(journal_of(out))) < COUNT
    assert main(arguments(job, out, "--resume")) == 0
    assert out.read_bytes() == (job / "whole.jsonl").read_bytes()


def test_ctrl_c_says_how_to_go_on(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    with started([sys.executable, OFTEN, *arguments(job, out)], 2) as process:
        until_finished(journal_of(out), 2, process)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in error
    assert "coterie: interrupted; --resume continues after the " in error
    assert main(arguments(job, out, "--resume")) == 0
    assert out.read_bytes() == (job / "whole.jsonl").read_bytes()


@pytest.mark.processes
@pytest.mark.parametrize(("ranks", "room"), [(1, 10), (2, 1500)])
def test_a_full_disk_ends_all_ranks_with_one_message(job: Path, tmp_path: Path, ranks: int, room: int) -> None:
    """A limit on the size of files stands in for the disk: room for not even the journal's header, and for some prompts."""
    out = tmp_path / "o.jsonl"
    command = [sys.executable, "-m", "coterie", *arguments(job, out)]
    if ranks > 1:
        command[1:2] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        command += ["--strategy", "all_to_all"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")  # which has no room either
    process = subprocess.run(
        command, env=environment, text=True, capture_output=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )  # fmt: skip
    assert process.returncode in (1, 2), process.stderr
    ours = [line for line in process.stderr.splitlines() if line.startswith("coterie: ")]
    assert len(ours) == 1 and f"{journal_of(out)}: cannot be written: File too large" in ours[0], process.stderr
    assert ("make room, then: --resume continues after the" in ours[0]) == journal_of(out).exists() == (room > 1000)
    assert not out.exists()
    assert main(arguments(job, out, "--resume")) == 0
    assert out.read_bytes() == (job / "whole.jsonl").read_bytes()


def test_two_runs_do_not_write_one_journal(tmp_path: Path) -> None:
    path = journal_of(tmp_path / "o.jsonl")
    first = Journal.begin(path, {"seed": 1})
    first.append([Entry(4, (5, 6), "stop"), Entry(4, (7,), "stop"), Entry(0, (), "length")])
    with pytest.raises(InputError, match="another run is writing it"):
        Journal.resume(path, {"seed": 1}, 9)
    first.close()
    again = Journal.resume(path, {"seed": 1}, 9)
    assert again.entry(4) == Entry(4, (5, 6), "stop") and again.entry(0) == Entry(0, (), "length") and len(again.finished) == 2
    again.close()
    with pytest.raises(InputError, match="an earlier run left it"):
        Journal.begin(path, {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[]\n", r"line 2: found b'\[\]"),
        (b'{"index": 9, "token_ids": [], "finish_reason": "stop"}\n', "line 2: found"),
        (b'{"index": 0, "token_ids": [1.5], "finish_reason": "stop"}\n', "line 2: found"),
        (b'{"index": 0, "token_ids": [1], "finish_reason": "end"}\n', "line 2: found"),
        (b'{"index": 0, "token_ids": [1], "finish_reason": "stop"}\n' * 2, "line 3: found"),
        (b"\x00\x00\n", "line 2: is not JSON"),
    ],
)
def test_a_damaged_journal_is_refused(tmp_path: Path, line: bytes, message: str) -> None:
    path = journal_of(tmp_path / "o.jsonl")
    Journal.begin(path, {}).close()
    with path.open("ab") as file:
        file.write(line)
    with pytest.raises(InputError, match=message):
        Journal.resume(path, {}, 9)
