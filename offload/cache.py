"""A pool of slots that experts of all layers share: fixed tensors, a table of what is where, a policy for what gives way."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coterie.offload.policies import MAKERS, lowest
from coterie.offload.store import ExpertStore

DEFAULT = "coterie"


@dataclass
class CacheStatistics:
    """requests: experts asked for, once a step; transfers: those that had to be read; seconds: reading while all else waited,
    and in the policy."""

    requests: int = 0
    transfers: int = 0
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

    def announce(self, layer: int, experts: Sequence[int]) -> None:
        """All experts that a step of this layer will ask for, each once."""
        at = layer * self.experts + np.asarray(experts, dtype=np.int64)
        missing = int((self.slot_of[at] < 0).sum())
        began = time.perf_counter()
        self.policy.observe(layer, np.asarray(experts, dtype=np.int64), missing)
        self.statistics.policy_seconds += time.perf_counter() - began
        self.statistics.requests += len(experts)

    def places(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Their slots, at most `slots` of them at once; what is not there is read. Valid until the next call."""
        at = layer * self.experts + np.asarray(experts, dtype=np.int64)
        missing = at[self.slot_of[at] < 0]
        if len(missing):
            self._make_room(len(missing) - len(self.free), at)
            wanted = []
            for one in missing.tolist():
                slot = self.slot_of[one] = self.free.pop()
                wanted.append((layer, one - layer * self.experts, {name: pool[slot] for name, pool in self.pools.items()}))
            began = time.perf_counter()
            try:
                self.store.read_into(wanted)
            except BaseException:
                self._forget(missing)  # half-filled slots hold nothing
                raise
            self.statistics.stalled_seconds += time.perf_counter() - began
            self.statistics.transfers += len(missing)
        found: list[int] = self.slot_of[at].tolist()
        return found

    def _make_room(self, count: int, needed: np.ndarray) -> None:
        if count <= 0:
            return
        began = time.perf_counter()
        self._forget(lowest(self.policy.keep(), self.slot_of >= 0, needed, count))
        self.statistics.policy_seconds += time.perf_counter() - began

    def _forget(self, experts: np.ndarray) -> None:
        self.free += self.slot_of[experts].tolist()
        self.slot_of[experts] = -1
