"""Starting and ending a job of several processes, whoever launched them.

torchrun and deepspeed set RANK, WORLD_SIZE and the master's address; under mpirun they come from mpi4py.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

from coterie.routing.errors import CoterieError, InputError

if TYPE_CHECKING:
    from coterie.moe.collectives import Group

TIMEOUT = timedelta(minutes=5)
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
T = TypeVar("T")


def launched_rank() -> int:
    """This process's rank as the launcher's environment tells it, 0 if it stands alone."""
    if launched_size() == 1:
        return 0
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def launched_size() -> int:
    """How many processes were launched together, 1 if this one stands alone."""
    for name in ("WORLD_SIZE", *MPI_SIZES):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


@contextmanager
def job() -> Iterator[Group]:
    """The group of all launched processes, taken down at the end; a group of one if this process stands alone."""
    from coterie.moe.collectives import Group

    if launched_size() == 1:
        yield Group()
        return
    import torch
    import torch.distributed as dist

    if "RANK" not in os.environ:
        _environment_from_mpi()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Group.current()
        dist.barrier()  # nobody takes the group down while another rank still uses it
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process. In a job of several it skips the interpreter's teardown, in which gloo's threads at times abort.

    A failure is not waited for: mpirun then ends the other processes.
    """
    if launched_size() > 1:
        if code == 0 and "mpi4py.MPI" in sys.modules:
            sys.modules["mpi4py.MPI"].Finalize()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _environment_from_mpi() -> None:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise InputError("mpirun: mpi4py is not installed, expected it for MPI jobs: pip install 'coterie[mpi]'") from error
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = None
    if world.rank == 0:
        host = "127.0.0.1" if local.size == world.size else socket.gethostname()
        with socket.socket() as probe:
            probe.bind(("", 0))
            address = (host, str(probe.getsockname()[1]))
    host, port = world.bcast(address)
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(local.rank), MASTER_ADDR=host, MASTER_PORT=port
    )


def together(group: Group, work: Callable[[], T]) -> T:
    """Run `work`, which must not communicate, on every rank; all ranks raise the first failing rank's error, if any fails."""
    result, failure = None, None
    try:
        result = work()
    except CoterieError as error:
        failure = (type(error), str(error))
    except Exception as error:
        if group.size == 1:
            raise
        failure = (CoterieError, f"{type(error).__name__}: {error}")
    failures = group.gather(failure)
    for rank, found in enumerate(failures):
        if found is not None:
            kind, message = found
            where = f"rank {rank}: " if group.size > 1 and any(f is None for f in failures) else ""
            raise kind(where + message)
    return result  # type: ignore[return-value]
