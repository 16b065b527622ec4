"""What the documentation says is refused, is refused; and errors that come late lose nothing."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_trace
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import make_model

import coterie
from coterie.launch import bench_cluster, bench_plan, doctor
from coterie.launch.bench import Row
from coterie.launch.cli import main
from coterie.launch.memory import parse_bytes
from coterie.moe.journal import Journal
from coterie.moe.memory import told
from coterie.moe.model import check_invariant
from coterie.moe.prepare import prepare
from coterie.moe.quantise import rounding_of
from coterie.placement.cost import evaluate, evaluate_load
from coterie.placement.planner import PlanRequest, plan
from coterie.placement.topology import Topology
from coterie.routing import synth
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.trace import LoadStatistics, read_trace, save_trace


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What is said when wrong input is refused."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


# --- options that do not go together ---


def test_what_depends_on_the_batch_or_the_home_rank_does_not_run_batch_invariant() -> None:
    share = prepare("coterie-tiny", None, "float32", 4, 2)
    for strategy in ("coherent", "hierarchical"):
        with pytest.raises(InputError, match=f"--batch-invariant: found strategy {strategy}"):
            check_invariant(True, strategy, share)
    check_invariant(True, "hierarchical", prepare("coterie-tiny", None, "float32", 4, 1))
    with pytest.raises(InputError, match="--batch-invariant: found it with --misses cpu"):
        check_invariant(True, None, replace(share, misses="cpu"))
    with pytest.raises(InputError, match="--batch-invariant: found it with --quantise"):
        check_invariant(True, None, replace(share, quantise="int8"))


def test_experts_do_not_move_in_a_batch_invariant_run() -> None:
    made = coterie.load("coterie-tiny", batch_invariant=True)
    with pytest.raises(InputError, match="--replan: found it with --batch-invariant"):
        made.follow("auto", print)


@pytest.mark.parametrize("misses", ["cpu", "auto"])
def test_the_host_computes_no_rounded_experts(misses: str, capsys) -> None:
    line = ("generate", "coterie-tiny", "--prompt", "x", "--quantise", "int8", "--misses", misses)
    assert f"--misses: found {misses} with --quantise, expected fetch" in refused(capsys, *line)


def test_an_old_plan_with_homes_is_no_start(trace) -> None:
    request = PlanRequest(Topology(1, 2), objective="dispatch", time_limit=1)
    homed = plan(trace, replace(request, homes=True), prove=False)
    with pytest.raises(InputError, match="--from: found a plan with homes"):
        plan(trace, replace(request, previous=homed, max_moves=1))


def test_quick_cases_of_the_cluster_are_told_where_none_is_chosen(monkeypatch) -> None:
    monkeypatch.setattr(bench_cluster, "check_available", lambda: None)
    with pytest.raises(InputError, match="--only: found 'single', expected a part of embedded, synthetic"):
        next(bench_cluster.rows(argparse.Namespace(quick=True, only="single", traces=Path())))


def test_a_plan_that_is_being_taken_over_is_taken_over_first() -> None:
    model = coterie.load("coterie-tiny")
    model.boundary = SimpleNamespace(moving=True)
    with pytest.raises(InputError, match="--replan: found a plan half taken over"):
        model.follow("auto", print)


# --- the methods of others, as `plan` runs them ---


@pytest.mark.parametrize("method", ["exflow", "moetuner"])
def test_a_method_of_others_makes_a_whole_plan_without_a_bound(method: str) -> None:
    trace = make_trace(tokens=150, layers=2, experts=6)
    made = plan(trace, PlanRequest(Topology(1, 2), objective="hops", method=method, time_limit=20))
    assert made.objective.lower_bound is None and made.objective.value == evaluate(made, trace).hops
    assert (made.holds().sum((1, 2)) == 6).all()


def test_packing_with_copies_uses_every_slot() -> None:
    counts = np.random.default_rng(0).integers(1, 200, (1, 3, 8))
    loads = LoadStatistics(counts, "m", (0, 1, 2), ("s",))
    request = PlanRequest(Topology(1, 4), objective="load", method="packed", time_limit=20)
    alone, copied = plan(loads, request), plan(loads, replace(request, slots_per_rank=3))
    assert (copied.physical_to_logical >= 0).all()
    assert evaluate_load(copied, loads, 0).load < evaluate_load(alone, loads, 0).load


def test_what_others_place_must_fit_the_memory(trace) -> None:
    topology = Topology(1, 2, memory_bytes=(9.0, 20.0), expert_bytes=1.0)
    found = "--method contiguous: 12 bytes of experts on rank 0, which has 9; --method auto keeps to the memory"
    with pytest.raises(InputError, match=found):
        plan(trace, PlanRequest(topology, method="contiguous", time_limit=5))
    assert plan(trace, PlanRequest(topology, time_limit=2), prove=False).holds()[:, :, 0].sum() <= 9


def test_an_interrupted_search_is_no_result_where_that_is_asked() -> None:
    def interrupt(*heard: object) -> None:
        signal.raise_signal(signal.SIGINT)

    request = PlanRequest(Topology(1, 4), objective="hops", time_limit=60)
    with pytest.raises(KeyboardInterrupt):
        plan(make_trace(experts=24, top_k=4), request, progress=interrupt, keep_on_interrupt=False)


# --- files ---


def test_a_file_system_without_locks_is_refused(tmp_path: Path, folder: Path, monkeypatch, capsys) -> None:
    def no_locks(*given: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(CoterieError, match=r"cannot be locked \(No locks available\); write --out to another file system"):
        Journal.begin(tmp_path / ".o.journal", {})
    assert main(["pack", str(folder), "--out", str(tmp_path / "packed")]) == 1
    assert "cannot be locked (No locks available); give --out on another file system" in capsys.readouterr().err


def test_experts_stacked_along_another_dimension_are_refused(tmp_path: Path) -> None:
    folder = make_model("gpt_oss", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("experts.down_proj"))
    tensors[name] = tensors[name].transpose(0, 1).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"expected \[8, \.\.\.\]: coterie reads experts stacked along the first dimension"):
        coterie.load(folder)


def test_prompts_in_another_encoding_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "p.txt").write_bytes("caf\u00e9".encode("latin-1"))
    line = ("generate", "coterie-tiny", "--prompts", tmp_path / "p.txt")
    assert f"{tmp_path / 'p.txt'}: byte 3: is not UTF-8" in refused(capsys, *line)


def test_a_scenario_that_no_file_can_hold_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "l.json").write_text('{"logical_count": [[1, 2]]}')
    (tmp_path / "p.txt").write_text("x")
    for line in (("import", tmp_path / "l.json"), ("trace", "coterie-tiny", "--prompts", tmp_path / "p.txt")):
        said = refused(capsys, *line, "--out", tmp_path / "t", "--scenario", "caf\udce9")
        assert "--scenario: found 'caf\\udce9', expected text that UTF-8 can write" in said
    assert not (tmp_path / "t").exists()


def test_what_cannot_be_recorded_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("coterie.moe.model.load", lambda *given, **named: pytest.fail("it was loaded"))
    (tmp_path / "p.txt").write_text("x")
    line = ("trace", "coterie-tiny", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "t")
    for more, message in (
        (("--phase", "decode"), "--phase: found 'decode' with 0 new tokens"),
        (("--max-new-tokens", "1"), "--max-new-tokens: found 1"),
        (("--max-tokens", "0"), "--max-tokens: found 0"),
        (("--batch-size", "0"), "--batch-size: found 0"),
    ):
        assert message in refused(capsys, *line, *more)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": 1}, "found ['other'], expected an SGLang recorder dump with records (of"),
        ({"records": []}, "records: found none, expected at least one forward pass"),
        ({"records": [{"positions": [0]}]}, "found ['positions'], expected an SGLang recorder dump with records (of"),
        (b"", "is not a readable .pt file (EOFError"),
    ],
)
def test_dumps_that_hold_nothing_are_refused(content: Any, message: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "d.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    said = refused(capsys, "import", path, "--num-experts", "4", "--out", tmp_path / "t")
    assert f"{path}: {message}" in said


def test_counts_of_another_number_of_experts_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "l.json").write_text('{"logical_count": [[1, 2]]}')
    said = refused(capsys, "import", tmp_path / "l.json", "--num-experts", "4", "--out", tmp_path / "t")
    assert "--num-experts: found 4, expected 2, as logical_count has" in said


def test_of_an_archive_only_the_arrays_of_a_recording_are_read(tmp_path: Path, capsys) -> None:
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "a.npz", expert_ids=make_trace().expert_ids, prompts=objects)
    assert main(["import", str(tmp_path / "a.npz"), "--num-experts", "8", "--out", str(tmp_path / "t")]) == 0
    assert (read_trace(tmp_path / "t").expert_ids == make_trace().expert_ids).all()
    np.savez(tmp_path / "b.npz", expert_ids=objects)
    said = refused(capsys, "import", tmp_path / "b.npz", "--out", tmp_path / "u")
    assert "expert_ids: cannot be read from the npz file" in said


def test_a_plan_whose_recording_may_not_be_read_is_drawn_alone(trace_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    made = plan(read_trace(trace_file), PlanRequest(Topology(1, 2), method="contiguous"), (trace_file,))
    coterie.save_plan(made, tmp_path / "p")
    monkeypatch.setattr(os, "access", lambda path, mode: path != trace_file)
    assert main(["show", str(tmp_path / "p"), "--out", str(tmp_path / "r.html")]) == 0
    assert "is not there (any more): drawing the plan alone" in capsys.readouterr().err


# --- memory ---


@given(st.floats(1, 1e12))
def test_what_is_asked_for_is_enough(count: float) -> None:
    assert parse_bytes(told(count, up=True)) >= count * (1 - 1e-12)


def test_what_a_job_that_does_not_fit_needs_is_told(monkeypatch, capsys) -> None:
    monkeypatch.setattr("coterie.launch.memory.free_bytes", lambda device: 1000)
    assert main(["generate", "coterie-tiny", "--prompt", "x", "--dry-run", "--json"]) == 2
    captured = capsys.readouterr()
    memory = json.loads(captured.out)["memory"]
    assert memory["fits"] is False and memory["largest"] > 4e6 and "memory: rank 0 needs" in captured.err
    monkeypatch.setattr("coterie.launch.cli.launched_rank", lambda: 1)  # whose standard output is nobody's
    assert main(["generate", "coterie-tiny", "--prompt", "x", "--dry-run", "--json"]) == 2
    assert capsys.readouterr().out == ""


# --- what was found before is not lost ---


def test_rows_that_were_measured_survive_any_error(monkeypatch, capsys) -> None:
    def rows(options: argparse.Namespace) -> Iterator[Row]:
        yield Row("a case", "time", "s", 1.0)
        raise ValueError("a library's")

    monkeypatch.setattr(bench_plan, "rows", rows)
    assert main(["bench", "plan", "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [row["case"] for row in found["rows"]] == ["a case"] and found["error"] == "a library's"
    assert "ValueError: a library's" in captured.err


def test_a_pipe_to_somebody_else_that_breaks_is_not_taken_for_ours(monkeypatch, capsys) -> None:
    def broken(options: argparse.Namespace) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(doctor, "doctor", broken)
    assert main(["doctor"]) == 1
    assert "coterie: BrokenPipeError" in capsys.readouterr().err


def test_text_that_the_terminal_cannot_show_does_not_end_the_run(tmp_path: Path) -> None:
    name = tmp_path / "caf\u00e9"
    save_trace(make_trace(tokens=20), name)
    coterie.save_plan(plan(make_trace(tokens=20), PlanRequest(Topology(1, 2), method="contiguous")), tmp_path / "p")
    command = [sys.executable, "-m", "coterie", "evaluate", str(tmp_path / "p"), str(name)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "caf\\xe9" in done.stdout, done.stderr


# --- the rest ---


def test_strays_are_dealt_out_where_nearly_all_are_wanted() -> None:
    trace = synth.make("aligned", tokens=50, layers=2, num_experts=16, groups=2, top_k=8, noise=1.0, seed=0)
    picks = np.sort(trace.expert_ids, 2)
    assert (picks[:, :, 1:] != picks[:, :, :-1]).all()


def test_doctor_says_what_is_missing_and_what_does_not_fit(monkeypatch, capsys) -> None:
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"scipy": None, "numpy": "1.26.0"}.get(name, known(name)))
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    status = {row["what"]: (row["status"], row["found"]) for row in found["findings"]}
    assert found["ok"] is False
    assert status["scipy"] == ("missing", "pip install -c constraints.txt scipy")
    assert status["numpy"] == ("missing", "1.26.0 does not fit: pip install -c constraints.txt numpy")


def test_doctor_says_what_is_slower_and_what_a_gpu_lacks(monkeypatch, capsys) -> None:
    import torch

    from coterie.offload import files, reader

    def told() -> dict[str, tuple[str, str]]:
        assert main(["doctor", "--json"]) == 0
        return {r["what"]: (r["status"], r["found"]) for r in json.loads(capsys.readouterr().out)["findings"]}

    def refused(self: object, *given: object) -> None:
        raise OSError(38, "Function not implemented")

    assert "kernels" not in told()
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "triton" else known(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert told()["kernels"] == ("missing", "experts on a GPU need triton: pip install triton")
    monkeypatch.setattr(reader, "Queue", refused)
    status, found = told()["experts from disk"]
    assert status == "optional" and "no asynchronous reads (Function not implemented)" in found
    monkeypatch.setattr(files.os, "O_DIRECT", os.O_DIRECTORY | os.O_CREAT)  # refused, as where a file system has none
    assert "has no O_DIRECT" in told()["experts from disk"][1]


@pytest.mark.parametrize("package", ["numpy", "scipy", "safetensors", "torch"])
def test_a_package_that_is_not_installed_is_named(package: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        absent = f"import sys; sys.modules[{package!r}] = None; sys.argv[1:] = {list(arguments)!r}"
        command = [sys.executable, "-c", f"{absent}; from coterie.__main__ import entry; entry()"]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})

    done = run("generate", "coterie-tiny", "--prompt", "a")
    assert done.returncode == 1 and done.stdout == "", done.stderr
    assert done.stderr.startswith(f"coterie: {package} is not installed: pip install"), done.stderr
    told = run("doctor", "--json")
    assert told.returncode == 0 and json.loads(told.stdout)["findings"], told.stderr


def test_two_models_are_told_apart_beside_a_recording_without_a_name(tmp_path: Path, capsys) -> None:
    for name in ("", "a", "b"):
        save_trace(make_trace(tokens=20, model=name), tmp_path / f"t{name}")
    traces = [tmp_path / f"t{name}" for name in ("", "a", "b")]
    line = ("plan", *traces, "--topology", "1x2", "--out", tmp_path / "p")
    assert f"{tmp_path / 'tb'}: model: found 'b', expected 'a'" in refused(capsys, *line)


def test_errors_about_a_trace_a_topology_or_a_plan_name_its_file(tmp_path: Path, capsys) -> None:
    trace, other, topology = tmp_path / "t", tmp_path / "o", tmp_path / "topology.json"
    save_trace(make_trace(tokens=20), trace)
    save_trace(make_trace(tokens=20, model="other"), other)
    made = plan(make_trace(tokens=20), PlanRequest(Topology(1, 2), method="contiguous"))
    coterie.save_plan(made, tmp_path / "p")
    assert f"{other}: model: " in refused(capsys, "show", tmp_path / "p", other, "--out", tmp_path / "r.html")
    for entry, said in (
        ('"expert_bytes": [1, 2]', "expert_bytes: found 2 entries"),
        ('"expert_bytes": 8, "memory_bytes": 1', "memory_bytes: "),
    ):
        topology.write_text(f'{{"nodes": 1, "ranks_per_node": 2, {entry}}}')
        line = ("plan", trace, "--topology", topology, "--out", tmp_path / "q")
        assert f"{topology}: topology: {said}" in refused(capsys, *line)
    value = json.loads((tmp_path / "p").read_text())
    for change, said in (
        ({"topology": value["topology"] | {"expert_bytes": [1, 2]}}, "topology: expert_bytes: found 2 entries"),
        ({"objective": {}}, "objective.name: found None"),
    ):
        (tmp_path / "d").write_text(json.dumps(value | change))
        assert f"{tmp_path / 'd'}: {said}" in refused(capsys, "evaluate", tmp_path / "d", trace)


def test_load_statistics_with_one_name_twice_are_refused() -> None:
    with pytest.raises(InputError, match="scenarios: found 'a' twice, expected names that differ"):
        LoadStatistics(np.ones((2, 1, 4), dtype=np.int64), "m", (0,), ("a", "a"))


@pytest.mark.parametrize("cache", [5, [[[1, 2]]], [[], []]])
def test_a_damaged_timeline_is_refused(cache: object, tmp_path: Path, capsys) -> None:
    sums = {"hosts": ["h"], "bytes": [[0]], "rows_by_layer": [[0]], "communication_seconds": [0], "experts_seconds": [0]}
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": [], "coterie": sums | {"cache": cache}}))
    line = ("show", tmp_path / "t.json", "--out", tmp_path / "r.html")
    assert f"{tmp_path / 't.json'}: coterie: found " in refused(capsys, *line)


def test_fp8_is_refused_on_a_gpu_without_such_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(InputError, match=r"--quantise: found fp8 on a GPU of compute capability 8\.6, expected int8 or int4"):
        rounding_of(torch.nn.Module(), "fp8", torch.device("cuda"))


def test_the_script_for_slurm_starts_a_task_each(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$OMP_NUM_THREADS" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "8", "PYTHON": "py"}
    script = ROOT / "launch" / "slurm.sh"
    done = subprocess.run(["bash", script, "MODEL", "--prompt", "a b"], env=environment, capture_output=True, text=True)
    assert done.stdout == "8 --kill-on-bad-exit=1 --cpus-per-task=8 py -m coterie generate MODEL --prompt a b\n", done.stderr
