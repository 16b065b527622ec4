"""The processes of `coterie bench cluster`: started once per layout, told what to load and measure, ended with it."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import coterie
from coterie.launch.cluster_sides import Side
from coterie.launch.netns import DEVICE, Network
from coterie.routing.errors import CoterieError

PROGRAM = ("-m", "coterie.launch.cluster_worker")
PORT = 29577  # of the rendezvous, in namespaces of our own
ANSWER_SECONDS = 900.0
POLL_SECONDS = 1.0
LOG_LINES = 6


class Workers:
    """`cluster_worker` on every rank. Rank r runs on node r // ranks_per_node."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]], logs: Sequence[Path]) -> None:
        self.processes, self.logs = processes, logs
        self.answers: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        stream = self.processes[0].stdout
        assert stream is not None
        for line in stream:
            if line.startswith("{"):  # libraries print, too
                self.answers.put(json.loads(line))

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give every rank a command; rank 0's answer. Raises CoterieError if a process ends, or none answers in time."""
        line = json.dumps({"do": do, **arguments}) + "\n"
        for process in self.processes:
            self._tell(process, line)
        ends = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < ends:
            try:
                return self.answers.get(timeout=POLL_SECONDS)
            except queue.Empty:
                self._check_alive()
        last = "; ".join(f"rank {rank}: {self._last(rank)}" for rank in range(len(self.logs)))
        raise CoterieError(f"bench cluster: no answer to {do!r} within {ANSWER_SECONDS:g} s; last said {last[-600:]}")

    def _tell(self, process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except OSError as error:
            self._check_alive()
            raise CoterieError(f"bench cluster: a process takes no commands any more: {error.strerror}") from error

    def _check_alive(self) -> None:
        for rank, process in enumerate(self.processes):
            if process.poll() is not None:
                last = self._last(rank)
                raise CoterieError(f"bench cluster: rank {rank} ended with exit code {process.returncode}: {last[-600:]}")

    def _last(self, rank: int) -> str:
        return " / ".join(self.logs[rank].read_text(errors="replace").splitlines()[-LOG_LINES:])

    def load(self, case: Path, model: str, sides: Sequence[Side]) -> dict[str, Any]:
        """As `cluster_worker` states it."""
        return self.ask("load", case=str(case), model=model, sides=[asdict(side) for side in sides])


@contextmanager
def workers(network: Network, ranks_per_node: int, folder: Path, program: Sequence[str] = PROGRAM) -> Iterator[Workers]:
    """One process per rank of the network, logs in `folder`; all are gone at the end. program: what Python runs."""
    started: list[subprocess.Popen[str]] = []
    size = len(network.nodes) * ranks_per_node
    logs = [folder / f"rank-{rank}.log" for rank in range(size)]
    try:
        for rank in range(size):
            node = network.nodes[rank // ranks_per_node]
            environment = _environment(network, rank, size, rank % ranks_per_node)
            with logs[rank].open("w") as log:
                options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE if rank == 0 else log, "stderr": log}
                started.append(node.start([sys.executable, *program], env=environment, text=True, **options))
        yield Workers(started, logs)
    finally:
        for process in started:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    streams: tuple[IO[str] | None, ...] = (process.stdin, process.stdout)
    for stream in streams:
        if stream is not None:
            try:
                stream.close()
            except OSError:  # what was not read by the dead process
                continue


def _environment(network: Network, rank: int, size: int, local_rank: int) -> dict[str, str]:
    """As torchrun would set it."""
    nodes, local_size = network.nodes, size // len(network.nodes)
    root = str(Path(coterie.__file__).resolve().parent.parent)
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local_size), "MASTER_ADDR": nodes[0].address,
        "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
