"""The TCP mesh, with ranks as threads: every byte arrives, in order, whatever the sizes; who is missing is named."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from coterie.moe.collectives import Group
from coterie.moe.sockets import SocketTransport, own_address
from coterie.moe.watch import watched
from coterie.routing.errors import CoterieError


def on_sockets(
    size: int, work: Callable[[SocketTransport], Any], timeout: float = 20.0, absent: tuple[int, ...] = ()
) -> list[Any]:
    store, results = HashStore(), [None] * size

    def run(rank: int) -> None:
        try:
            transport = SocketTransport.from_store(rank, size, store, "127.0.0.1", timedelta(seconds=timeout))
            results[rank] = work(transport)
        except CoterieError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(r,)) for r in range(size) if r not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


def block(source: int, to: int, rows: int) -> torch.Tensor:
    return torch.full((rows, 5), 16 * source + to, dtype=torch.uint8)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_uneven_and_empty_blocks_of_any_size_arrive_from_every_rank(size: int) -> None:
    def rows(source: int, to: int, turn: int) -> int:
        return (source * 3 + to * 5 + turn) % 4 * (1 if turn < 2 else 400_000)  # turn 2: more than any socket buffers

    def work(t: SocketTransport) -> bool:
        for turn in range(3):
            send, receive = [rows(t.rank, p, turn) for p in range(size)], [rows(p, t.rank, turn) for p in range(size)]
            out = torch.empty((sum(receive), 5), dtype=torch.uint8)
            t.start_all_to_all(out, torch.cat([block(t.rank, p, n) for p, n in enumerate(send)]), receive, send)()
            assert torch.equal(out, torch.cat([block(p, t.rank, n) for p, n in enumerate(receive)]))
        return True

    assert on_sockets(size, work) == [True] * size


def test_collectives_begun_together_keep_their_order() -> None:
    def work(t: SocketTransport) -> bool:
        outs = [torch.empty((2 * n, 5), dtype=torch.uint8) for n in (300_000, 3, 0, 7)]
        waits = [t.start_all_to_all(o, torch.full_like(o, i), [len(o) // 2] * 2, [len(o) // 2] * 2) for i, o in enumerate(outs)]
        for i in (1, 0, 3, 2):
            waits[i]()
            assert (outs[i] == i).all()
        return True

    assert on_sockets(2, work) == [True] * 2


def test_gathering_and_subgroups() -> None:
    def work(t: SocketTransport) -> Any:
        node = t.subgroup([[0, 1], [2, 3]])
        bf16 = Group(node).exchange_known(torch.full((2, 3), t.rank, dtype=torch.bfloat16), [1, 1], [1, 1])
        return t.all_gather(torch.tensor([t.rank])).tolist(), t.gather_objects({"rank": t.rank})[3], bf16[:, 0].tolist()

    low, high = [0.0, 1.0], [2.0, 3.0]
    everyone = [[0], [1], [2], [3]]
    assert on_sockets(4, work) == [(everyone, {"rank": 3}, v) for v in (low, low, high, high)]


def test_a_rank_that_ends_or_is_silent_or_never_comes_is_named() -> None:
    stop = threading.Event()

    def ends(t: SocketTransport) -> Any:
        if t.rank == 1:
            for connection in t.mesh.peers.values():
                connection.close()
            return None
        return t.all_gather(torch.zeros(1))

    def silent(t: SocketTransport) -> Any:
        t.mesh.timeout = 1.0  # after all have met, however long that took
        return stop.wait(3) if t.rank == 2 else t.all_gather(torch.zeros(1))

    assert "rank 1 has ended" in str(on_sockets(2, ends)[0])
    assert [str(e) for e in on_sockets(3, silent)[:2]] == ["waited 1 s for rank 2"] * 2
    assert str(on_sockets(3, silent, timeout=1, absent=(2,))[0]) == "rank 2 did not connect within 1 s"


@pytest.mark.parametrize("kind", ["talks", "is silent", "hangs up"])
def test_strangers_are_turned_away(kind: str) -> None:
    store, kept = HashStore(), []

    def stranger() -> None:
        host, port = store.get("coterie/address/0").decode().split()
        connection = socket.create_connection((host, int(port)))
        kept.append(connection)
        if kind == "talks":
            connection.sendall(b"x" * 20)
            assert connection.recv(1) == b""
        if kind == "hangs up":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # by a reset
            connection.close()

    def rank(number: int, out: list[Any]) -> None:
        if number == 1:
            stranger()
        transport = SocketTransport.from_store(number, 2, store, "127.0.0.1", timedelta(seconds=20))
        out.append(transport.all_gather(torch.tensor([number])).tolist())

    out: list[Any] = []
    threads = [threading.Thread(target=rank, args=(n, out)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for connection in kept:
        connection.close()
    assert out == [[[0], [1]]] * 2


def test_the_own_address_is_the_one_that_faces_the_master() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"


def test_blocks_of_unknown_size_arrive_in_one_exchange() -> None:
    def work(t: SocketTransport) -> Any:
        group = Group(t)
        assert group.counts_inside
        for turn in range(3):
            counts = [[(a * 3 + b + turn) % 4 * (1 if turn < 2 else 300_000) for b in range(3)] for a in range(3)]
            rows = torch.cat([block(t.rank, p, n) for p, n in enumerate(counts[t.rank])])
            out, receive = group.exchange(rows, counts[t.rank], 1)
            assert list(receive) == [counts[p][t.rank] for p in range(3)]
            assert torch.equal(out, torch.cat([block(p, t.rank, n) for p, n in enumerate(receive)]))
        return group.traffic.overhead

    assert on_sockets(3, work) == [3 * 2 * 8] * 3


@pytest.mark.parametrize("rows", [0, 7, 300_000])  # the last: more than any socket buffers
def test_a_node_exchanges_while_blocks_of_unknown_size_travel_between_nodes(rows: int) -> None:
    def work(t: SocketTransport) -> Any:
        group = Group(t, 2)
        node = group.subgroup([[0, 1], [2, 3]])
        counts = [[rows * (a + b) % (rows + 3) * (a // 2 != b // 2) for b in range(4)] for a in range(4)]
        mine = torch.cat([block(t.rank, p, n) for p, n in enumerate(counts[t.rank])])
        receive, arriving = group.start_counted(mine, counts[t.rank], 1, "dispatch between nodes")
        assert list(receive) == [counts[p][t.rank] for p in range(4)]
        inside, came = node.exchange(torch.full((2 * rows, 5), t.rank), [rows, rows], 1)
        assert came == (rows, rows) and inside[:, 0].tolist() == [r for r in node.members for _ in range(rows)]
        assert torch.equal(arriving(), torch.cat([block(p, t.rank, n) for p, n in enumerate(receive)]))
        return group.traffic.overhead

    assert on_sockets(4, work) == [3 * 8 + 8] * 4


def test_an_exchange_that_is_awaited_later_is_watched_to_its_end_and_counted_once() -> None:
    class Noting:
        def __init__(self) -> None:
            self.begins: list[bool] = []
            self.inside = False

        @contextmanager
        def waiting(self, begins: bool = True) -> Iterator[None]:
            self.begins.append(begins)
            self.inside = True
            yield
            self.inside = False

        def progressed(self) -> None:
            assert self.inside

    def work(t: SocketTransport) -> Any:
        noting = Noting()
        group = Group(watched(t, noting))  # type: ignore[arg-type]
        receive, arriving = group.start_counted(block(t.rank, 0, 4), [2, 2], 2)
        assert not noting.inside and noting.begins == [True]
        group.exchange_known(torch.zeros(2, 1), [1, 1], [1, 1])
        arriving()
        return list(receive), noting.begins

    assert on_sockets(2, work) == [([2, 2], [True, True, False, False])] * 2


def test_what_comes_slowly_is_waited_for_as_long_as_it_comes() -> None:
    """Four parts, 0.6 s apart, where no more than a second may pass without a byte."""
    told: list[bool] = []

    def work(t: SocketTransport) -> Any:
        if t.rank == 1:
            line = t.mesh.peers[0]
            line.setblocking(True)
            for part in range(4):
                line.sendall(bytes([part]) * 10)
                time.sleep(0.6)
            return None
        t.on_progress(lambda: told.append(True))
        out = torch.zeros((8, 5), dtype=torch.uint8)
        t.start_all_to_all(out, torch.empty((0, 5), dtype=torch.uint8), [0, 8], [0, 0])()
        return out[::2, 0].tolist()

    assert on_sockets(2, work, timeout=1.0)[0] == [0, 1, 2, 3]
    assert len(told) >= 3
