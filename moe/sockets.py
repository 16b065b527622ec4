"""All-to-all over a full mesh of TCP connections: what ranks on CPUs use without MPI.

torch's gloo takes 0.6 to 1.5 ms for an all-to-all of up to 64 KB among four processes of one machine; this takes a quarter
of that, because nothing is handed to another thread (bench/transports.py), and it knows which rank it is waiting for.
"""

from __future__ import annotations

import os
import pickle
import secrets
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any, Protocol

import torch

from coterie.routing.errors import CoterieError

TOKEN_BYTES = 16
RANK_BYTES = 4
SIZE_BYTES = 8


class Store(Protocol):
    """The part of torch's key-value stores that is needed to find each other."""

    def set(self, key: str, value: str) -> None: ...  # noqa: D102
    def get(self, key: str) -> bytes: ...  # noqa: D102


class _Transfer:
    """What one collective still has to send and to receive; bytes arrive in the order in which collectives were begun."""

    def __init__(self) -> None:
        self.open = 0


class Mesh:
    """One connection to every other rank. Takes no part in deciding what is sent; never blocks but in `finish`."""

    def __init__(self, rank: int, peers: dict[int, socket.socket], timeout: float) -> None:
        self.rank = rank
        self.peers = peers
        self.timeout = timeout
        self._out: dict[int, deque[tuple[memoryview, _Transfer]]] = {p: deque() for p in peers}
        self._in: dict[int, deque[tuple[memoryview, _Transfer]]] = {p: deque() for p in peers}

    @classmethod
    def connect(cls, rank: int, size: int, store: Store, address: str, timeout: float) -> Mesh:
        """Meet the other ranks, which call this too. address: of this machine, as the others reach it."""
        if rank == 0:
            store.set("coterie/token", secrets.token_hex(TOKEN_BYTES))
        with socket.create_server((address, 0), backlog=size) as server:
            server.settimeout(timeout)
            store.set(f"coterie/address/{rank}", f"{address} {server.getsockname()[1]}")
            token = bytes.fromhex(store.get("coterie/token").decode())
            peers = {p: _call(store, p, rank, token, timeout) for p in range(rank)}
            try:
                while len(peers) < size - 1:
                    peers.update(_answer(server, token, timeout))
            except TimeoutError as error:
                missing = [p for p in range(size) if p != rank and p not in peers]
                raise CoterieError(f"rank {_listed(missing)} did not connect within {timeout:g} s") from error
        for connection in peers.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
        return cls(rank, peers, timeout)

    def begin(self, out: dict[int, memoryview], into: dict[int, memoryview]) -> _Transfer:
        """Send `out[p]` to each rank p and fill `into[p]` from it; neither may be touched until `finish`."""
        transfer = _Transfer()
        for peers, queues in ((out, self._out), (into, self._in)):
            for peer, view in peers.items():
                if len(view):
                    queues[peer].append((view, transfer))
                    transfer.open += 1
        for peer in out:
            self._push(peer)
        return transfer

    def finish(self, transfer: _Transfer) -> None:
        """Wait until all of it is sent and received. Raises CoterieError, naming who is waited for."""
        deadline = time.monotonic() + self.timeout
        for peer in self._in:
            self._pull(peer)
        while transfer.open:
            wanted = {p: select.POLLIN for p, queue in self._in.items() if queue}
            for peer, queue in self._out.items():
                if queue:
                    wanted[peer] = wanted.get(peer, 0) | select.POLLOUT
            self._wait(wanted, deadline)

    def _wait(self, wanted: dict[int, int], deadline: float) -> None:
        poll = select.poll()
        by_file = {}
        for peer, events in wanted.items():
            poll.register(self.peers[peer], events)
            by_file[self.peers[peer].fileno()] = peer
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1e3)
        if not ready:
            raise CoterieError(f"waited {self.timeout:g} s for rank {_listed(wanted)}")
        for file, events in ready:
            if events & ~select.POLLOUT:
                self._pull(by_file[file])
            if events & select.POLLOUT:
                self._push(by_file[file])

    def _push(self, peer: int) -> None:
        self._move(peer, self._out[peer], self.peers[peer].send)

    def _pull(self, peer: int) -> None:
        self._move(peer, self._in[peer], self.peers[peer].recv_into)

    def _move(self, peer: int, queue: deque[tuple[memoryview, _Transfer]], move: Callable[[memoryview], int]) -> None:
        """As much of the queue as goes without waiting."""
        while queue:
            view, transfer = queue[0]
            try:
                done = move(view)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._ended(peer, error) from error
            if done == 0:
                raise self._ended(peer, None)
            if done < len(view):
                queue[0] = (view[done:], transfer)
            else:
                queue.popleft()
                transfer.open -= 1

    def _ended(self, peer: int, error: OSError | None) -> CoterieError:
        return CoterieError(f"rank {peer} has ended" + (f" ({error.strerror})" if error else ""))


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _call(store: Store, peer: int, rank: int, token: bytes, timeout: float) -> socket.socket:
    host, port = store.get(f"coterie/address/{peer}").decode().split()
    try:
        connection = socket.create_connection((host, int(port)), timeout=timeout)
    except OSError as error:
        raise CoterieError(f"rank {peer} cannot be reached at {host}:{port}: {error}") from error
    connection.sendall(token + rank.to_bytes(RANK_BYTES, "little"))
    return connection


def _answer(server: socket.socket, token: bytes, timeout: float) -> dict[int, socket.socket]:
    """The next caller, if it is one of ours."""
    connection, _ = server.accept()
    connection.settimeout(timeout)
    said = b""
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
    def from_store(cls, rank: int, size: int, store: Store, master: str, timeout: timedelta) -> SocketTransport:
        """Connects all ranks of a job whose launcher has set `master`."""
        address = os.environ.get("COTERIE_ADDRESS") or own_address(master)
        return cls(Mesh.connect(rank, size, store, address, timeout.total_seconds()), range(size))

    def start_all_to_all(self, out: torch.Tensor, rows: torch.Tensor, receive: Sequence[int], send: Sequence[int]) -> Any:
        """As `Transport`."""
        transfer = self._begin(_split(rows, send), _split(out, receive))
        return lambda: self.mesh.finish(transfer)

    def all_to_all_counted(self, rows: torch.Tensor, send: Sequence[int]) -> tuple[torch.Tensor, Sequence[int]]:
        """As `CountsInside`: each block follows its number of rows, so that nothing is asked beforehand and nothing padded."""
        mine, sizes = _split(rows, send), [SIZE_BYTES] * self.size
        heads = torch.zeros(self.size, dtype=torch.int64)
        said = self._begin(_cut(_bytes(torch.tensor(send, dtype=torch.int64)), sizes), _cut(_bytes(heads), sizes))
        sent = self.mesh.begin({member: mine[i] for i, member in self._others}, {})
        self.mesh.finish(said)
        receive = heads.tolist()
        out = rows.new_empty((sum(receive), rows.shape[1]))
        theirs = _split(out, receive)
        theirs[self.rank][:] = mine[self.rank]
        came = self.mesh.begin({}, {member: theirs[i] for i, member in self._others})
        self.mesh.finish(came)
        self.mesh.finish(sent)
        return out, receive

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
        out = {member: mine[i] for i, member in self._others}
        return self.mesh.begin(out, {member: theirs[i] for i, member in self._others})

    def device(self) -> torch.device:
        """As `Transport`."""
        return torch.device("cpu")

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
