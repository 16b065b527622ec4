"""Which rank runs which prompt: queues by home rank, from which idle ranks also take.

Every rank keeps the same queues and computes the same answer, so nobody has to be told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from coterie.moe.batch import Request

PREFILL_TOKENS = 8192  # of one rank in one step, padding included; a longer prompt runs alone


class Queue:
    """Requests that wait. homes: the home rank of each; by default request i is at home on rank i modulo the ranks."""

    def __init__(self, requests: Sequence[Request], ranks: int, homes: Sequence[int] | None = None) -> None:
        self._waiting: list[deque[Request]] = [deque() for _ in range(ranks)]
        for request, home in zip(requests, homes or [r.index % ranks for r in requests], strict=True):
            self._waiting[home].append(request)

    def __len__(self) -> int:
        return sum(map(len, self._waiting))

    def assign(self, room: Sequence[int]) -> list[list[Request]]:
        """What each rank begins now; room: how many it can take. Its own come first; a rank without any takes others'."""
        taken = [_take(own, free, []) for own, free in zip(self._waiting, room, strict=True)]
        for rank, free in enumerate(room):
            if free and not taken[rank] and not self._waiting[rank]:
                longest = max(self._waiting, key=len)
                _take(longest, min(free, -(-len(longest) // len(room))), taken[rank])
        return taken


def _take(queue: deque[Request], free: int, taken: list[Request]) -> list[Request]:
    while queue and len(taken) < free:
        longest = max(len(r.token_ids) for r in [*taken, queue[0]])
        if taken and longest * (len(taken) + 1) > PREFILL_TOKENS:
            break
        taken.append(queue.popleft())
    return taken
