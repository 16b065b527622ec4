"""All-to-all over a full mesh of TCP connections: what ranks on CPUs use without MPI.

torch's gloo takes 0.6 to 1.5 ms for an all-to-all of up to 64 KB among four processes of one machine; this takes a quarter
of that, because nothing is handed to another thread, and it knows which rank it is waiting for.
"""

from __future__ import annotations

import ipaddress
import os
import pickle
import secrets
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import accumulate, islice
from typing import Any, Protocol

import torch

from coterie.moe.transports import Wait
from coterie.routing.errors import CoterieError, InputError

TOKEN_BYTES = 16
RANK_BYTES = 4
GREETING_SECONDS = 2.0  # for one that has called to say who it is
SIZE_BYTES = 8
STAGE_BYTES = 1 << 15  # larger blocks come in where they belong
MOST_PARTS = 16  # that one call sends


class Store(Protocol):
    """The part of torch's key-value stores that is needed to find each other."""

    def set(self, key: str, value: str) -> None: ...  # noqa: D102
    def get(self, key: str) -> bytes: ...  # noqa: D102


class _Transfer:
    """What one collective still has to send and to receive; bytes arrive in the order in which collectives were begun."""

    def __init__(self) -> None:
        self.open = 0


class _Line:
    """The connection to one rank: what is still to go out, where what comes in belongs.

    Blocks go out together in one call, and small ones come in together, through a stage of the line's own.
    """

    def __init__(self, peer: int, connection: socket.socket) -> None:
        self.peer, self.connection = peer, connection
        self.out: deque[tuple[memoryview, _Transfer]] = deque()
        self.into: deque[tuple[memoryview, _Transfer]] = deque()
        self._stage = memoryview(bytearray(STAGE_BYTES))
        self._came = self._stage[:0]

    def push(self) -> None:
        """Send as much as goes without waiting."""
        while self.out:
            done = self._tried(self.connection.sendmsg, [view for view, _ in islice(self.out, MOST_PARTS)])
            if done is None:
                return
            while self.out and done >= len(self.out[0][0]):
                view, transfer = self.out.popleft()
                done -= len(view)
                transfer.open -= 1
            if done:
                view, transfer = self.out[0]
                self.out[0] = (view[done:], transfer)

    def pull(self) -> None:
        """Take in as much as there is of what is waited for."""
        while self.into:
            view, transfer = self.into[0]
            if not self._came and len(view) < STAGE_BYTES:
                done = self._tried(self.connection.recv_into, self._stage)
                if done is None:
                    return
                self._came = self._stage[:done]
            if self._came:
                done = min(len(view), len(self._came))
                view[:done] = self._came[:done]
                self._came = self._came[done:]
            else:
                done = self._tried(self.connection.recv_into, view)
                if done is None:
                    return
            if done < len(view):
                self.into[0] = (view[done:], transfer)
            else:
                self.into.popleft()
                transfer.open -= 1

    def _tried(self, move: Callable[[Any], int], what: memoryview | list[memoryview]) -> int | None:
        """How many bytes were moved; None if none can be without waiting. Raises CoterieError if the rank is gone."""
        try:
            done = move(what)
        except BlockingIOError:
            return None
        except OSError as error:
            raise CoterieError(f"rank {self.peer} has ended ({error.strerror})") from error
        if done == 0:
            raise CoterieError(f"rank {self.peer} has ended")
        return done


class Mesh:
    """One connection to every other rank. Takes no part in deciding what is sent; never blocks but in `finish`."""

    def __init__(self, rank: int, peers: dict[int, socket.socket], timeout: float) -> None:
        self.rank = rank
        self.peers = peers
        self.timeout = timeout
        self.on_progress: Callable[[], object] = lambda: None
        self._lines = {peer: _Line(peer, connection) for peer, connection in peers.items()}
        self._by_file = {line.connection.fileno(): line for line in self._lines.values()}

    @classmethod
    def connect(cls, rank: int, size: int, store: Store, address: str, timeout: float) -> Mesh:
        """Meet the other ranks, which call this too. address: of this machine, as the others reach it."""
        if rank == 0:
            store.set("coterie/token", secrets.token_hex(TOKEN_BYTES))
        try:
            server = socket.create_server((address, 0), backlog=size)
        except OSError as error:
            raise InputError(
                f"COTERIE_ADDRESS: rank {rank} cannot listen at {address} ({error.strerror or error}), expected an address of "
                "this machine by which the others reach it"
            ).known(alone=True) from error
        with server:
            store.set(f"coterie/address/{rank}", f"{address} {server.getsockname()[1]}")
            token = bytes.fromhex(store.get("coterie/token").decode())
            peers: dict[int, socket.socket] = {}
            try:
                for peer in range(rank):
                    peers[peer] = _call(store, peer, rank, token, timeout)
                deadline = time.monotonic() + timeout
                while len(peers) < size - 1:
                    server.settimeout(max(0.001, deadline - time.monotonic()))
                    peers.update(_answer(server, token, timeout))
            except BaseException as error:
                for connection in peers.values():
                    connection.close()
                if not isinstance(error, TimeoutError):
                    raise
                missing = [p for p in range(size) if p != rank and p not in peers]
                raise CoterieError(f"rank {_listed(missing)} did not connect within {timeout:g} s") from error
        for connection in peers.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
        return cls(rank, peers, timeout)

    def begin(self, out: Mapping[int, Sequence[memoryview]], into: Mapping[int, memoryview]) -> _Transfer:
        """Send `out[p]` to each rank p and fill `into[p]` from it; neither may be touched until `finish`."""
        transfer = _Transfer()
        for peer, view in into.items():
            if len(view):
                self._lines[peer].into.append((view, transfer))
                transfer.open += 1
        for peer, views in out.items():
            line, filled = self._lines[peer], [(view, transfer) for view in views if len(view)]
            line.out += filled
            transfer.open += len(filled)
            line.push()
        return transfer

    def finish(self, transfer: _Transfer) -> None:
        """Wait until all of it is sent and received. Raises CoterieError, naming who is waited for, once nothing moves."""
        for line in self._lines.values():
            line.pull()
        while transfer.open:
            self._wait()
            self.on_progress()

    def _wait(self) -> None:
        """For the next bytes."""
        poll, wanted = select.poll(), []
        for line in self._lines.values():
            events = (select.POLLIN if line.into else 0) | (select.POLLOUT if line.out else 0)
            if events:
                poll.register(line.connection, events)
                wanted.append(line.peer)
        ready = poll.poll(self.timeout * 1e3)
        if not ready:
            raise CoterieError(f"waited {self.timeout:g} s for rank {_listed(wanted)}")
        for file, events in ready:
            if events & ~select.POLLOUT:
                self._by_file[file].pull()
            if events & select.POLLOUT:
                self._by_file[file].push()


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _call(store: Store, peer: int, rank: int, token: bytes, timeout: float) -> socket.socket:
    host, port = store.get(f"coterie/address/{peer}").decode().split()
    try:
        connection = socket.create_connection((host, int(port)), timeout=timeout)
        connection.sendall(token + rank.to_bytes(RANK_BYTES, "little"))
    except OSError as error:
        raise CoterieError(
            f"rank {peer} cannot be reached at {host}:{port}: {error}; COTERIE_ADDRESS there says where it can be"
        ) from error
    return connection


def _answer(server: socket.socket, token: bytes, timeout: float) -> dict[int, socket.socket]:
    """The next caller, if it is one of ours: those greet as soon as they have called."""
    connection, _ = server.accept()
    connection.settimeout(min(timeout, GREETING_SECONDS))
    said = b""
    with suppress(OSError):  # others may say nothing, or hang up
        while len(said) < TOKEN_BYTES + RANK_BYTES and (part := connection.recv(TOKEN_BYTES + RANK_BYTES - len(said))):
            said += part
    if not secrets.compare_digest(said[:TOKEN_BYTES], token) or len(said) < TOKEN_BYTES + RANK_BYTES:
        connection.close()
        return {}
    return {int.from_bytes(said[TOKEN_BYTES:], "little"): connection}


def own_address(master: str) -> str:
    """The address by which this machine reaches `master`, and by which it can be reached from there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))  # a datagram socket: nothing is sent
        return str(probe.getsockname()[0])


def _loopback(address: str) -> bool:
    """Whether it is written as one: what a name stands for differs between machines."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


class SocketTransport:
    """`Transport` over a mesh, among `members` (ranks of the whole job, in order)."""

    name = "tcp"

    def __init__(self, mesh: Mesh, members: Sequence[int]) -> None:
        self.mesh = mesh
        self.members = tuple(members)
        self.size = len(self.members)
        self.rank = self.members.index(mesh.rank)
        self._others = [(i, member) for i, member in enumerate(self.members) if i != self.rank]

    @classmethod
    def from_store(
        cls, rank: int, size: int, store: Store, master: str, timeout: timedelta, several: bool = False
    ) -> SocketTransport:
        """Connects all ranks of a job whose launcher has set `master`. several: whether they are on several machines."""
        address = os.environ.get("COTERIE_ADDRESS") or own_address(master)
        if several and _loopback(address) and not _loopback(master):
            raise InputError(
                f"COTERIE_ADDRESS: rank {rank} would be found at {address}, which other machines cannot reach, expected an "
                f"address of this machine; {master} may stand for it in /etc/hosts"
            ).known(alone=True)
        return cls(Mesh.connect(rank, size, store, address, timeout.total_seconds()), range(size))

    def start_all_to_all(self, out: torch.Tensor, rows: torch.Tensor, receive: Sequence[int], send: Sequence[int]) -> Any:
        """As `Transport`."""
        transfer = self._begin(_split(rows, send), _split(out, receive))
        return lambda: self.mesh.finish(transfer)

    def start_all_to_all_counted(self, rows: torch.Tensor, send: Sequence[int]) -> tuple[torch.Tensor, Sequence[int], Wait]:
        """As `CountsInside`: each block follows its number of rows, so that nothing is asked beforehand and nothing padded."""
        mine, sizes = _split(rows, send), [SIZE_BYTES] * self.size
        counts, heads = (_cut(_bytes(t), sizes) for t in (torch.tensor(send), torch.zeros(self.size, dtype=torch.int64)))
        sent = self.mesh.begin({member: (counts[i], mine[i]) for i, member in self._others}, {})
        said = self.mesh.begin({}, {member: heads[i] for i, member in self._others})
        self.mesh.finish(said)
        receive = [int.from_bytes(head, sys.byteorder) for head in heads]
        receive[self.rank] = send[self.rank]
        out = rows.new_empty((sum(receive), rows.shape[1]))
        theirs = _split(out, receive)
        theirs[self.rank][:] = mine[self.rank]
        came = self.mesh.begin({}, {member: theirs[i] for i, member in self._others})

        def finish() -> None:
            self.mesh.finish(came)
            self.mesh.finish(sent)

        return out, receive, finish

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """As `Transport`."""
        sent = mine.contiguous()
        out = sent.new_empty((self.size, *sent.shape))
        size = sent.numel() * sent.element_size()
        self.mesh.finish(self._begin([_bytes(sent)] * self.size, _cut(_bytes(out), [size] * self.size)))
        return out

    def gather_objects(self, value: Any) -> list[Any]:
        """As `Transport`."""
        data = pickle.dumps(value)
        sizes = self.all_gather(torch.tensor([len(data)])).flatten().tolist()
        parts = _cut(memoryview(bytearray(sum(sizes))), sizes)
        self.mesh.finish(self._begin([memoryview(data)] * self.size, parts))
        return [pickle.loads(part) for part in parts]

    def _begin(self, mine: Sequence[memoryview], theirs: Sequence[memoryview]) -> _Transfer:
        """Send `mine` and fill `theirs`, both by rank of this group; the own part is copied at once."""
        theirs[self.rank][:] = mine[self.rank]
        out = {member: (mine[i],) for i, member in self._others}
        return self.mesh.begin(out, {member: theirs[i] for i, member in self._others})

    def device(self) -> torch.device:
        """As `Transport`."""
        return torch.device("cpu")

    def on_progress(self, told: Callable[[], object]) -> None:
        """As `TellsProgress`."""
        self.mesh.on_progress = told

    def subgroup(self, groups: Sequence[Sequence[int]]) -> SocketTransport:
        """As `Transport`: the same connections, of which both ends use the same ones in the same order."""
        mine = next(ranks for ranks in groups if self.rank in ranks)
        return SocketTransport(self.mesh, [self.members[r] for r in mine])


def _bytes(tensor: torch.Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(bytearray())
    return tensor.view(-1).view(torch.uint8).numpy().data


def _split(rows: torch.Tensor, counts: Sequence[int]) -> list[memoryview]:
    """The memory of uint8 `rows`, cut by numbers of rows."""
    return _cut(_bytes(rows), [count * rows.shape[1] for count in counts])


def _cut(whole: memoryview, sizes: Sequence[int]) -> list[memoryview]:
    """Consecutive parts of so many bytes."""
    return [whole[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
