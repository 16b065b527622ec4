"""`coterie trace` on several processes and with experts on disk: the routing that one process with all in memory records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import torchrun
from numpy.typing import NDArray
from thread_ranks import on_ranks
from tiny_models import make_model

import coterie
from coterie.launch.cli import main
from coterie.moe.collectives import Group
from coterie.routing.errors import InputError
from coterie.routing.trace import RoutingTrace

PROMPTS = [[3, 5, 7, 11], [2, 4], [9, 8, 7, 6, 5, 4, 3], [1, 2, 3], [50, 40, 30]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("mixtral", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in PROMPTS))
    return path


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RoutingTrace:
    out = tmp_path_factory.mktemp("alone") / "t"
    asked = [coterie.Prompt(token_ids=tuple(ids)) for ids in PROMPTS]
    assert coterie.load(folder, dtype="float32").record(asked, out, max_new_tokens=4, token_ids=True) == 34
    return coterie.read_trace(out)


def by_token(trace: RoutingTrace) -> list[NDArray[np.generic]]:
    """In the order of sequences and positions; experts of a token by number, for their order says nothing."""
    order = np.lexsort((trace.positions, trace.sequence_ids))
    assert trace.token_ids is not None
    columns = (trace.sequence_ids, trace.positions, trace.token_ids, np.sort(trace.expert_ids, 2))
    return [column[order] for column in columns]


def check_same(path: Path, expected: RoutingTrace) -> None:
    found = coterie.read_trace(path)
    assert (found.phase, found.layer_ids, found.num_experts) == ("mixed", expected.layer_ids, expected.num_experts)
    for mine, other in zip(by_token(found), by_token(expected), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_several_processes_record_what_one_does(
    folder: Path, prompts: Path, alone: RoutingTrace, tmp_path: Path, batch_size: int
) -> None:
    """Five prompts on three ranks: the last round leaves some of them without any."""
    out = tmp_path / "t"
    arguments = ["-m", "coterie", "trace", str(folder), "--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "4"]
    done = torchrun(3, *arguments, "--token-ids", "--batch-size", str(batch_size), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"trace": str(out), "tokens": 34, "layers": 3, "num_experts": 8}
    check_same(out, alone)


def test_several_processes_stop_at_as_many_tokens_as_were_asked_for(folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    arguments = ["-m", "coterie", "trace", str(folder), "--prompts", str(prompts), "--out", str(out), "--max-tokens", "9"]
    done = torchrun(2, *arguments, "--batch-size", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    found = coterie.read_trace(out)
    assert found.tokens == 9 and set(found.sequence_ids.tolist()) == {0, 1, 2}  # a round of two prompts, and some of the next


def test_what_several_processes_recorded_is_what_the_trace_says(folder: Path, tmp_path: Path) -> None:
    """--max-tokens reached within prompts: other ranks generated, but nothing of that is kept."""

    def record(group: Group) -> None:
        model = coterie.load(folder, dtype="float32", group=group)
        asked = [coterie.Prompt(token_ids=(3, 4, 5, 6, 7, 8))] * 2
        for tokens in (4, 40):
            model.record(asked, tmp_path / f"t{tokens}", max_new_tokens=6, max_tokens=tokens)

    on_ranks(2, record)
    assert [coterie.read_trace(tmp_path / f"t{tokens}").phase for tokens in (4, 40)] == ["prefill", "mixed"]


def test_a_trace_that_cannot_be_written_fails_on_all_ranks(folder: Path, tmp_path: Path) -> None:
    def record(group: Group) -> str:
        model = coterie.load(folder, dtype="float32", group=group)
        with pytest.raises(InputError) as caught:
            model.record([coterie.Prompt(token_ids=(3, 4))] * 2, tmp_path / "missing" / "t")
        return str(caught.value)

    assert all("missing does not exist; create it first" in said for said in on_ranks(2, record))


def test_experts_on_disk_record_what_all_in_memory_do(folder: Path, alone: RoutingTrace, tmp_path: Path) -> None:
    asked = [coterie.Prompt(token_ids=tuple(ids)) for ids in PROMPTS]
    model = coterie.load(folder, dtype="float32", slots=3)
    assert model.record(asked, tmp_path / "t", max_new_tokens=4, token_ids=True) == 34
    assert model.cache is not None and model.cache.statistics.transfers > 16, "all experts fit: nothing is shown by this"
    check_same(tmp_path / "t", alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "1MB"), "--memory: found 1.0 MB, expected"),
        (("--memory", "much"), "--memory: found 'much', expected a size such as"),
        (("--packed", "x"), "--packed: found 'x' without --memory"),
        (("--quantise", "int3"), "quantise: found 'int3', expected"),
        (("--transport", "tcp"), "--transport: found 'tcp' on one process"),
        pytest.param(
            ("--host-memory", "1GB"),
            "--host-memory: found it without a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str], message: str
) -> None:
    arguments = ["trace", str(folder), "--prompts", str(prompts), "--out", str(tmp_path / "t"), *options]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "t").exists()
