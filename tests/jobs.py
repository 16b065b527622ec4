"""Jobs of several processes, for tests that start them: what `bench/faults.py` starts, waited for, and nothing of it left."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
from faults import Job, wait_for


def finished(job: Job, seconds: float = 240) -> Job:
    assert wait_for(lambda: job.process.poll() is not None, seconds), job.err[-3000:]
    return job


def ended(job: Job) -> str:
    """What it printed, once it has ended well; nothing of it is left, whatever happens."""
    try:
        assert finished(job).process.returncode == 0, job.err[-3000:]
        assert wait_for(lambda: not job.processes(), 30)
        return job.out
    finally:
        job.end()


def torchrun(ranks: int, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Nothing of it is left, whatever happens."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *arguments]
    job = Job(command)
    try:
        assert wait_for(lambda: job.process.poll() is not None, timeout), job.err[-4000:]
        return subprocess.CompletedProcess(command, job.process.returncode, job.out, job.err)
    finally:
        job.end()


def until_finished(path: Path, entries: int, process: subprocess.Popen[str]) -> None:
    """Until so many prompts are in the journal."""
    while not path.exists() or path.read_bytes().count(b"\n") <= entries:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
