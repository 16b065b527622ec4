"""One line under every launcher, with the text of one process; and every transport under its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from jobs import ended, finished

sys.path.insert(0, str(ROOT / "bench"))
from faults import Job, _listening, environment, free_port, launcher, wait_for

import coterie
from coterie.launch.assembly import START_SECONDS
from coterie.launch.distributed import same_on_all
from coterie.routing.errors import InputError

pytestmark = pytest.mark.processes
PROMPTS = ["The river", "A token", "def main(", "On the", "x = 1"]
IMPATIENT = (str(ROOT / "tests" / "impatient.py"),)
STRAY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def arguments(prompts: Path) -> list[str]:
    return ["generate", "coterie-tiny", "--prompts", str(prompts), "--max-new-tokens", "12", "--json"]


def on_ranks(prompts: Path) -> list[str]:
    """The strategy is named: which is fastest is not what these tests are about."""
    return [*arguments(prompts), "--strategy", "all_to_all"]


@pytest.fixture(scope="module")
def alone(prompts: Path) -> list[dict[str, Any]]:
    """What one process writes."""
    done = subprocess.run(
        [sys.executable, "-m", "coterie", *arguments(prompts)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["outputs"]


def installed(name: str, ranks: int = 4) -> list[str]:
    command = launcher(name, ranks)
    if not command:
        pytest.skip(f"{name} is not installed")
    return command


def result_of(out: str) -> dict[str, Any]:
    """The one object among what the launcher itself prints there."""
    (line,) = [line for line in out.splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.mark.parametrize("name", ["torchrun", "deepspeed", "mpirun"])
def test_four_processes_write_what_one_does_whoever_starts_them(name: str, prompts: Path, alone: list[dict[str, Any]]) -> None:
    result = result_of(ended(Job([*installed(name), *on_ranks(prompts)])))
    assert result["outputs"] == alone
    assert result["stats"]["ranks"] == 4


def by_hand(
    settings: list[dict[str, str]],
    command: list[str],
    folders: list[Path] | None = None,
    program: tuple[str, ...] = ("-m", "coterie"),
) -> list[tuple[int, str, str]]:
    """Start a process with each environment, as a launcher would; (exit code, out, err) of each."""
    clean = {k: v for k, v in environment().items() if k not in STRAY and not k.startswith(("SLURM_", "OMPI_", "PMI"))}
    started = [
        subprocess.Popen(
            [sys.executable, *program, *command], env={**clean, **own}, cwd=None if folders is None else folders[i],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i, own in enumerate(settings)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240) for process in started]
        return [(process.returncode, out, err) for process, (out, err) in zip(started, said, strict=True)]
    finally:
        for process in started:
            process.kill()


def slurm(rank: int, size: int = 4, per_node: int = 2) -> dict[str, str]:
    """As srun sets it for a step on two nodes, which here are one machine."""
    return {
        "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size), "SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_ID": "0",
        "SLURM_LOCALID": str(rank % per_node), "SLURM_STEP_NODELIST": "localhost,other[1-2]", "SLURM_JOB_ID": str(os.getpid()),
        "SLURMD_NODENAME": f"n{rank // per_node}", "SLURM_NTASKS_PER_NODE": str(per_node), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def test_tasks_of_srun_write_what_one_process_does(prompts: Path, alone: list[dict[str, Any]]) -> None:
    ended = by_hand([slurm(rank) for rank in range(4)], on_ranks(prompts))
    assert [code for code, _, _ in ended] == [0] * 4, ended
    result = json.loads(ended[0][1])
    assert result["outputs"] == alone
    assert all(out == "" for _, out, _ in ended[1:])


def test_tasks_of_srun_know_who_is_on_their_node(tmp_path: Path) -> None:
    program = (str(ROOT / "tests" / "transport_worker.py"), str(tmp_path / "r.json"), "")
    ended = by_hand([slurm(rank) for rank in range(4)], [], None, program)
    assert [code for code, _, _ in ended] == [0] * 4, ended
    found = json.loads((tmp_path / "r.json").read_text())
    assert found == {"name": "tcp", "torch": False, "per_node": 2, "size": 4}


def test_nodes_with_different_numbers_of_ranks_are_refused_by_name(prompts: Path) -> None:
    settings = [slurm(rank, 3) for rank in range(3)]
    ended = by_hand(settings, on_ranks(prompts))
    said = [err for _, _, err in ended if err]
    assert [code for code, _, _ in ended] == [2] * 3 and len(said) == 1, ended
    assert "found 1 on n1 and 2 on n0, expected as many on every node" in said[0]


def test_two_torchruns_are_two_nodes(prompts: Path, alone: list[dict[str, Any]]) -> None:
    where = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    program = installed("torchrun")[0]
    jobs = [Job([program, *where, "--node-rank", str(node), "-m", "coterie", *on_ranks(prompts)]) for node in range(2)]
    try:
        for job in jobs:
            assert finished(job).process.returncode == 0, job.err[-3000:]
        result = result_of(jobs[0].out)
        assert result["outputs"] == alone and jobs[1].out == ""
    finally:
        for job in jobs:
            job.end()


@pytest.mark.parametrize(("name", "transport"), [("mpirun", ""), ("torchrun", ""), ("torchrun", "gloo")])
def test_a_transport_brings_every_row_where_it_belongs(name: str, transport: str, tmp_path: Path) -> None:
    command = installed(name)
    worker = [str(ROOT / "tests" / "transport_worker.py"), str(tmp_path / "r.json"), transport]
    ended(Job([*command[: command.index("-m")], *worker]))
    expected = transport or {"mpirun": "mpi", "torchrun": "tcp"}[name]
    found = json.loads((tmp_path / "r.json").read_text())
    assert found == {"name": expected, "torch": expected == "gloo", "per_node": 4, "size": 4}


def test_gloo_can_be_had_under_mpirun(prompts: Path, alone: list[dict[str, Any]]) -> None:
    out = ended(Job([*installed("mpirun", 2), *on_ranks(prompts), "--transport", "gloo"]))
    assert result_of(out)["outputs"] == alone


def torch_environment(rank: int, size: int, port: int, address: str = "127.0.0.1") -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def complaints(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("coterie: ")]


def test_an_unreachable_master_is_named_with_what_to_check(prompts: Path) -> None:
    port = free_port()
    ((code, out, err),) = by_hand([torch_environment(1, 2, port)], [*on_ranks(prompts), "--timeout", "8"], None, IMPATIENT)
    assert code == 1 and out == ""
    (said,) = complaints(err)
    assert f"127.0.0.1:{port} cannot be reached from {socket.gethostname()} within 3 s" in said and "firewall" in said


def test_a_rank_that_never_starts_is_named(prompts: Path) -> None:
    ((code, _, err),) = by_hand([torch_environment(0, 2, free_port())], [*on_ranks(prompts), "--timeout", "8"], None, IMPATIENT)
    assert code == 1 and complaints(err) == ["coterie: rank 1 of 2 did not start within 3 s"]
    assert START_SECONDS == 25.0


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_ends_a_rank_that_waits_for_others(rank: int, prompts: Path) -> None:
    """Rank 0 keeps the store and waits for a seat; rank 1 waits for the store. With a long timeout they would wait long."""
    port = free_port()
    clean = {k: v for k, v in environment().items() if k not in STRAY}
    line = [sys.executable, "-m", "coterie", *on_ranks(prompts), "--timeout", "3600"]
    waiting = subprocess.Popen(line, env={**clean, **torch_environment(rank, 2, port)}, stderr=subprocess.PIPE, text=True)
    try:
        if rank == 0:
            assert wait_for(lambda: port in {p for p, _ in _listening()}, 120)
        else:
            assert wait_for(lambda: catches(waiting.pid, signal.SIGTERM), 120)
        waiting.send_signal(signal.SIGTERM)
        _, err = waiting.communicate(timeout=30)
        told = (
            "rank 1 of 2 had not started when SIGTERM came" if rank == 0 else f"ended by SIGTERM while 127.0.0.1:{port} could"
        )
        assert waiting.returncode == 1 and told in complaints(err)[0]
    finally:
        waiting.kill()


def status(pid: int) -> bytes:
    return Path(f"/proc/{pid}/status").read_bytes()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    (mask,) = [line.split()[1] for line in status(pid).splitlines() if line.startswith(b"SigCgt")]
    return bool(int(mask, 16) >> (number - 1) & 1)


def different(tmp_path: Path) -> list[Path]:
    """Two folders, for two ranks that read the same names in each."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    return folders


def both_refuse(folders: list[Path], *command: str) -> str:
    port = free_port()
    ended = by_hand([torch_environment(rank, 2, port) for rank in range(2)], ["generate", *command], folders)
    assert [code for code, _, _ in ended] == [2, 2], ended
    (said,) = [line for _, _, err in ended for line in complaints(err)]
    return said


def test_a_plan_that_differs_between_ranks_is_named(tmp_path: Path) -> None:
    from coterie.moe.families import inspect
    from coterie.moe.placement_map import contiguous_plan

    folders = different(tmp_path)
    plan = contiguous_plan(inspect("coterie-tiny")[0], 2)
    coterie.save_plan(plan, folders[0] / "plan.json")
    changed = json.loads((folders[0] / "plan.json").read_text()) | {"seed": 99}
    (folders[1] / "plan.json").write_text(json.dumps(changed))
    said = both_refuse(folders, "coterie-tiny", "--prompt", "x", "--plan", "plan.json")
    assert said.startswith("coterie: plan.json: differs between ranks: rank 1 (host ")


def test_a_model_that_differs_between_ranks_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from tiny_models import make_model

    folders = different(tmp_path)
    for folder in folders:
        make_model("mixtral", folder / "m")
    file = folders[1] / "m" / "model.safetensors"
    save_file({k: v + 1 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})  # same headers, other weights
    (tmp_path / "p.jsonl").write_text('{"token_ids": [5, 6]}')
    said = both_refuse(folders, "m", "--prompts", str(tmp_path / "p.jsonl"))
    assert said.startswith("coterie: m: the checkpoint: differs between ranks: rank 1 (host ")


def test_prompts_missing_on_one_rank_are_named(tmp_path: Path) -> None:
    folders = different(tmp_path)
    (folders[0] / "p.txt").write_text("x")
    said = both_refuse(folders, "coterie-tiny", "--prompts", "p.txt")
    assert said == "coterie: rank 1: p.txt: cannot be read: No such file or directory"


class Said:
    """A group whose ranks have said these things."""

    def __init__(self, *found: dict[str, str]) -> None:
        self.found = found

    def gather(self, value: Any) -> list[Any]:
        return [(f"host{rank}", found) for rank, found in enumerate(self.found)]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_alone_found_ends_every_rank(rank: int) -> None:
    group = Said({"model": "1", "new.json": "2", "the arguments": "3"}, {"model": "1", "the arguments": "4"})
    with pytest.raises(InputError, match=r"new.json: differs between ranks: rank 1 \(host host1\) found None"):
        same_on_all(group, group.found[rank])  # type: ignore[arg-type]


def test_every_launcher_is_there_in_ci() -> None:
    if not os.environ.get("COTERIE_CI"):
        pytest.skip("only CI promises all launchers")
    assert all(launcher(name) for name in ("torchrun", "deepspeed", "mpirun"))
    assert shutil.which("mpirun", path=environment()["PATH"])
