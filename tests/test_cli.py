"""The command line: one JSON object, exit codes, errors in a line or two, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, make_trace
from tiny_models import make_model

import coterie
from coterie.launch import commands
from coterie.launch.cli import build_parser, main
from coterie.placement import replan
from coterie.placement.plan import Objective, read_plan
from coterie.placement.planner import baseline_plan
from coterie.placement.topology import Topology
from coterie.routing.files import sha256
from coterie.routing.trace import LoadStatistics, read_routing, save_load, save_trace


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()  # what libraries printed before is not ours
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *arguments: object) -> dict:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1 and out.endswith("\n")
    return json.loads(out)


def fails(capsys, *arguments: object) -> str:
    """The message of a command that must end with exit code 2."""
    code, out, err = run(capsys, *arguments)
    lines = err.strip().splitlines()
    assert code == 2 and out == "", (code, out, err)
    assert 1 <= len(lines) <= 2 and lines[0].startswith("coterie: ") and "Traceback" not in err
    return err


@pytest.fixture
def plan_file(tmp_path: Path, trace_file: Path) -> Path:
    """A plan of the trace, as `coterie plan` writes it, but not searched for."""
    path = tmp_path / "plan.json"
    trace = coterie.read_trace(trace_file)
    made = baseline_plan("packed", trace, Topology(1, 2), "all_to_all")
    objective = Objective("dispatch", coterie.evaluate(made, trace).dispatch, None)
    inputs = ({"file": str(trace_file), "sha256": sha256(trace_file)},)
    coterie.save_plan(replace(made, objective=objective, inputs=inputs), path)
    return path


def test_plan_writes_a_plan_and_prints_its_objective(tmp_path: Path, trace_file: Path, capsys) -> None:
    out = tmp_path / "p.json"
    result = run_json(capsys, "plan", trace_file, "--topology", "2x2", "--out", out, "--time-limit", "2", "--seed", "5")
    made = coterie.read_plan(out)
    assert result["objective"]["value"] == made.objective.value and made.seed == 5
    assert made.inputs[0]["file"] == str(trace_file) and len(made.inputs[0]["sha256"]) == 64
    code, text, _ = run(capsys, "plan", trace_file, "--topology", "1x2", "--method", "packed", "--out", out)
    assert code == 0 and "round_robin" in text and coterie.read_plan(out).objective.lower_bound is None


def test_evaluate_prints_the_fields_of_the_contract(tmp_path: Path, trace_file: Path, plan_file: Path, capsys) -> None:
    result = run_json(capsys, "evaluate", plan_file, trace_file)
    assert set(result) == {"plans", "tokens", "layers"} and set(result["plans"]) == {
        "plan",
        "contiguous",
        "round_robin",
        "packed",
    }
    for values in result["plans"].values():
        assert set(values) == {
            "hops",
            "dispatch",
            "remote_rows",
            "node_rows",
            "busiest_rank",
            "load",
            "coherent",
            "seconds",
        }
    other = tmp_path / "other.safetensors"
    save_trace(make_trace(seed=9), other)
    several = run_json(capsys, "evaluate", plan_file, trace_file, other)
    assert set(several["scenarios"]) == {str(trace_file), str(other)} and several["scenarios"][str(trace_file)] == result
    assert result["plans"]["plan"]["dispatch"] == coterie.read_plan(plan_file).objective.value


def test_evaluate_takes_load_statistics(tmp_path: Path, plan_file: Path, capsys) -> None:
    path = tmp_path / "load.safetensors"
    load = np.random.default_rng(0).integers(1, 100, (2, 3, 8))
    save_load(LoadStatistics(load, "m", (0, 1, 2), ("prefill", "decode")), path)
    result = run_json(capsys, "evaluate", plan_file, path)["scenarios"]
    assert set(result) == {f"{path}:prefill", f"{path}:decode"}
    values = result[f"{path}:decode"]["plans"]["plan"]
    assert values["load"] > 1 and values["hops"] is None


def test_show_draws_traces_plans_and_both(tmp_path: Path, trace_file: Path, plan_file: Path, capsys) -> None:
    for number, files in enumerate(([trace_file], [plan_file], [plan_file, trace_file])):
        out = tmp_path / f"{number}.html"
        assert run_json(capsys, "show", *files, "--out", out) == {"report": str(out)}
        text = out.read_text()
        assert text.startswith("<!doctype html>") and "<svg" in text
        assert not re.findall(r'<script|<link|@import|(?:src|href)="(?!#|data:)|url\((?!#)', text), (
            "the page needs nothing else"
        )
        assert ("What it saves" in text) == (number > 0), "a plan finds the trace it was made from"
    assert "expected at most one of each" in fails(capsys, "show", trace_file, trace_file, "--out", tmp_path / "x.html")


def test_doctor_finds_what_is_there(capsys) -> None:
    result = run_json(capsys, "doctor")
    found = {f["what"]: f["status"] for f in result["findings"]}
    assert found["torch"] == found["transformers"] == "ok" and found["several processes"] == "ok"
    code, text, _ = run(capsys, "doctor")
    assert code == 0 and "processor" in text


def test_trace_and_generate_on_a_checkpoint_without_a_tokenizer(tmp_path: Path, capsys) -> None:
    folder = make_model("mixtral", tmp_path / "m")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"token_ids": [5, 6, 7], "id": "a"}\n\n{"token_ids": [8], "max_new_tokens": 2}\n')
    result = run_json(capsys, "trace", folder, "--prompts", prompts, "--out", tmp_path / "t", "--max-new-tokens", "4")
    assert result["tokens"] == coterie.read_trace(tmp_path / "t").tokens == 3 + 3 + 1 + 1
    made = run_json(capsys, "generate", folder, "--prompts", prompts, "--max-new-tokens", "4", "--out", tmp_path / "o.jsonl")
    assert [o["id"] for o in made["outputs"]] == ["a", 1] and [len(o["token_ids"]) for o in made["outputs"]] == [4, 2]
    assert made["stats"]["hit_rate"] is None and made["stats"]["strategy"] == "local"
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 2


def test_generate_streams_one_prompt(capsys) -> None:
    code, out, err = run(capsys, "generate", "coterie-tiny", "--prompt", "import os", "--max-new-tokens", "12")
    assert code == 0 and out.startswith("import os") and len(out) > 12 and "12 tokens in" in err


def test_launchers_local_rank_before_the_verb_is_accepted(capsys) -> None:
    for given in (["--local_rank=0"], ["--local-rank", "0"]):
        assert main([*given, "doctor", "--json"]) == 0
    capsys.readouterr()


def test_import_brings_in_npz_and_json(tmp_path: Path, capsys) -> None:
    ids = np.array([[[0, 3], [1, 2]], [[2, 1], [0, 3]]])
    np.savez(tmp_path / "a.npz", topk_ids=ids, sequence_ids=np.array([0, 1]))
    run_json(
        capsys,
        "import",
        tmp_path / "a.npz",
        "--out",
        tmp_path / "a",
        "--model",
        "x",
        "--num-experts",
        "8",
        "--phase",
        "decode",
    )
    trace = coterie.read_trace(tmp_path / "a")
    assert (trace.expert_ids == ids).all() and (trace.num_experts, trace.model, trace.phase) == (8, "x", "decode")

    (tmp_path / "b.json").write_text(json.dumps({"logical_count": [[[0, 0], [1, 2]], [[0, 0], [3, 4]]]}))
    run_json(capsys, "import", tmp_path / "b.json", "--out", tmp_path / "b")
    load = read_routing(tmp_path / "b")
    assert isinstance(load, LoadStatistics) and load.layer_ids == (1,) and load.expert_load.tolist() == [[[1, 2]], [[3, 4]]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npz", b"no zip", "a.npz: is not a readable npz"),
        ("a.json", b"{}", "a.json: found no field logical_count"),
        ("a.json", b'{"logical_count": [[1, 2], [3]]}', "logical_count: is no regular array"),
        ("a.json", b'{"logical_count": [[-1, 2]]}', "logical_count: found a value that is negative"),
        ("a.json", b'{"logical_count": [[0, 0]]}', "logical_count: found only zeros"),
        ("a.pt", b"no torch file", "a.pt: is not a readable .pt file"),
        ("a.csv", b"1,2", "a.csv: found suffix '.csv', expected .json, .npz, .pt"),
    ],
)
def test_import_names_what_is_wrong(tmp_path: Path, capsys, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in fails(capsys, "import", tmp_path / name, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"num_experts": np.array(0)}, "num_experts: found 0, expected 1 to 32767"),
        ({"num_experts": np.array(40000)}, "num_experts: found 40000, expected 1 to 32767"),
        ({"router_weights": np.full((2, 1, 2), 1e9)}, "router_weights: found 1000000000.0, expected numbers within float16"),
        ({"router_weights": np.full((2, 1, 2), np.nan)}, "router_weights: found nan"),
    ],
)
def test_import_refuses_what_a_trace_cannot_hold(tmp_path: Path, capsys, arrays, message: str) -> None:
    np.savez(tmp_path / "a.npz", expert_ids=np.array([[[0, 1]], [[1, 2]]]), **arrays)
    assert message in fails(capsys, "import", tmp_path / "a.npz", "--out", tmp_path / "out")


def test_import_of_a_damaged_archive(tmp_path: Path, capsys) -> None:
    """One byte of compressed data after another."""
    np.savez_compressed(tmp_path / "whole.npz", topk_ids=np.random.default_rng(0).integers(0, 4, (500, 2, 1)))
    whole = (tmp_path / "whole.npz").read_bytes()
    codes = set()
    for at in range(40, len(whole), max(1, len(whole) // 12)):
        (tmp_path / "a.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        code, _, err = run(capsys, "import", tmp_path / "a.npz", "--out", tmp_path / "out")
        assert code in (0, 2) and "defect" not in err, (at, err)
        codes.add(code)
    assert 2 in codes


def test_counts_have_no_phase(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.json").write_text('{"logical_count": [[1, 2]]}')
    told = fails(capsys, "import", tmp_path / "a.json", "--out", tmp_path / "out", "--phase", "decode")
    assert "--phase: found decode for counts, expected none" in told


def test_import_of_arrays_that_are_no_routing(tmp_path: Path, capsys) -> None:
    for arrays, message in (
        ({"x": np.zeros(3)}, "found arrays ['x'], expected expert_ids or topk_ids"),
        ({"topk_ids": np.zeros((2, 2, 1))}, "topk_ids: found float64 with 3 dimensions, expected integers"),
        ({"topk_ids": np.zeros((2, 2), int)}, "topk_ids: found int64 with 2 dimensions"),
        ({"topk_ids": np.full((2, 2, 1), 9)}, "expert_ids: found 9, expected less than num_experts = 4"),
        ({"topk_ids": np.zeros((2, 2, 2), int)}, "expert_ids: found one twice by token 0 in layer 0: [0, 0]"),
        ({"topk_ids": np.zeros((2, 2, 1), int), "router_weights": np.full((2, 2, 1), 1j)}, "router_weights: found complex128"),
        ({"topk_ids": np.zeros((0, 2, 2), int)}, "expected at least one token"),
        (
            {"topk_ids": np.zeros((2, 2, 1), int), "layer_ids": np.array([0.5, 1.5])},
            "layer_ids: found float64 with 1 dimensions",
        ),
    ):
        np.savez(tmp_path / "a.npz", **arrays)
        assert message in fails(capsys, "import", tmp_path / "a.npz", "--out", tmp_path / "out", "--num-experts", "4")


def test_wrong_arguments_are_one_line_with_exit_code_2(tmp_path: Path, trace_file: Path, plan_file: Path, capsys) -> None:
    out = tmp_path / "out"
    plan = ("plan", trace_file, "--out", out)
    assert "--help tells what is expected" in fails(capsys, "plan")
    assert "invalid choice" in fails(capsys, "fly")
    assert "--topology: found 16 ranks, expected at most 8" in fails(capsys, *plan, "--topology", "4x4")
    assert "topology: found 'big', expected NODESxRANKS" in fails(capsys, *plan, "--topology", "big")
    assert "--workers: found 0" in fails(capsys, *plan, "--topology", "1x2", "--workers", "0")
    assert "no such file" in fails(capsys, "plan", tmp_path / "none", "--topology", "1x2", "--out", out)
    assert "the folder" in fails(capsys, "plan", trace_file, "--topology", "1x2", "--out", "/no/where/p.json")
    assert "is a folder" in fails(capsys, "plan", trace_file, "--topology", "1x2", "--out", tmp_path)
    assert "cannot be read" in fails(capsys, "evaluate", tmp_path / "none.json", trace_file)
    assert "is a folder, expected a file" in fails(capsys, "plan", tmp_path, "--topology", "1x2", "--out", out)
    assert f"{plan_file}: is JSON (a plan?)" in fails(capsys, "cache-sim", plan_file, "--slots", "0.5")
    assert f"{trace_file}: is no text (a trace?)" in fails(capsys, "evaluate", trace_file, plan_file)
    before = trace_file.read_bytes(), plan_file.read_bytes()
    for verb, *rest in (
        ("plan", trace_file, "--topology", "1x2", "--out", trace_file),
        ("show", trace_file, "--out", trace_file),
        ("export", plan_file, "--to", "vllm", "--out", plan_file),
        ("import", trace_file, "--out", trace_file),
        ("trace", "coterie-tiny", "--prompts", plan_file, "--out", plan_file),
        ("generate", "coterie-tiny", "--prompts", plan_file, "--out", plan_file),
    ):
        assert "which is also read; give another name" in fails(capsys, verb, *rest)
    assert (trace_file.read_bytes(), plan_file.read_bytes()) == before
    assert "--traces: found" in fails(capsys, "bench", "plan", "--traces", tmp_path / "none")
    assert "--ranks: found 32, expected 2 to 16" in fails(capsys, "demo", "--ranks", "32", "--out", tmp_path / "demo")
    prompts = tmp_path / "p.txt"
    for text, message in (
        ("", "found no prompt"),
        ('{"prompt": "x", "token_ids": [1]}', ":1: found ['prompt', 'token_ids'], expected one of"),
        ('{"prompt": ""}', "prompt: found '', expected a text that is not empty"),
        ('{"token_ids": [-1]}', "token_ids: found [-1], expected a list of token ids"),
        ('{"token_ids": [1]}\n{', ":2: is not JSON"),
        ('{"prompt": "x", "max_new_tokens": 0}', "max_new_tokens: found 0"),
        ('{"prompt": "x", "id": [1]}', "id: found [1]"),
    ):
        prompts.write_text(text)
        assert message in fails(capsys, "generate", "coterie-tiny", "--prompts", prompts)
    assert "cannot be read" in fails(capsys, "generate", "coterie-tiny", "--prompts", tmp_path / "none")
    assert "--max-new-tokens: found 0" in fails(capsys, "generate", "coterie-tiny", "--prompt", "x", "--max-new-tokens", "0")
    assert "--batch-size: found 0" in fails(capsys, "generate", "coterie-tiny", "--prompt", "x", "--batch-size", "0")
    for wish in ("auto", tmp_path / "none"):
        assert "on one process, expected several" in fails(
            capsys, "generate", "coterie-tiny", "--prompt", "x", "--replan", wish
        )
    rounded = ("--batch-invariant", "--quantise", "int8")
    assert "--batch-invariant: found it with --quantise" in fails(capsys, "generate", "coterie-tiny", "--prompt", "x", *rounded)
    assert "--timeout: found inf" in fails(capsys, "generate", "coterie-tiny", "--prompt", "x", "--timeout", "inf")
    prompts.write_text('{"prompt": "x"}\n{"token_ids": [999999], "id": "b"}')
    message = fails(capsys, "generate", "coterie-tiny", "--prompts", prompts)
    assert f"{prompts}: prompt 'b': token_ids: found 999999, expected 0 to" in message
    message = fails(capsys, "generate", "coterie-tiny", "--prompt", "x", "--plan", plan_file)
    assert f"{plan_file}: ranks: the plan is for 2, found 1 processes; start 2, or plan for 1" in message
    assert not out.exists()


def test_a_trace_of_another_model_is_refused_with_its_name(tmp_path: Path, plan_file: Path, capsys) -> None:
    other = tmp_path / "other.safetensors"
    save_trace(make_trace(model="somebody/else"), other)
    message = fails(capsys, "evaluate", plan_file, other)
    assert f"{other}: model: the trace has 'somebody/else', the plan 'm'" in message


def test_an_unexpected_failure_is_called_a_defect_and_debug_shows_it(
    trace_file: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("coterie.launch.planning.read_routing", lambda path: 1 / 0)
    arguments = ("plan", trace_file, "--topology", "1x2", "--out", tmp_path / "p")
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "ZeroDivisionError" in err and "--debug" in err and "Traceback" not in err
    code, _, err = run(capsys, *arguments, "--debug")
    assert code == 1 and err.count("division by zero") >= 2 and "in <lambda>" in err


def test_debug_shows_where_a_wrong_input_was_found_and_changes_no_exit_code(trace_file: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "old.json").write_text("{}")
    line = ("plan", trace_file, "--topology", "1x2", "--out", tmp_path / "p", "--from", tmp_path / "old.json")
    code, out, err = run(capsys, *line, "--debug")
    assert (code, out) == (2, "") and "in read_plan" in err and err.splitlines()[-1].startswith("coterie: ")


def test_what_is_not_python_cannot_write_beside_the_json_object(trace_file: Path, capfd, monkeypatch) -> None:
    read = commands.read_routing

    def noisy(path: Path) -> object:
        os.write(1, b"a library says\n")
        return read(path)

    monkeypatch.setattr(commands, "read_routing", noisy)
    plan = trace_file.with_name("p.json")
    coterie.save_plan(baseline_plan("packed", coterie.read_trace(trace_file), Topology(1, 2), "all_to_all"), plan)
    assert main(["evaluate", str(plan), str(trace_file), "--json"]) == 0
    out, err = capfd.readouterr()
    assert "a library says" in err and json.loads(out)["tokens"] == 400


def test_closed_streams_are_nobodys_defect(trace_file: Path, tmp_path: Path) -> None:
    line = f"{sys.executable} -m coterie import {tmp_path / 'a.npz'} --out {tmp_path / 'a'}"
    np.savez(tmp_path / "a.npz", topk_ids=np.zeros((4, 2, 1), dtype=np.int64))
    done = subprocess.run(f"{line} >&- <&- 2>&-", shell=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and coterie.read_trace(tmp_path / "a").tokens == 4


def test_options_are_taken_by_their_own_names_alone(trace_file: Path, capsys) -> None:
    assert "unrecognized arguments: --deb" in fails(capsys, "evaluate", trace_file, trace_file, "--deb")


def test_a_report_is_not_written_over_the_trace_that_its_plan_was_made_from(trace_file: Path, plan_file: Path, capsys) -> None:
    before = trace_file.read_bytes()
    assert "would be written over an input" in fails(capsys, "show", plan_file, "--out", trace_file)
    assert trace_file.read_bytes() == before


def test_a_trace_is_not_written_over_the_models_weights(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "p.jsonl").write_text('{"token_ids": [1, 2]}')
    weights = folder / "model.safetensors"
    before = weights.stat()
    for verb in ("trace", "generate"):
        told = fails(capsys, verb, folder, "--prompts", tmp_path / "p.jsonl", "--out", weights)
        assert "would be written over an input" in told
    assert weights.stat().st_mtime_ns == before.st_mtime_ns


def test_what_may_not_be_read_is_wrong_input_and_no_defect(trace_file: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("coterie.launch.planning.read_routing", refused)
    message = fails(capsys, "plan", trace_file, "--topology", "1x2", "--out", tmp_path / "p")
    assert f"{trace_file}: cannot be used: Permission denied" in message


def test_a_plan_without_planning_is_not_called_useless(trace_file: Path, tmp_path: Path, capsys) -> None:
    arguments = ("plan", trace_file, "--out", tmp_path / "p", "--time-limit", "1")
    alone = run_json(capsys, *arguments, "--topology", "1x1")["predicted"]["notes"]
    assert alone == ["on one rank nothing travels: a plan has nothing to save"]
    notes = run_json(capsys, *arguments, "--topology", "1x2", "--method", "contiguous")["predicted"]["notes"]
    assert not any("will not pay" in note for note in notes)


@pytest.mark.processes
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_said(trace_file: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "plan.json")
    command = [sys.executable, "-m", "coterie", "plan", str(trace_file), "--topology", "1x2", "--time-limit", "1", "--out", out]
    for more in ([], ["--json"]):
        with Path("/dev/full").open("w") as full:
            ended = subprocess.run([*command, *more], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
        told = "coterie: standard output: cannot be written" in ended.stderr
        assert (ended.returncode, told, "defect" in ended.stderr) == (1, True, False), ended.stderr


def test_a_recording_judged_twice_is_refused_before_anything_is_printed(trace_file, plan_file, capsys) -> None:
    assert f"{trace_file}: found 2 times, expected different recordings" in fails(
        capsys, "evaluate", plan_file, *[trace_file] * 2
    )


@pytest.mark.processes
def test_a_planner_that_is_killed_takes_its_workers_along(tmp_path: Path) -> None:
    save_trace(make_trace(tokens=2000, layers=6, experts=16, top_k=2), tmp_path / "t")
    arguments = ["plan", str(tmp_path / "t"), "--topology", "1x4", "--objective", "dispatch", "--out", str(tmp_path / "p")]
    command = [sys.executable, "-m", "coterie", *arguments, "--time-limit", "200", "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    workers: list[str] = []
    deadline = time.monotonic() + 60
    while not workers and time.monotonic() < deadline:
        time.sleep(0.2)
        workers = children_of(process.pid)
    process.kill()
    process.wait()
    while any(Path("/proc", worker).exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert workers and not any(Path("/proc", worker).exists() for worker in workers)


def children_of(pid: int) -> list[str]:
    """Of the process's main thread."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.processes
def test_ctrl_c_in_the_middle_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    (tmp_path / "p.txt").write_text("def f(x):\n" * 400)
    arguments = ["trace", "coterie-tiny", "--prompts", str(tmp_path / "p.txt"), "--out", str(out), "--max-new-tokens", "800"]
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-m", "coterie", *arguments], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    try:
        while not any(part.stat().st_size for part in tmp_path.glob(".out.*.part")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and printed == "" and "coterie: interrupted; no output was written" in err
    assert out.read_text() == "precious"
    assert not [p for p in tmp_path.iterdir() if ".part" in p.name]


@pytest.mark.processes
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_while_planning_keeps_the_best_plan_so_far(tmp_path: Path, workers: str) -> None:
    save_trace(make_trace(tokens=2000, layers=6, experts=16, top_k=2), tmp_path / "t")
    arguments = ["plan", str(tmp_path / "t"), "--topology", "1x4", "--objective", "hops", "--out", str(tmp_path / "p")]
    command = [sys.executable, str(ROOT / "tests" / "interrupted_plan.py"), *arguments, "--workers", workers, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--time-limit", "300"], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["iterations"] <= 2 and found["seconds"] < 100
    assert read_plan(tmp_path / "p").objective.gap is not None


@pytest.mark.processes
def test_processes_of_mpirun_plan_together(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    if (mpirun := shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")) is None:
        pytest.skip("mpirun is not installed")
    save_trace(make_trace(tokens=500, layers=3, experts=8, top_k=2), tmp_path / "t")
    command = [mpirun, "--map-by", ":OVERSUBSCRIBE", "-n", "2", sys.executable, "-m", "coterie", "plan", str(tmp_path / "t")]
    command += ["--topology", "1x2", "--objective", "dispatch", "--out", str(tmp_path / "p"), "--time-limit", "5", "--json"]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["objective"]["value"] == read_plan(tmp_path / "p").objective.value


@pytest.mark.processes
def test_a_process_of_mpirun_that_cannot_read_is_named(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    if (mpirun := shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")) is None:
        pytest.skip("mpirun is not installed")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    save_trace(make_trace(tokens=100, layers=2, experts=4, top_k=2), tmp_path / "a" / "t")
    line = [sys.executable, "-m", "coterie", "plan", "t", "--topology", "1x2", "--out", str(tmp_path / "p")]
    apart = [":", *(part for name in ("b",) for part in ["-n", "1", "--wdir", str(tmp_path / name), *line])]
    command = [mpirun, "--map-by", ":OVERSUBSCRIBE", "-n", "1", "--wdir", str(tmp_path / "a"), *line, *apart]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "PYTHONPATH": str(ROOT)}, timeout=120)
    said = [text for text in done.stderr.splitlines() if text.startswith("coterie: ")]
    assert said == ["coterie: rank 1: t: no such file"], done.stderr
    assert done.returncode == 2 and not (tmp_path / "p").exists()


def test_several_traces_are_scenarios(trace_file: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other.safetensors"
    save_trace(make_trace(seed=5), other)
    values = {}
    for robust in ("worst", "mean"):
        arguments = ("plan", trace_file, other, "--topology", "1x2", "--objective", "dispatch", "--robust", robust)
        code, printed, err = run(
            capsys, *arguments, "--time-limit", "4", "--workers", "1", "--out", tmp_path / robust, "--json"
        )
        assert code == 0, err
        values[robust] = json.loads(printed)["objective"]["value"]
    for robust, combine in (("worst", max), ("mean", np.mean)):
        code, printed, _ = run(capsys, "evaluate", tmp_path / robust, trace_file, other, "--json")
        found = [s["plans"]["plan"]["dispatch"] for s in json.loads(printed)["scenarios"].values()]
        assert values[robust] == pytest.approx(combine(found))


def test_what_other_methods_do_not_know_and_what_homes_are_told_by_is_said(trace_file: Path, tmp_path: Path, capsys) -> None:
    shared = ("--topology", "1x2", "--time-limit", "2", "--workers", "1", "--out", tmp_path / "p")
    code, _, err = run(
        capsys, "plan", trace_file, trace_file, *shared, "--method", "packed", "--robust", "worst", "--iterations", "3"
    )
    assert code == 0 and "--method packed plans for the mean of the recordings" in err and "--iterations has no effect" in err
    code, _, err = run(capsys, "plan", trace_file, *shared, "--homes")
    assert code == 0 and "homes will be told by the first tokens of every prompt" in err
    spoken = coterie.read_trace(trace_file)
    save_trace(replace(spoken, token_ids=np.arange(spoken.tokens, dtype=np.int32) % 7), tmp_path / "t")
    code, _, err = run(capsys, "plan", tmp_path / "t", *shared, "--homes")
    assert code == 0 and "homes will be told" not in err
    assert read_plan(tmp_path / "p").homes.told_by == "token_ids"


def test_planning_again_counts_its_moves(trace_file: Path, plan_file: Path, tmp_path: Path, capsys) -> None:
    arguments = ("plan", trace_file, "--topology", "1x2", "--objective", "dispatch", "--max-load", "2", "--from", plan_file)
    code, printed, err = run(capsys, *arguments, "--max-moves", "2", "--time-limit", "3", "--out", tmp_path / "p", "--json")
    assert code == 0, err
    moved = replan.moves(read_plan(plan_file), read_plan(tmp_path / "p"))
    assert 0 < json.loads(printed)["moves"] == moved <= 2
    assert "--max-moves: found None, expected --from and it together" in fails(capsys, *arguments, "--out", tmp_path / "p")


def test_a_plan_says_what_to_expect_of_it(trace_file: Path, tmp_path: Path, capsys) -> None:
    arguments = ("plan", trace_file, "--topology", "1x4", "--objective", "hops", "--time-limit", "3", "--out", tmp_path / "p")
    code, printed, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    predicted = json.loads(printed)["predicted"]
    assert -1 < predicted["unseen_gain"] < 1
    assert any("tokens return home after every layer" in note for note in predicted["notes"])
    assert "note: under --strategy all_to_all" in err


def test_bench_states_what_it_could_not_measure(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("coterie.launch.bench_plan._aligned", lambda traces: iter(()))
    code, printed, err = run(capsys, "bench", "plan", "--quick", "--traces", tmp_path, "--json")
    assert code == 0, err
    result = json.loads(printed)
    assert set(result) == {"bench", "machine", "versions", "rows", "seconds"}
    assert result["rows"] and all(row["value"] is None and row["met"] is None and row["why"] for row in result["rows"])
    assert "bench: found 'x', expected plan" in fails(capsys, "bench", "x")


def test_bench_measures_a_part_alone_and_refuses_what_has_no_effect(tmp_path: Path, capsys) -> None:
    code, printed, err = run(capsys, "bench", "plan", "--only", "DISP", "--traces", tmp_path, "--json")
    assert code == 0, err
    assert [row["case"] for row in json.loads(printed)["rows"]] == ["dispatch"]
    said = fails(capsys, "bench", "plan", "--only", "nothing")
    assert "--only: found 'nothing', expected a part of proven, gaps, dispatch" in said
    said = fails(capsys, "bench", "experts", "--only", "decode")
    assert "--only: found it with bench experts, expected bench plan or kernels or cluster" in said


@pytest.mark.parametrize("verb", ["evaluate", "doctor"])
def test_verbs_for_one_process_refuse_several(verb: str, trace_file: Path, plan_file: Path, capsys, monkeypatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    arguments = {"evaluate": [plan_file, trace_file], "doctor": []}[verb]
    assert f"{verb}: found 4 processes, expected one; generate, trace and plan run on several" in fails(
        capsys, verb, *arguments
    )


def test_a_rank_in_the_environment_of_a_lone_process_means_nothing(
    trace_file: Path, plan_file: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert run_json(capsys, "evaluate", plan_file, trace_file)["tokens"] == 400


def test_prompts_may_hold_any_character_but_a_line_break(tmp_path: Path) -> None:
    from coterie.launch.prompts import read_prompts

    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b\u0085c"}\r\n{"prompt": "d"}\n'.encode())
    assert [p.text for p in read_prompts(path)] == ["a\u2028b\u0085c", "d"]
    (tmp_path / "p.txt").write_text("one\x0cpage\ntwo\n")
    assert [p.text for p in read_prompts(tmp_path / "p.txt")] == ["one\x0cpage", "two"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", '{"prompt": "a",}\n', "p.txt:1: is not JSON"),
        ("p.txt", '{"text": "a"}\n', "p.txt:1: found ['text'], expected one of prompt and token_ids"),
        ("p.jsonl", '{"prompt": "a", "max_new_token": 1}\n', "found 'max_new_token', expected 'max_new_tokens'"),
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', "p.jsonl:2: id: found 1, as in line 1"),
        ("p.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b"}\n', "p.jsonl:2: id: found 1, as in line 1"),
        ("p.jsonl", '{"prompt": "a \\ud800"}\n', "found '\\ud800' as character 3, expected text that can be written as UTF-8"),
    ],
)
def test_wrong_prompts_are_named_by_line(tmp_path: Path, capsys, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    assert message in fails(capsys, "generate", "coterie-tiny", "--prompts", tmp_path / name)


def test_a_callers_own_fields_and_names_of_both_kinds_are_left_alone(tmp_path: Path) -> None:
    from coterie.launch.prompts import read_prompts

    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "id": "1", "source": "x"}\n{"prompt": "b", "id": 1, "score": 2}\n')
    assert [p.id for p in read_prompts(tmp_path / "p.jsonl")] == ["1", 1]


def test_what_is_no_regular_file_is_not_replaced_and_a_link_stays_one(
    tmp_path: Path, trace_file: Path, plan_file: Path, capsys
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in fails(capsys, "show", trace_file, "--out", tmp_path / "pipe")
    (tmp_path / "link.html").symlink_to(tmp_path / "real.html")
    run_json(capsys, "show", trace_file, "--out", tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "real.html").is_file()
    assert "is a folder" in fails(capsys, "import", plan_file, "--out", "/")


def test_help_of_every_verb_fits_and_names_its_options(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    verbs = next(action for action in build_parser()._actions if action.dest == "verb").choices
    assert len(verbs) >= 12
    for verb in verbs:
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0
        told = capsys.readouterr().out
        assert "--json" in told and max(map(len, told.splitlines())) <= 80, verb
