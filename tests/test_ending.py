"""How a run ends that is asked to, or that cannot go on: in a line or two, and with nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_trace
from safetensors.torch import load_file, save_file
from tiny_models import make_model

import coterie
from coterie.launch import planning
from coterie.launch.cli import main
from coterie.moe.generate import Sampling
from coterie.placement.plan import read_plan
from coterie.placement.spread import world
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.trace import save_trace


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "coterie", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def until(condition, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_recording_that_is_ended_leaves_no_pieces(tmp_path: Path) -> None:
    """SIGTERM, as schedulers and `timeout` send it, while columns are being written."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("def read(path):\n" * 400)
    out = tmp_path / "t.safetensors"
    process = started(
        "trace", "coterie-tiny", "--prompts", prompts, "--out", out, "--max-new-tokens", "40", "--batch-size", "2"
    )
    pieces = lambda: list(tmp_path.glob(".t.safetensors.*.part"))  # noqa: E731
    until(lambda: any(piece.stat().st_size for piece in pieces()), process)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in said and "interrupted; no output was written" in said
    assert not pieces() and not out.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_of_a_plan_end_with_it_in_silence(tmp_path: Path, number: signal.Signals) -> None:
    save_trace(make_trace(tokens=3000, layers=6, experts=32, top_k=4), tmp_path / "t")
    process = started(
        "plan", tmp_path / "t", "--topology", "1x8", "--out", tmp_path / "p", "--workers", "3", "--time-limit", "60"
    )

    def workers() -> list[int]:
        found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        return [
            int(line.split()[0]) for line in found.splitlines() if "placement.spread" in line and f" {process.pid} " in line
        ]

    until(lambda: len(workers()) >= 2, process)
    running = workers()
    time.sleep(0.5)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said, said
    if number == signal.SIGTERM:  # as after ctrl-C: the best so far
        assert process.returncode == 0 and read_plan(tmp_path / "p").ranks == 8
    limit = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in running):
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_interrupted_while_it_starts_it_says_so() -> None:
    code = """
import importlib.abc, sys
class Interrupted(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "coterie.launch.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from coterie.__main__ import entry
entry()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "coterie: interrupted; no output was written\n")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second layer computes nan."""
    folder = make_model("mixtral", tmp_path_factory.mktemp("model"))
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "layers.1" in n and "experts" in n)
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)])
def test_no_text_is_made_up_of_what_is_no_number(broken: Path, sampling: Sampling) -> None:
    with pytest.raises(CoterieError, match=r"prompt 0 .*: after 0 new tokens the model's logits are no numbers"):
        coterie.load(broken, dtype="float32").generate([coterie.Prompt(token_ids=(3, 4, 5, 6, 7, 8))], 4, sampling)


def test_no_routing_is_recorded_of_what_is_no_number(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match="the router of layer 2, of those with experts, gives weights that are no numbers"):
        coterie.load(broken, dtype="float32").record([coterie.Prompt(token_ids=(3, 4, 5, 6, 7, 8))], tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_what_was_recorded_is_what_the_trace_says(tmp_path: Path) -> None:
    """--max-tokens reached within the prompt: nothing that was generated is in it."""
    folder = make_model("mixtral", tmp_path / "model")
    asked = [coterie.Prompt(token_ids=(3, 4, 5, 6, 7, 8))]
    for tokens, phase in ((4, "prefill"), (8, "mixed")):
        coterie.load(folder).record(asked, tmp_path / "t", max_new_tokens=6, max_tokens=tokens)
        assert coterie.read_trace(tmp_path / "t").phase == phase


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_number_of_processes_that_is_none_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "many")
    with pytest.raises(InputError, match=f"{name}: found 'many', expected the number of processes"):
        world()


def test_more_workers_than_cores_can_carry_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_trace(make_trace(tokens=50), tmp_path / "t")
    assert main(["plan", str(tmp_path / "t"), "--topology", "1x2", "--out", str(tmp_path / "p"), "--workers", "100000"]) == 2
    assert "--workers: found 100000, expected 1 to " in capsys.readouterr().err


def test_warnings_are_a_line(tmp_path: Path) -> None:
    folder = make_model("mixtral", tmp_path / "model", max_position_embeddings=8)
    (tmp_path / "p.jsonl").write_text(json.dumps({"token_ids": [5, 6, 7]}) + "\n")
    process = started("generate", folder, "--prompts", tmp_path / "p.jsonl", "--max-new-tokens", "8", "--json")
    _, said = process.communicate(timeout=120)
    (line,) = [line for line in said.splitlines() if "max_position_embeddings" in line]
    assert line.startswith("coterie: warning: prompt 0") and ".py" not in said


def test_a_plan_for_more_experts_than_memory_holds_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "system_bytes", lambda: 10**11)
    save_trace(replace(make_trace(tokens=50, layers=40), num_experts=32767), tmp_path / "t")
    assert main(["plan", str(tmp_path / "t"), "--topology", "1x2", "--out", str(tmp_path / "p")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 't'}: num_experts: found 32767 in 40 layers, expected fewer (the largest id is 7)" in said
    assert "transitions take 335 GB" in said and not (tmp_path / "p").exists()
