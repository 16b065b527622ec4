"""Kill, stop or delay a rank of a running job at a random step, and see what the others do.

python bench/faults.py --runs 50 --out bench/results/faults.json   # writes the table too; about half an hour on two cores
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANKS, TIMEOUT, SLACK = 4, 5.0, 5.0
TOKENS, FIRST, LAST = 200, 5, 120  # new tokens of a run; the fault comes after that many characters of its text
MARK = "COTERIE_FAULT_RUN"
START_SECONDS, END_SECONDS = 180.0, 120.0
CLOSING_SECONDS = 2.0  # for the system, to close the sockets of processes that are gone
KINDS = ("kill", "stop", "delay", "late")
RESTART = "restart"  # SIGKILL under torchrun --max-restarts, with --resume
PROMPTS, RESTARTS = 60, 3


def launcher(name: str, ranks: int = RANKS, restarts: int = 0) -> list[str]:
    """The command line of a launcher, up to the module's name; empty if it is not installed. restarts: torchrun's."""
    beside = Path(sys.executable).parent
    found = shutil.which(name, path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        return []
    if name == "torchrun":
        again = ["--max-restarts", str(restarts)] if restarts else []
        return [found, "--standalone", "--nproc-per-node", str(ranks), *again, "-m", "coterie"]
    if name == "deepspeed":
        return [found, "--num_accelerators", str(ranks), "--master_port", str(free_port()), "--module", "coterie"]
    return [found, "--map-by", ":OVERSUBSCRIBE", "-n", str(ranks), sys.executable, "-m", "coterie"]


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """For a job on this machine's CPU, as a test wants it."""
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more,
    }  # fmt: skip


class Job:
    """A launched job whose processes can be found again, whoever their parent is by then."""

    def __init__(self, command: Sequence[str], **more: str) -> None:
        self.token = secrets.token_hex(8)
        self.folder = Path(tempfile.mkdtemp(prefix="coterie-fault-"))
        with (self.folder / "out").open("wb") as out, (self.folder / "err").open("wb") as err:
            self.process = subprocess.Popen(
                command, env=environment(**{MARK: self.token}, **more), stdout=out, stderr=err, start_new_session=True
            )

    @property
    def out(self) -> str:
        """Standard output so far, without what deepspeed's launcher says there."""
        lines = (self.folder / "out").read_text(errors="replace").splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[20"))

    @property
    def err(self) -> str:
        """Standard error so far."""
        return (self.folder / "err").read_text(errors="replace")

    def processes(self) -> dict[int, dict[str, str]]:
        """Every process of the job, with its environment, that is not a zombie."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _alive(int(entry.name)):
                variables = _environ(entry)
                if variables.get(MARK) == self.token:
                    found[int(entry.name)] = variables
        return found

    def ranks(self) -> dict[int, int]:
        """The process of each rank."""
        found = {}
        for pid, variables in self.processes().items():
            rank = variables.get("RANK", variables.get("OMPI_COMM_WORLD_RANK", ""))
            if rank.isdigit() and b"generate" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[int(rank)] = pid
        return found

    def ports(self) -> set[tuple[int, str]]:
        """Ports on which a process of the job listens, each with the socket: others may take the number later."""
        inodes = {inode for pid in self.processes() for inode in _sockets(pid)}
        return {(port, inode) for port, inode in _listening() if inode in inodes}

    def end(self) -> None:
        """Kill what is left of it and remove its files."""
        for pid in self.processes():
            _signal(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _environ(entry: Path) -> dict[str, str]:
    try:
        items = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in items if "=" in item)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _sockets(pid: int) -> set[str]:
    try:
        links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return set()
    return {link[8:-1] for link in links if link.startswith("socket:")}


def _listening() -> set[tuple[int, str]]:
    """Port and inode of every listening TCP socket."""
    found = set()
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text().splitlines()[1:] if Path(file).is_file() else []:
            fields = line.split()
            if fields[3] == "0A":
                found.add((int(fields[1].rpartition(":")[2], 16), fields[9]))
    return found


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def wait_for(what: Callable[[], bool], seconds: float) -> bool:
    """Whether it comes true in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if what():
            return True
        time.sleep(0.05)
    return what()


@dataclass(frozen=True)
class Fault:
    """What is done. after: characters of text, or finished prompts for a restart; delay: seconds until SIGCONT, 0 for never."""

    seed: int
    launcher: str
    kind: str
    rank: int
    after: int
    delay: float


@dataclass(frozen=True)
class Outcome:
    """What came of it. survivors: seconds from the fault to the last other rank's exit; gone: until no process was left."""

    fault: Fault
    survivors: float
    gone: float
    exit_code: int
    named: bool
    processes_left: int
    ports_left: int
    text_equal: bool | None
    message: str

    @property
    def ok(self) -> bool:
        """Whether all is as promised."""
        clean = not self.processes_left and not self.ports_left
        if self.fault.kind in ("delay", RESTART):
            return clean and self.exit_code == 0 and bool(self.text_equal)
        return clean and self.exit_code != 0 and self.named and self.survivors <= TIMEOUT + SLACK


def draw(seed: int, launchers: Sequence[str], kinds: Sequence[str] = KINDS) -> Fault:
    """The fault of a seed: launchers and kinds take turns, every fifth is a restart, the rest is drawn."""
    rng = random.Random(seed)
    if seed % 5 == 4:
        return Fault(seed, "torchrun", RESTART, rng.randrange(RANKS), rng.randint(1, PROMPTS * 2 // 3), 0.0)
    kind = kinds[seed // len(launchers) % len(kinds)]
    delay = {"delay": rng.uniform(0.3, TIMEOUT - 2), "late": TIMEOUT + 8}.get(kind, 0.0)
    return Fault(seed, launchers[seed % len(launchers)], kind, rng.randrange(RANKS), rng.randint(FIRST, LAST), delay)


def generate(tokens: int = TOKENS) -> list[str]:
    """The arguments of every run."""
    return ["generate", "coterie-tiny", "--prompt", "The river", "--max-new-tokens", str(tokens), "--timeout", f"{TIMEOUT:g}"]


def on_ranks() -> list[str]:
    """The arguments of a job of several processes; how to choose a strategy is not the question."""
    return [*generate(), "--strategy", "all_to_all"]


def offline(folder: Path, out: Path) -> list[str]:
    """The arguments of a run over many prompts that can be resumed."""
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        lines = [{"prompt": f"{'The river ' * (i % 5)}{i}", "id": i, "max_new_tokens": 10 + 7 * i % 40} for i in range(PROMPTS)]
        prompts.write_text("".join(json.dumps(one) + "\n" for one in lines))
    more = ["--batch-size", "3", "--batch-invariant", "--timeout", f"{TIMEOUT:g}"]
    return ["generate", "coterie-tiny", "--prompts", str(prompts), "--out", str(out), "--resume", *more]


def undisturbed() -> str:
    """The text of one process."""
    command = [sys.executable, "-m", "coterie", *generate()]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout.strip()


def restart(fault: Fault, expected: bytes) -> Outcome:
    """Kill a rank of a job that torchrun starts again; the output must be that of an undisturbed one, to the byte.

    Each attempt may choose another strategy.
    """
    with tempfile.TemporaryDirectory(prefix="coterie-fault-") as name:
        out, journal = Path(name) / "out.jsonl", Path(name) / ".out.jsonl.journal"
        job = Job([*launcher("torchrun", restarts=RESTARTS), *offline(Path(name), out)])

        def finished() -> int:  # behind the header
            return journal.read_bytes().count(b"\n") - 1 if journal.is_file() else 0

        try:
            if not wait_for(lambda: finished() >= fault.after or job.process.poll() is not None, START_SECONDS):
                raise RuntimeError(f"{fault}: too few prompts within {START_SECONDS:.0f} s: {job.err[-2000:]}")
            struck = _strike(job, fault, job.ranks(), job.ports(), "")
            same = out.is_file() and out.read_bytes() == expected
            return replace(struck, text_equal=same)
        finally:
            job.end()


def undisturbed_file() -> bytes:
    """What one process writes for `offline`."""
    with tempfile.TemporaryDirectory(prefix="coterie-fault-") as name:
        out = Path(name) / "out.jsonl"
        command = [sys.executable, "-m", "coterie", *offline(Path(name), out)]
        subprocess.run(command, env=environment(), capture_output=True, check=True)
        return out.read_bytes()


def run(fault: Fault, expected: str) -> Outcome:
    """Start a job, do it, watch."""
    job = Job([*launcher(fault.launcher), *on_ranks()])
    try:
        if not wait_for(lambda: len(job.out) >= fault.after or job.process.poll() is not None, START_SECONDS):
            raise RuntimeError(f"{fault}: no text within {START_SECONDS:.0f} s: {job.err[-2000:]}")
        pids, ports = job.ranks(), job.ports()
        if len(pids) != RANKS:
            raise RuntimeError(f"{fault}: found ranks {sorted(pids)}: {job.err[-2000:]}")
        return _strike(job, fault, pids, ports, expected)
    finally:
        job.end()


def _strike(job: Job, fault: Fault, pids: dict[int, int], ports: set[tuple[int, str]], expected: str) -> Outcome:
    began = time.monotonic()
    _signal(pids[fault.rank], signal.SIGKILL if fault.kind in ("kill", RESTART) else signal.SIGSTOP)
    if fault.kind == "delay":
        time.sleep(fault.delay)
        _signal(pids[fault.rank], signal.SIGCONT)
    others = [pid for rank, pid in pids.items() if rank != fault.rank]
    wait_for(lambda: not any(_alive(pid) for pid in others), END_SECONDS)
    survivors = time.monotonic() - began
    if fault.kind == "late":
        time.sleep(max(0.0, fault.delay - survivors))
        _signal(pids[fault.rank], signal.SIGCONT)
    wait_for(lambda: job.process.poll() is not None and not job.processes(), END_SECONDS)
    gone = time.monotonic() - began
    said = [line for line in job.err.splitlines() if line.startswith("coterie: ")]
    named = any(f"rank {fault.rank} (host " in line for line in said)
    equal = job.out.strip().endswith(expected) if fault.kind == "delay" else None
    wait_for(lambda: not ports & _listening(), CLOSING_SECONDS)
    left = ports & _listening()
    code = job.process.poll()
    return Outcome(
        fault,
        survivors,
        gone,
        -1 if code is None else code,
        named,
        len(job.processes()),
        len(left),
        equal,
        said[0] if said else "",
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """One row per launcher and kind, for docs/running.md."""
    rows = ["| launcher | fault | runs | as promised | survivors' exit, s (median, worst) | nothing left after, s (worst) |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for name in dict.fromkeys(o.fault.launcher for o in outcomes):
        for kind in (*KINDS, RESTART):
            found = [o for o in outcomes if (o.fault.launcher, o.fault.kind) == (name, kind)]
            if found:
                exits = [o.survivors for o in found]
                times = "" if kind in ("delay", RESTART) else f"{statistics.median(exits):.1f}, {max(exits):.1f}"
                after = "" if kind in ("delay", RESTART) else f"{max(o.gone for o in found):.1f}"
                rows.append(f"| {name} | {kind} | {len(found)} | {sum(o.ok for o in found)} | {times} | {after} |")
    return "\n".join(rows)


def finished(file: Path) -> list[Outcome]:
    """The runs that an earlier call has written."""
    runs = json.loads(file.read_text())["runs"] if file.is_file() else []
    return [Outcome(**{k: Fault(**v) if k == "fault" else v for k, v in run.items() if k != "ok"}) for run in runs]


def main() -> int:
    """Run the faults; writes one JSON object and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--launchers", nargs="+", default=["torchrun", "deepspeed", "mpirun"])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "faults.json")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are in --out, do the others")
    options = parser.parse_args()
    there = [name for name in options.launchers if launcher(name)]
    outcomes = finished(options.out) if options.resume else []
    done, text, file = {o.fault.seed for o in outcomes}, undisturbed(), undisturbed_file()
    for seed in sorted(set(range(options.runs)) - done):
        fault = draw(seed, there)
        outcomes.append(restart(fault, file) if fault.kind == RESTART else run(fault, text))
        print(line(outcomes[-1]), flush=True)
        result = {"timeout": TIMEOUT, "ranks": RANKS, "runs": [{**asdict(o), "ok": o.ok} for o in outcomes]}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(outcomes))
    return 0 if all(o.ok for o in outcomes) else 1


def line(o: Outcome) -> str:
    """One run in a line."""
    done = f"{o.fault.seed}: {o.fault.launcher} {o.fault.kind} rank {o.fault.rank} after {o.fault.after} characters"
    how = f"survivors {o.survivors:.1f} s, nothing left {o.gone:.1f} s, exit {o.exit_code}"
    return f"{done}: {'ok' if o.ok else 'NOT OK'}, {how}: {o.message[:160]}"


if __name__ == "__main__":
    sys.exit(main())
