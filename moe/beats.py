"""What the ranks of a job say of themselves, and whom a failure is to be blamed on: nothing here waits or asks another rank."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

STALE_SECONDS = 3.0  # silence after which a rank is to blame for a collective that failed


@dataclass(frozen=True)
class Seat:
    """Where a rank runs. machine: processes with the same one see each other's ids; born: tells a process from a later one
    with its id; device: the GPU's identity or empty; version: of coterie; transport: what it will exchange rows by.
    """

    rank: int
    node: str
    host: str
    pid: int
    machine: str
    born: str
    local_rank: int = 0
    device: str = ""
    version: str = ""
    transport: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def seat_here(rank: int, node: str, local_rank: int = 0, device: str = "", version: str = "", transport: str = "") -> Seat:
    """This process's seat."""
    pid = os.getpid()
    machine = ""
    with suppress(OSError):  # no /proc: the system is then not asked about other ranks
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return Seat(rank, node, socket.gethostname(), pid, machine, _process(pid)[1], local_rank, device, version, transport)


def _process(pid: int) -> tuple[str, str]:
    """(state, start time) of a process on Linux, ("", "") if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def system_says(seat: Seat, here: Seat) -> str:
    """`dead`, `stopped`, or nothing for a rank that runs or is on another machine."""
    if not seat.machine or seat.machine != here.machine:
        return ""
    state, born = _process(seat.pid)
    if born != seat.born or state in "ZX":
        return "dead"
    return "stopped" if state in "Tt" else ""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself. number: grows with every beat; collectives: how many it has entered; layer: -1 outside the
    layers; meetings: how many it has come to; left: why it ended early, empty otherwise; lost: the ranks that it then blamed;
    done: it has ended well.
    """

    number: int = 0
    collectives: int = 0
    step: int = 0
    layer: int = -1
    meetings: int = 0
    left: str = ""
    lost: tuple[int, ...] = ()
    done: bool = False

    @property
    def where(self) -> str:
        """Where in the job it is."""
        layer = "" if self.layer < 0 else f", layer {self.layer}"
        return f"in step {self.step}{layer}" if self.step else "before the first step"

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Beat:
        """From the store."""
        values = json.loads(data)
        return cls(**{**values, "lost": tuple(values["lost"])})


@dataclass(frozen=True)
class Heard:
    """Of one rank: its last beat, the seconds since that changed, and what the system says of the process."""

    beat: Beat
    age: float
    system: str = ""


def blame(heard: Mapping[int, Heard], me: int, stale: float = STALE_SECONDS, failed: bool = True) -> dict[int, str]:
    """Which other ranks are to blame, and how; empty as long as that is not clear.

    failed: whether an exchange has failed; before that, a rank that is stopped may yet go on. First come those that failed
    themselves and said so; then the dead, stopped and silent; then those whom ranks that have left blamed.
    """
    others = {rank: h for rank, h in heard.items() if rank != me and not h.beat.done}
    own = {r: f"failed {h.beat.where}: {h.beat.left}" for r, h in others.items() if h.beat.left and not h.beat.lost}
    if own:
        return own
    staying = {rank: h for rank, h in others.items() if not h.beat.left}
    signs = ("dead", "stopped") if failed else ("dead",)
    gone = {rank: silence(h) for rank, h in staying.items() if h.system in signs or h.age >= stale}
    if gone:
        return gone
    blamed = {rank for h in others.values() for rank in h.beat.lost if rank != me}
    if blamed:
        return {rank: silence(heard[rank]) for rank in blamed}
    return {rank: f"has left: {h.beat.left}" for rank, h in others.items() if h.beat.left}


def silence(heard: Heard) -> str:
    """In words."""
    state = {"dead": "is dead", "stopped": "is stopped"}.get(heard.system, "does not answer")
    return f"{state}: it was last seen {heard.age:.0f} s ago {heard.beat.where}"


def late(heard: Mapping[int, Heard], me: int, mine: int) -> dict[int, str]:
    """Ranks that live but have entered fewest collectives, fewer than this one."""
    behind = {rank: h.beat.collectives for rank, h in heard.items() if rank != me and h.beat.collectives < mine}
    fewest = min(behind.values(), default=0)
    return {
        rank: f"lives but is late: it is {heard[rank].beat.where}, {mine - count} exchange(s) behind"
        for rank, count in behind.items()
        if count == fewest
    }
