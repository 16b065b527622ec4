"""Who started this process, as the launcher's environment tells it: nothing is opened and nobody is asked."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from coterie.routing.errors import InputError

MPI_NAMES = (  # rank, size, rank on the node
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
FIRST_PORT, PORTS = 10_000, 20_000  # for Slurm jobs: below the ports that systems hand out themselves


@dataclass(frozen=True)
class Launch:
    """How this process was started. launcher: `alone`, `torchrun` (also deepspeed and others that set RANK), `mpirun`, `srun`.

    node: ranks with the same one share a machine. address, port: where the ranks meet; empty under mpirun, which tells them
    itself. agent_store: torchrun's agent listens there, not rank 0.
    """

    launcher: str = "alone"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    node: str = ""
    address: str = ""
    port: int = 0
    agent_store: bool = False


def find_launch(environment: Mapping[str, str]) -> Launch:
    """How this process was started. Raises InputError if the environment says so only in part or contradicts itself.

    An allocation's shell (`salloc`, the script of `sbatch`) stands alone: only a step of `srun` is a job of several.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _from_torchrun(environment)
    for rank, size, local in MPI_NAMES:
        if rank in environment and size in environment and not (rank == "PMI_RANK" and _is_step(environment)):
            found = Launch("mpirun", *_place(environment, rank, size), _number(environment, local, 0), socket.gethostname())
            return found if found.size > 1 else Launch()
    if _is_step(environment):
        return _from_slurm(environment)
    if environment.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"WORLD_SIZE: found {environment['WORLD_SIZE']} without RANK, expected both (torchrun sets them)")
    return Launch()


def _from_torchrun(environment: Mapping[str, str]) -> Launch:
    rank, size = _place(environment, "RANK", "WORLD_SIZE")
    if size == 1:
        return Launch()
    if not environment.get("MASTER_ADDR") or "MASTER_PORT" not in environment:
        raise InputError("MASTER_ADDR, MASTER_PORT: not set beside RANK, expected the address of rank 0's machine and a port")
    group = environment.get("GROUP_RANK", environment.get("CROSS_RANK"))  # torchrun's and deepspeed's number of the node
    if group is None and "LOCAL_WORLD_SIZE" in environment:
        group = str(rank // max(1, _number(environment, "LOCAL_WORLD_SIZE")))
    node = socket.gethostname() if group is None else f"{socket.gethostname()}, node {group}"
    local, port = _number(environment, "LOCAL_RANK", 0), _number(environment, "MASTER_PORT")
    agent_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch("torchrun", rank, size, local, node, environment["MASTER_ADDR"], port, agent_store)


def _is_step(environment: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in environment and ("SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment)


def _from_slurm(environment: Mapping[str, str]) -> Launch:
    """A step's own number of tasks goes before SLURM_NTASKS, which in an interactive step is the whole allocation's."""
    tasks = next((n for n in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if n in environment), None)
    if tasks is None:
        raise InputError("SLURM_NTASKS: not set in a step of srun, expected its number of tasks")
    rank, size = _place(environment, "SLURM_PROCID", tasks)
    if size == 1:
        return Launch()
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    address = environment.get("MASTER_ADDR") or (expand_nodes(nodes) or ("",))[0]
    if not address:
        raise InputError("SLURM_STEP_NODELIST: not set, expected the step's nodes; or set MASTER_ADDR to the first one")
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", "0"))
    job = _number(environment, "SLURM_JOB_ID", _number(environment, "SLURM_JOBID", 0))
    port = _number(environment, "MASTER_PORT", slurm_port(job, int(step) if step.isdigit() else 0))
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    return Launch("srun", rank, size, _number(environment, "SLURM_LOCALID", 0), node, address, port)


def slurm_port(job: int, step: int) -> int:
    """A port that all tasks of a step work out alike, and neighbouring jobs and steps differently."""
    return FIRST_PORT + (job * 101 + step) % PORTS


def _place(environment: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    rank, size = _number(environment, rank_name), _number(environment, size_name)
    if not 0 <= rank < size:
        raise InputError(f"{rank_name}: found {rank} with {size_name} {size}, expected 0 to {size - 1}")
    return rank, size


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise InputError(f"{name}: found {text!r} in the environment, expected a number")
    return int(text)


def expand_nodes(text: str) -> tuple[str, ...]:
    """The names in a list as Slurm writes it: `a[1-3,07]b,c` is a1b, a2b, a3b, a07b, c. Raises InputError if it is none."""
    return tuple(name for part in _split_outside(text) for name in _expand(part, text))


def _split_outside(text: str) -> list[str]:
    """At commas that are not in brackets."""
    return [part for part in re.split(r",(?![^\[]*\])", text) if part]


def _expand(part: str, whole: str) -> list[str]:
    before, bracket, rest = part.partition("[")
    if not bracket:
        if "]" in part:
            raise InputError(f"SLURM_STEP_NODELIST: found {whole!r}, expected names like node[1-3,7]")
        return [part]
    inside, closing, after = rest.partition("]")
    numbers = [n for piece in inside.split(",") for n in _range(piece, whole)]
    if not closing:
        raise InputError(f"SLURM_STEP_NODELIST: found {whole!r}, expected names like node[1-3,7]")
    return [before + number + tail for number in numbers for tail in _expand(after, whole)]


def _range(piece: str, whole: str) -> list[str]:
    first, dash, last = piece.partition("-")
    last = last if dash else first
    if not (first.isdigit() and last.isdigit()) or int(first) > int(last):
        raise InputError(f"SLURM_STEP_NODELIST: found {whole!r}, expected names like node[1-3,7]")
    return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
