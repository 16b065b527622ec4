"""How the ranks of a job find each other: one store at an address that all know, and a seat for each in it."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from coterie.launch.launched import Launch
from coterie.moe.beats import Beat, Seat
from coterie.moe.watch import Watch
from coterie.routing.errors import CoterieError, InputError, RankLostError, first_line

START_SECONDS = 25.0
POLL_SECONDS = 0.05
ATTEMPT_SECONDS = 2.0  # to connect, before it is tried again


@dataclass(frozen=True)
class Assembly:
    """The store, under a prefix that no other attempt of the job uses, and all ranks' seats."""

    store: Any
    seats: tuple[Seat, ...]


def never() -> bool:
    """Nobody has asked this process to end."""
    return False


def open_store(launch: Launch, seconds: float, terminated: Callable[[], bool] = never) -> Any:
    """The store at the launch's address; rank 0 keeps it unless torchrun's agent does. port 0: any, rank 0 only.

    terminated: whether this process was asked to end. Raises CoterieError, naming the address, if it cannot be reached within
    `seconds`.
    """
    import torch.distributed as dist

    keeper = launch.rank == 0 and not launch.agent_store
    if not keeper:
        reach(launch.address, launch.port, seconds, terminated)
    try:
        patience = timedelta(seconds=seconds)
        return dist.TCPStore(  # type: ignore[attr-defined]
            launch.address, launch.port, launch.size, keeper, patience, wait_for_workers=False
        )
    except RuntimeError as error:
        where = f"{launch.address}:{launch.port}"
        if keeper:
            message = f"MASTER_PORT: rank 0 cannot listen at {where} ({first_line(error)}); choose another"
        else:
            message = f"MASTER_ADDR:MASTER_PORT {where} answers, but not as a job's store ({first_line(error)})"
        raise CoterieError(message).known(alone=True) from error


def reach(address: str, port: int, seconds: float, terminated: Callable[[], bool] = never) -> None:
    """Wait until something listens there. Raises CoterieError with the address and what to check."""
    began, refusal = time.monotonic(), "no answer"
    while (left := seconds - (time.monotonic() - began)) > 0:
        try:
            socket.create_connection((address, port), timeout=min(left, ATTEMPT_SECONDS)).close()
            return
        except OSError as error:
            refusal = error.strerror or str(error)
            time.sleep(min(0.2, left))
        if terminated():
            raise CoterieError(f"ended by SIGTERM while {address}:{port} could not be reached ({refusal})").known(alone=True)
    raise CoterieError(
        f"MASTER_ADDR:MASTER_PORT: {address}:{port} cannot be reached from {socket.gethostname()} within {seconds:.0f} s "
        f"({refusal}); check that rank 0 runs there, that the name resolves and that no firewall closes the port"
    ).known(alone=True)


def assemble(store: Any, mine: Seat, size: int, seconds: float, terminated: Callable[[], bool] = never) -> Assembly:
    """Every rank's seat. Raises RankLostError, naming them, if some do not come within `seconds`, or before SIGTERM does.

    A store kept by torchrun's agent outlives the processes of earlier attempts, so what is in it may be old: a rank believes
    the number of the attempt only beside a word that it has just made up.
    """
    try:
        return _assembled(store, mine, size, seconds, terminated)
    except RuntimeError as error:  # of the store, whose keeper is gone
        raise CoterieError(
            "the store in which the ranks meet is gone: rank 0 or the launcher that keeps it has ended, see what it said "
            f"({first_line(error)})"
        ).known(alone=True) from error


def _assembled(store: Any, mine: Seat, size: int, seconds: float, terminated: Callable[[], bool]) -> Assembly:
    from torch.distributed.distributed_c10d import PrefixStore

    deadline = time.monotonic() + seconds
    word = secrets.token_hex(8)
    store.set(f"coterie/word/{mine.rank}", word)
    attempt = (
        int(store.add("coterie/attempts", 1)) if mine.rank == 0 else _hear_attempt(store, mine.rank, word, deadline, terminated)
    )
    job = PrefixStore(f"coterie/{attempt}", store)
    job.set(Watch.key(mine.rank), Beat().to_json())
    job.set(f"seat/{mine.rank}", json.dumps(asdict(mine)))
    keys = [f"seat/{rank}" for rank in range(size)]
    while missing := [rank for rank, key in enumerate(keys) if not job.check([key])]:
        if mine.rank == 0:
            _tell_words(store, size, attempt)
        if time.monotonic() > deadline:
            raise _absent(missing, size, f"did not start within {seconds:.0f} s")
        if terminated():
            raise _absent(missing, size, "had not started when SIGTERM came")
        time.sleep(POLL_SECONDS)
    seats = tuple(Seat(**json.loads(data)) for data in job.multi_get(keys))
    read = int(job.add("read", 1))
    while mine.rank == 0 and read < size and time.monotonic() < deadline:  # with rank 0 the store may go
        time.sleep(POLL_SECONDS)
        read = int(job.add("read", 0))
    return Assembly(job, seats)


def _absent(missing: Sequence[int], size: int, how: str) -> RankLostError:
    return RankLostError(f"rank {', '.join(map(str, missing))} of {size} {how}", tuple(missing))


def _tell_words(store: Any, size: int, attempt: int) -> None:
    keys = [f"coterie/word/{rank}" for rank in range(size)]
    words = [store.get(key).decode() if store.check([key]) else "" for key in keys]
    store.set("coterie/attempt", json.dumps({"attempt": attempt, "words": words}))


def _hear_attempt(store: Any, rank: int, word: str, deadline: float, terminated: Callable[[], bool]) -> int:
    while time.monotonic() < deadline and not terminated():
        if store.check(["coterie/attempt"]):
            told = json.loads(store.get("coterie/attempt"))
            if rank < len(told["words"]) and told["words"][rank] == word:
                return int(told["attempt"])
        time.sleep(POLL_SECONDS)
    raise RankLostError("rank 0 did not start in time: nobody has numbered the ranks", (0,))


def ranks_per_node(seats: Sequence[Seat]) -> int:
    """How many ranks each node has. Raises InputError, naming the node, unless all have as many, one after another."""
    nodes: dict[str, list[int]] = {}
    for seat in seats:
        nodes.setdefault(seat.node, []).append(seat.rank)
    (first, ranks), *others = nodes.items()
    for node, found in others:
        if len(found) != len(ranks):
            raise InputError(
                f"ranks per node: found {len(found)} on {node} and {len(ranks)} on {first}, expected as many on every node"
            )
    for node, found in nodes.items():
        if found != list(range(found[0], found[0] + len(found))):
            raise InputError(
                f"ranks per node: found ranks {', '.join(map(str, found))} on {node}, expected consecutive ones "
                "(mpirun --map-by slot, srun --distribution=block)"
            )
    return len(ranks)


def check_seats(seats: Sequence[Seat]) -> None:
    """Raises InputError if the ranks run different versions of coterie or found different transports, or two share a GPU."""
    for seat in seats:
        if seat.version != seats[0].version:
            raise InputError(
                f"coterie: found version {seat.version} on rank {seat.rank} (host {seat.host}) and {seats[0].version} "
                "on rank 0, expected the same everywhere"
            )
        if seat.transport != seats[0].transport:
            raise InputError(
                f"--transport: rank {seat.rank} (host {seat.host}) found {seat.transport} and rank 0 (host {seats[0].host}) "
                f"{seats[0].transport}, expected the same everywhere; where no GPU can be seen it is tcp (coterie doctor)"
            )
    taken: dict[str, Seat] = {}
    for seat in seats:
        if seat.device and taken.setdefault(seat.device, seat) is not seat:
            raise InputError(
                f"nccl: {taken[seat.device]} and rank {seat.rank} share a GPU, expected one for each; start fewer processes "
                "on the node, or hide the GPUs: CUDA_VISIBLE_DEVICES="
            )
