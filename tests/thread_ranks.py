"""Ranks as threads of one process: the strategies' own code over a transport through memory, for any number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

import coterie
from coterie.moe.collectives import Group

TIMEOUT = 60.0


class Mailboxes:
    """What the ranks of one group lay out for each other between two barriers."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT)

    def swap(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class ThreadTransport:
    """`Transport` among threads. calls: how many collectives this rank took part in."""

    name = "threads"

    def __init__(self, rank: int, boxes: Mailboxes, shared: dict[Any, Mailboxes]) -> None:
        self.rank = rank
        self.size = len(boxes.slots)
        self.boxes = boxes
        self.shared = shared
        self.calls = 0

    def start_all_to_all(self, out: torch.Tensor, rows: torch.Tensor, receive: Sequence[int], send: Sequence[int]):
        self.calls += 1
        assert rows.dtype == out.dtype == torch.uint8 and sum(send) == len(rows) and sum(receive) == len(out)
        parts = [p[self.rank] for p in self.boxes.swap(self.rank, rows.split(list(send)))]
        assert [len(p) for p in parts] == list(receive)
        out.copy_(torch.cat(parts))
        return lambda: None

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.stack(self.boxes.swap(self.rank, mine.clone()))

    def gather_objects(self, value: Any) -> list[Any]:
        return self.boxes.swap(self.rank, value)

    def device(self) -> torch.device:
        return torch.device("cpu")

    def subgroup(self, groups: Sequence[Sequence[int]]) -> ThreadTransport:
        mine = tuple(next(g for g in groups if self.rank in g))
        with _LOCK:
            boxes = self.shared.setdefault(mine, Mailboxes(len(mine)))
        return ThreadTransport(mine.index(self.rank), boxes, self.shared)


_LOCK, _LOADING = threading.Lock(), threading.Lock()


def load(*arguments: Any, **options: Any) -> coterie.Model:
    """`coterie.load`, one rank after the other: transformers' loader changes its own classes while it runs."""
    with _LOADING:
        return coterie.load(*arguments, **options)


def on_ranks(size: int, work: Callable[[Group], Any], ranks_per_node: int | None = None) -> list[Any]:
    """What `work(group)` returns on each rank."""
    boxes, shared = Mailboxes(size), {}
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        transport = ThreadTransport(rank, boxes, shared) if size > 1 else None
        try:
            results[rank] = work(Group(transport, ranks_per_node))
        except BaseException as error:
            failures.append(error)
            for box in (boxes, *shared.values()):
                box.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((f for f in failures if not isinstance(f, threading.BrokenBarrierError)), failures[0])
    return results
