"""A pool of slots that experts of all layers share: fixed tensors, a table of what is where, a policy for what gives way."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from coterie.offload.policies import MAKERS, lowest
from coterie.offload.store import ExpertStore

DEFAULT = "coterie"


@dataclass
class CacheStatistics:
    """requests: experts asked for, once a step; transfers: experts read; prefetched: of these, before they were asked for.

    seconds: waiting for reads, and in the policy.
    """

    requests: int = 0
    transfers: int = 0
    prefetched: int = 0
    stalled_seconds: float = 0.0
    policy_seconds: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        """1 - transfers / requests; None before the first."""
        return 1 - self.transfers / self.requests if self.requests else None


class ExpertCache:
    """`slots` experts of `layers` x `experts`, in tensors `[slots, ...]` by parameter.

    shapes: of one expert, by parameter; the same in all layers.
    """

    def __init__(
        self, store: ExpertStore, experts: int, slots: int, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype,
        top_k: int, policy: str = DEFAULT,
    ) -> None:  # fmt: skip
        layers = len(store.records)
        self.store, self.experts, self.slots = store, experts, slots
        self.pools = {name: torch.empty((slots, *shape), dtype=dtype) for name, shape in shapes.items()}
        self.slot_of = np.full(layers * experts, -1, dtype=np.int64)
        self.free = list(range(slots - 1, -1, -1))
        self.policy = MAKERS[policy](layers, experts, top_k, slots)
        self.statistics = CacheStatistics()
        self.coming: dict[int, Future[None]] = {}  # experts that have a slot and are still being read
        self.expected: tuple[int, Sequence[int]] | None = None

    def announce(self, layer: int, experts: Sequence[int]) -> None:
        """All experts that a step of this layer will ask for, each once."""
        at = layer * self.experts + np.asarray(experts, dtype=np.int64)
        missing = int((self.slot_of[at] < 0).sum())
        began = time.perf_counter()
        self.policy.observe(layer, np.asarray(experts, dtype=np.int64), missing)
        self.statistics.policy_seconds += time.perf_counter() - began
        self.statistics.requests += len(experts)

    def places(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Their slots, at most `slots` of them at once; what is not there is read. Valid until the next call.

        Reading what was expected gives way to what is needed, and goes on when that is there.
        """
        at = layer * self.experts + np.asarray(experts, dtype=np.int64)
        missing = at[self.slot_of[at] < 0]
        if len(missing):
            self._give_way(at)
            if len(missing) > len(self.free) + self._evictable(at):
                self._wait(np.fromiter(self.coming, dtype=np.int64))  # what has begun for later holds the room
            self._make_room(len(missing) - len(self.free), at)
            self._start(missing)
            self.statistics.transfers += len(missing)
        self._wait(at)
        if self.expected is not None:
            following, self.expected = self.expected, None
            self._prefetch(*following, at)
        found: list[int] = self.slot_of[at].tolist()
        return found

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """What a coming step is expected to ask for: read once the present one has all that it needs."""
        self.expected = layer, experts

    def _prefetch(self, layer: int, experts: Sequence[int], held: np.ndarray) -> None:
        at = layer * self.experts + np.asarray(experts, dtype=np.int64)
        missing = at[self.slot_of[at] < 0]
        kept = np.concatenate([held, at])
        if not len(missing) or len(missing) > len(self.free) + self._evictable(kept):
            return  # no room beside what is in use
        self._make_room(len(missing) - len(self.free), kept)
        self._start(missing)
        self.statistics.transfers += len(missing)
        self.statistics.prefetched += len(missing)

    def _start(self, experts: np.ndarray) -> None:
        for one in experts.tolist():
            slot = self.slot_of[one] = self.free.pop()
            into = {name: pool[slot] for name, pool in self.pools.items()}
            self.coming[one] = self.store.start(one // self.experts, one % self.experts, into)

    def _give_way(self, needed: np.ndarray) -> None:
        """Of what was being read for later: what is there is like any other, what has not begun is called off."""
        self._wait(np.array([one for one, future in self.coming.items() if future.done()], dtype=np.int64))
        for one in set(self.coming) - set(needed.tolist()):
            if self.coming[one].cancel():
                del self.coming[one]
                self._forget(np.array([one]))
                self.statistics.transfers -= 1
                self.statistics.prefetched -= 1

    def _wait(self, needed: np.ndarray) -> None:
        """Until these are there. An expert whose reading failed is forgotten: its slot holds nothing."""
        began, waiting = time.perf_counter(), [one for one in needed.tolist() if one in self.coming]
        failure: BaseException | None = None
        for one in waiting:
            error = self.coming.pop(one).exception()
            if error is not None:
                self._forget(np.array([one]))
                failure = error
        self.statistics.stalled_seconds += time.perf_counter() - began if waiting else 0.0
        if failure is not None:
            raise failure

    def _kept(self, needed: np.ndarray) -> np.ndarray:
        """What may not give way: these, and what is being read."""
        return np.concatenate([needed, np.fromiter(self.coming, dtype=np.int64)])

    def _evictable(self, needed: np.ndarray) -> int:
        held = self.slot_of >= 0
        held[self._kept(needed)] = False
        return int(held.sum())

    def _make_room(self, count: int, needed: np.ndarray) -> None:
        if count <= 0:
            return
        began = time.perf_counter()
        victims = lowest(self.policy.keep(), self.slot_of >= 0, self._kept(needed), count)
        self.policy.gone(victims)
        self._forget(victims)
        self.statistics.policy_seconds += time.perf_counter() - began

    def _forget(self, experts: np.ndarray) -> None:
        self.free += self.slot_of[experts].tolist()
        self.slot_of[experts] = -1
