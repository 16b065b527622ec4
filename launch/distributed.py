"""Starting and ending a job of several processes, whoever launched them.

torchrun, deepspeed and srun tell in the environment where the ranks meet; under mpirun they find each other through MPI.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from coterie.launch.launched import Launch, find_launch
from coterie.placement.spread import mpi_world
from coterie.routing.errors import DEFECT, CoterieError, InputError, RankLostError, first_line

if TYPE_CHECKING:
    from coterie.launch.assembly import Assembly
    from coterie.moe.collectives import Group
    from coterie.moe.transports import Transport
    from coterie.moe.watch import Watch

TIMEOUT_SECONDS = 60.0
MOST_SECONDS = 1e6  # that a rank may be silent: twelve days; more overflows on the way to the system
SPOKEN_SECONDS = 2.0
TRANSPORTS = ("nccl", "mpi", "tcp", "gloo")
FAILED = 1
T = TypeVar("T")


def launched_rank() -> int:
    """This process's rank as the launcher's environment tells it, 0 if it stands alone."""
    return _launch_if_clear().rank


def launched_size() -> int:
    """How many processes were launched together, 1 if this one stands alone."""
    return _launch_if_clear().size


def _launch_if_clear() -> Launch:
    try:
        return find_launch(os.environ)
    except InputError:  # `job` and `check_launch` raise it
        return Launch()


def complain(message: str, known_to_all: bool = False) -> None:
    """One message for all ranks where all fail alike; where one fails alone, it says so itself."""
    rank = launched_rank()
    if rank and known_to_all:
        time.sleep(SPOKEN_SECONDS)  # rank 0 says it, unless its launcher ends it first because another rank has ended
        return
    sys.stderr.write(f"coterie: {f'rank {rank}: ' if rank else ''}{message}\n")  # in one piece: other ranks write there too
    sys.stderr.flush()


def choose_transport(launch: Launch, gpus: int, wish: str | None = None) -> str:
    """`nccl` where there are GPUs, else `mpi` under mpirun, else `tcp`; or the wish. Raises InputError if that cannot be."""
    if wish is None:
        return "nccl" if gpus else "mpi" if launch.launcher == "mpirun" else "tcp"
    if wish not in TRANSPORTS:
        raise InputError(f"--transport: found {wish!r}, expected one of {', '.join(TRANSPORTS)}")
    if wish == "nccl" and not gpus:
        raise InputError("--transport: found nccl without a GPU, expected tcp, gloo or mpi").known(alone=True)
    if wish == "mpi" and launch.launcher not in ("mpirun", "srun"):
        raise InputError(f"--transport: found mpi under {launch.launcher}, expected mpirun or srun, or tcp")
    if wish != "nccl" and gpus:
        message = f"--transport: found {wish} with a GPU, expected nccl; CUDA_VISIBLE_DEVICES= runs on the CPU"
        raise InputError(message).known(alone=True)
    return wish


@contextmanager
def job(timeout: float = TIMEOUT_SECONDS, transport: str | None = None) -> Iterator[Group]:
    """The group of all launched processes, taken down at the end; a group of one if this process stands alone.

    timeout: seconds after which a rank that does not answer is given up. transport: one of TRANSPORTS, by default what fits. If
    the body raises, the other ranks are told why; the process must then end by `leave`.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a store that is gone is told in our words, not in stack traces
    from coterie.moe.collectives import Group

    if not 1 <= timeout <= MOST_SECONDS:
        raise InputError(f"--timeout: found {timeout:g}, expected 1 to {MOST_SECONDS:g} seconds")
    launch = find_launch(os.environ)
    if launch.size == 1:
        if transport is not None:
            raise InputError(f"--transport: found {transport!r} on one process, expected several (torchrun, mpirun)")
        yield Group()
        return
    with _signals() as terminated:
        group, watch = _connect(launch, timeout, transport, terminated)
        with _telling(watch):
            yield group
            watch.meet()  # nobody takes the group down while another rank still uses it
        watch.leave()
    _take_down()


@contextmanager
def _telling(watch: Watch) -> Iterator[None]:
    """Tells the other ranks why this one fails, if it does."""
    try:
        yield
    except BaseException as error:
        words = _in_words(error)
        lost = words.ranks if isinstance(words, RankLostError) else ()
        watch.leave(str(words) if isinstance(words, CoterieError) else f"{type(words).__name__}: {words}", lost)
        if words is error:
            raise
        raise words from error


def _in_words(error: BaseException) -> BaseException:
    """The error as the user reads it, marked as this rank's own unless all ranks agreed on it."""
    if isinstance(error, Exception) and _out_of_memory(error):
        error = CoterieError(f"out of memory ({first_line(error)}); start more ranks, or choose a smaller --batch-size")
    if isinstance(error, BrokenPipeError) and error.filename is None:
        error = CoterieError("its standard output was closed")
    if isinstance(error, CoterieError) and error.alone is None:
        error.alone = True
    return error


def _out_of_memory(error: Exception) -> bool:
    """Python's MemoryError, torch's on a GPU, and the plain RuntimeError of its CPU allocator."""
    plain = isinstance(error, RuntimeError) and "t allocate memory" in str(error)
    return plain or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _connect(launch: Launch, timeout: float, wish: str | None, terminated: Callable[[], bool]) -> tuple[Group, Watch]:
    """Find the other ranks, agree on where each sits, begin to watch, and open the transport."""
    from coterie.launch.assembly import ranks_per_node
    from coterie.moe.collectives import Group
    from coterie.moe.traffic import Traffic
    from coterie.moe.watch import Watch, watched

    launch, name, assembly = _assembled(launch, timeout, wish, terminated)
    per_node, traffic = ranks_per_node(assembly.seats), Traffic()
    keeper = None if launch.agent_store else 0
    watch = Watch(
        assembly.store, launch.rank, assembly.seats, timeout, traffic, lambda error: _end(watch, error), keeper, terminated
    )
    watch.start()
    with _telling(watch), watch.waiting():
        opened = _open(name, launch, assembly, timeout)
    return Group(watched(opened, watch), per_node, traffic), watch


def _assembled(
    launch: Launch, timeout: float, wish: str | None, terminated: Callable[[], bool]
) -> tuple[Launch, str, Assembly]:
    import torch

    from coterie import __version__
    from coterie.launch.assembly import START_SECONDS, assemble, check_seats, open_store
    from coterie.moe.beats import seat_here

    name = choose_transport(launch, torch.cuda.device_count(), wish)
    seconds, store = START_SECONDS, None
    if launch.launcher == "mpirun" or name == "mpi":
        launch, store = _meet_through_mpi(launch, seconds)
    store = store or open_store(launch, seconds, terminated)
    device = _take_gpu(launch.local_rank) if name == "nccl" else ""
    seat = seat_here(launch.rank, launch.node, launch.local_rank, device, __version__, name)
    assembly = assemble(store, seat, launch.size, seconds, terminated)
    check_seats(assembly.seats)
    return launch, name, assembly


def _take_gpu(local_rank: int) -> str:
    """Use this rank's GPU, or the only one where the launcher shows each process its own; returns its identity.

    Raises InputError where the node has fewer GPUs than processes.
    """
    import torch

    found = torch.cuda.device_count()
    if found > 1 and local_rank >= found:
        raise InputError(
            f"nccl: found {found} GPUs for a process with local rank {local_rank}, expected one for each; start fewer "
            "processes on the node, or hide the GPUs: CUDA_VISIBLE_DEVICES="
        ).known(alone=True)
    torch.cuda.set_device(local_rank if found > 1 else 0)
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _meet_through_mpi(launch: Launch, seconds: float) -> tuple[Launch, Any]:
    """The launch with what MPI knows: who shares a machine, where rank 0 has opened the store; and the store there."""
    from coterie.launch.assembly import open_store

    world = mpi_world(launch.launcher, launch.size)
    local = world.Split_type(sys.modules["mpi4py.MPI"].COMM_TYPE_SHARED)
    node = f"{socket.gethostname()}, node of rank {local.bcast(world.rank)}"
    launch = replace(launch, rank=world.rank, local_rank=local.rank, node=node, agent_store=False)
    store, address = None, None
    if world.rank == 0:
        host = "127.0.0.1" if local.size == world.size else socket.gethostname()
        store = open_store(replace(launch, address=host, port=0), seconds)
        address = (host, store.port)
    host, port = world.bcast(address)
    return replace(launch, address=host, port=port), store


def _open(name: str, launch: Launch, assembly: Assembly, timeout: float) -> Transport:
    from coterie.moe.sockets import SocketTransport
    from coterie.moe.transports import MpiTransport, TorchTransport

    patience = timedelta(seconds=timeout)
    if name == "mpi":
        return MpiTransport(mpi_world(launch.launcher, launch.size).Dup(), timeout)
    if name == "tcp":
        several = len({seat.host for seat in assembly.seats}) > 1
        return SocketTransport.from_store(launch.rank, launch.size, assembly.store, launch.address, patience, several)
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    store = PrefixStore("group", assembly.store)
    dist.init_process_group(name, store=store, rank=launch.rank, world_size=launch.size, timeout=patience)
    return TorchTransport(timeout=timeout)


def _take_down() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, readable from any thread even while the main one is deep in another library.

    A launcher sends it as soon as one process dies; the others then still say which. After a failure it stays without effect:
    the process is ending.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    seen = bytearray()

    def terminated() -> bool:
        while select.select([reading], [], [], 0)[0]:
            seen.extend(os.read(reading, 64))
        return signal.SIGTERM in seen

    yield terminated
    signal.set_wakeup_fd(before[1])
    signal.signal(signal.SIGTERM, before[0])
    os.close(writing)
    os.close(reading)


def _end(watch: Watch, error: CoterieError) -> NoReturn:
    """For the watch's own thread: the main one may never come back."""
    complain(str(error))
    watch.leave(str(error), error.ranks if isinstance(error, RankLostError) else ())
    sys.stdout.flush()
    os._exit(FAILED)


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


class Gathers(Protocol):
    """Processes that tell each other things: `moe.collectives.Group`, `placement.spread.World`."""

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    @property
    def gather(self) -> Callable[[Any], list[Any]]:
        """Every process's value, in their order."""
        ...


def together(group: Gathers, work: Callable[[], T]) -> T:
    """Run `work`, which must not communicate, on every rank; all ranks raise the first failing rank's error, if any fails.

    It may take one rank much longer than another.
    """
    result, failure = None, None
    own: Exception | None = None
    try:
        result = work()
    except CoterieError as error:
        failure, own = (type(error), str(error)), error
    except Exception as error:
        if group.size == 1:
            raise
        words, own = _in_words(error), error
        said = str(words) if isinstance(words, CoterieError) else f"{type(error).__name__}: {first_line(error, 300)}\n{DEFECT}"
        failure = CoterieError, said
    if (meet := getattr(group, "meet", None)) is not None:  # processes of MPI that only plan have none
        meet()
    failures = group.gather(failure)
    for rank, found in enumerate(failures):
        if found is not None:
            kind, message = found
            where = f"rank {rank}: " if group.size > 1 and any(f is None for f in failures) else ""
            raise kind(where + message).known(alone=False) from own
    return result  # type: ignore[return-value]


def same_on_all(group: Gathers, found: Mapping[str, str]) -> None:
    """Raises InputError, naming the rank, unless all ranks found the same of each thing: `{what: digest}`."""
    said = group.gather((socket.gethostname(), dict(found)))
    for what in {what: None for _, others in said for what in others}:  # what one rank alone found is for all to raise
        for rank, (host, others) in enumerate(said):
            if others.get(what) != said[0][1].get(what):
                raise InputError(
                    f"{what}: differs between ranks: rank {rank} (host {host}) found {others.get(what)}, "
                    f"rank 0 (host {said[0][0]}) {said[0][1].get(what)}; give every rank the same"
                ).known(alone=False)
