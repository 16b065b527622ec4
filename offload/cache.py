"""A pool of slots that experts of all layers share: fixed memory, a table of what is where, a policy for what gives way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from coterie.offload.ahead import Guesser
from coterie.offload.policies import DEFAULT, MAKERS, lowest
from coterie.offload.slots import Slots
from coterie.offload.store import ExpertStore
from coterie.offload.tiers import LEAST, HostTier, Misses
from coterie.offload.whole_path import CONTEXT_BYTES, MOST, TOKENS, Context
from coterie.routing.errors import CoterieError

DEPTH = 6  # layers ahead that experts are read for
AHEAD_SHARE = 0.25  # of the slots, that may wait for later layers
MOST_COMING = 12  # experts, from which on nothing more is read ahead
LEAST_WORTH, MOST_WORTH = 0.4, 0.9  # of an expert's chance to be asked for, where guesses never and where they always are in
# the way of what is needed
BUSY_LAYERS = 64  # that tell how often
PATH_BYTES = 2 * 512  # by expert and layer: a byte for each of 512 tokens, twice (predictors.Path)


@dataclass
class CacheStatistics:
    """requests: experts asked for, once a step; missed: of these, not there, or only because they had been read ahead;
    transfers: experts read, for nothing too; prefetched: of these, before they were asked for.

    on_host: computed on the host instead of being brought to the device. seconds: waiting for reads, and in the policy.
    """

    requests: int = 0
    transfers: int = 0
    prefetched: int = 0
    missed: int = 0
    on_host: int = 0
    stalled_seconds: float = 0.0
    policy_seconds: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        """1 - transfers / requests, what was computed on the host counted as transferred; None before the first."""
        return 1 - (self.transfers + self.on_host) / self.requests if self.requests else None


class Sample(NamedTuple):
    """What a cache had done when a step of its first layer began. seconds: of a clock, and so far stalled."""

    seconds: float
    requests: int
    transfers: int
    bytes: int
    stalled_seconds: float


class ExpertCache:
    """`slots` experts of `layers` x `experts`, in `pools` by parameter: tensors, or on a CPU what `offload/slots.py` has.

    shapes: of one expert, by parameter; the same in all layers; dtypes: of parameters that are not in `dtype`. source: where
    they come from; on a GPU a `HostTier`, in which `misses` may have them computed.
    """

    def __init__(
        self, source: ExpertStore | HostTier, experts: int, slots: int, shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype, top_k: int, policy: str = DEFAULT, device: torch.device | str = "cpu", misses: Misses | None = None,
        dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        layers = len(source.records)
        self.source, self.experts, self.slots, self.top_k, self.misses = source, experts, slots, top_k, misses
        self.store = source.store if isinstance(source, HostTier) else source
        kept = {name: dtypes.get(name, dtype) for name in shapes}
        records, block = self.store.records, self.store.files.block
        self.memory = Slots(slots, shapes, kept, torch.device(device), records, block, moving=not dtypes)
        self.pools = self.memory.pools
        self.slot_of = np.full(layers * experts, -1, dtype=np.int64)
        self.free = list(range(slots - 1, -1, -1))
        self.policy = MAKERS[policy](layers, experts, top_k, slots)
        self.statistics = CacheStatistics()
        self.samples: list[Sample] | None = None  # a step each, where a timeline is recorded
        self.coming: dict[int, Future[None]] = {}  # experts that have a slot and are still being read
        self.busy = 0.5  # the share of layers, of late, that had to wait for their own behind what was read for others
        self.early = np.zeros(layers * experts, dtype=bool)  # read ahead, and not asked for since
        self.reserved: dict[int, set[int]] = {}  # by layer, what was read for its next turn
        self.expected: tuple[int, Callable[[], Sequence[int]], bool] | None = None
        self.guesser = Guesser(layers, experts)
        self._turn, self._whose = threading.Lock(), 0  # of the thread whose step is between `announce` and its last arrival

    def read(self, step: Sequence[Context]) -> None:
        """What the next step reads, before its first layer: each token's id and those before it, in the order of its rows.

        What it is expected to ask for in the first layers is read as room allows. Not needed, nor is `routed`.
        """
        self._begin_turn()
        try:
            began = time.perf_counter()
            self.guesser.token.read(step)
            self.statistics.policy_seconds += time.perf_counter() - began
            if 0 < len(step) <= MOST:
                count = min(self.top_k * len(step), self.experts)
                self._read_guessed(0, (), count, np.zeros(0, dtype=np.int64))
        finally:
            self._end_turn()

    def routed(self, layer: int, experts: np.ndarray) -> None:
        """What each row of a step picked, `[tokens, top_k]`, -1 for an empty slot or an expert of another rank."""
        began = time.perf_counter()
        self.guesser.token.observe_each(layer, experts)
        self.statistics.policy_seconds += time.perf_counter() - began

    def announce(self, layer: int, experts: Sequence[int]) -> None:
        """All experts that a step of this layer will ask for, each once; reading those that free slots can take begins.

        Raises CoterieError while another thread's step is under way: what that one waits for would give way.
        """
        self._begin_turn()
        try:
            self._announce(layer, experts)
        except BaseException:
            self._end_turn()
            raise

    def _begin_turn(self) -> None:
        if not self._turn.acquire(blocking=False) and self._whose != threading.get_ident():
            raise CoterieError("another thread is computing with this model, whose experts are on disk; one thread at a time")
        self._whose = threading.get_ident()

    def _end_turn(self) -> None:
        if self._turn.locked() and self._whose == threading.get_ident():
            self._whose = 0
            self._turn.release()

    def _announce(self, layer: int, experts: Sequence[int]) -> None:
        if layer == 0 and self.samples is not None:
            s = self.statistics
            now = Sample(time.perf_counter(), s.requests, s.transfers, self.store.counter.bytes, s.stalled_seconds)
            self.samples.append(now)
        at = layer * self.experts + np.asarray(experts, dtype=np.int64)
        missing = at[self.slot_of[at] < 0].tolist()
        behind = bool(missing) and any(future.running() for future in self.coming.values())
        self.busy += (behind - self.busy) / BUSY_LAYERS
        unread = len(missing) + int(self.early[at].sum())
        self.early[at] = False
        self.reserved = {ahead: held for ahead, held in self.reserved.items() if layer < ahead <= layer + DEPTH}
        coming = self.coming.keys() & set(at.tolist())  # some of it perhaps behind what else is read ahead
        self._start((self._give_way(at) + missing if missing or coming else [])[: len(self.free)])
        began = time.perf_counter()
        self.policy.observe(layer, np.asarray(experts, dtype=np.int64), unread)
        self.guesser.observe(layer, experts)
        self.statistics.policy_seconds += time.perf_counter() - began
        self.statistics.requests += len(experts)
        self.statistics.missed += unread

    def arrivals(self, layer: int, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """(place in `experts`, slot) of all of them, in groups as they come: first what is there, then what is read.

        A group's slots are valid until the next one is asked for; with few slots its experts may give way to later ones.
        Reading what was expected gives way to what is needed, and goes on behind it.
        """
        try:
            yield from self._arrivals(layer, experts)
        finally:
            self._end_turn()

    def _arrivals(self, layer: int, experts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        at = layer * self.experts + np.asarray(experts, dtype=np.int64)
        left = dict(zip(at.tolist(), range(len(at)), strict=True))
        missing = [one for one in left if self.slot_of[one] < 0]
        while left:
            missing = missing[self._start_some(missing, left) :]
            if not missing and self.expected is not None:
                expected, self.expected = self.expected, None
                self._read_ahead(*expected, at)
                self._spare(at)
            there = [one for one in left if self.slot_of[one] >= 0 and one not in self.coming]
            if not there:
                if not self.coming:  # nothing is under way for want of room: what was read ahead has it
                    if not self.reserved:
                        raise CoterieError(
                            f"{len(self.free)} of {self.slots} slots for experts are free after reads that failed"
                        )
                    self.reserved.clear()
                    continue
                first = next((one for one in left if one in self.coming), None)
                self._wait([first] if first is not None else list(self.coming))  # the latter: what was read ahead has the room
                self._wait([one for one, future in self.coming.items() if future.done()])
                there = [one for one in left if self.slot_of[one] >= 0 and one not in self.coming]
            if there:  # else room was made by what came for later
                yield [(left.pop(one), int(self.slot_of[one])) for one in there]

    @contextmanager
    def on_host(self, layer: int, experts: Sequence[int], rows: Sequence[int]) -> Iterator[dict[int, int]]:
        """Which of them (place in `experts`) are to be computed on the host, and in which slot of its memory, while it lasts.

        rows: how many each has. Free slots are filled first. Afterwards those worth more than what is on the device may follow.
        """
        if self.misses is None or not isinstance(self.source, HostTier):
            yield {}
            return
        try:
            yield from self._on_host(self.misses, self.source, layer, experts, rows)
        except BaseException:  # then nothing is asked for in this layer any more
            self._end_turn()
            raise

    def _on_host(
        self, misses: Misses, source: HostTier, layer: int, experts: Sequence[int], rows: Sequence[int]
    ) -> Iterator[dict[int, int]]:
        at = layer * self.experts + np.asarray(experts, dtype=np.int64)
        absent = [place for place, one in enumerate(at.tolist()) if self.slot_of[one] < 0][len(self.free) :]
        chosen = [place for place in absent if misses.on_host(rows[place])][: max(0, source.slots - LEAST)]
        with source.held(layer, [experts[place] for place in chosen]) as slots:
            yield dict(zip(chosen, slots, strict=True))
        self.statistics.on_host += len(chosen)
        if chosen and not self.free:
            worth = self.policy.keep()
            least = worth[self.slot_of >= 0].min()
            self._prefetch(layer, [experts[place] for place in chosen if worth[at[place]] > least], at)
            self.early[at] = False  # they were asked for

    def expect(self, layer: int, experts: Callable[[], Sequence[int]], sure: bool = False) -> None:
        """What the next step's router would pick now, likeliest first: read behind what is needed, as room allows.

        Asked for once that is being read. If sure and not empty all is read; else not where the path so far has been a better
        guide, or neither was any good (offload/ahead.py).
        """
        self.expected = layer, experts, sure

    def _read_ahead(self, layer: int, experts: Callable[[], Sequence[int]], sure: bool, held: np.ndarray) -> None:
        """The experts that the next layer is expected to ask for, and other guesses for those after it."""
        router = experts()
        if sure and router:
            self._prefetch(layer, router, held)
        else:
            self._read_guessed(layer, router, len(held), held)

    def _read_guessed(self, layer: int, router: Sequence[int], count: int, held: np.ndarray) -> None:
        """What is guessed of `layer`, the next one, and those after it, `count` experts of each; `held` stay."""
        began = time.perf_counter()
        worth = min(max(self.busy, LEAST_WORTH), MOST_WORTH)
        wanted: list[int] = []
        room = max(0, min(self._room_ahead(), MOST_COMING - len(self.coming)))
        for ahead in range(1, DEPTH + 1):
            later = layer + ahead - 1
            if later == len(self.source.records) or (ahead > 1 and len(wanted) >= room):
                break
            first = later * self.experts
            absent = self.slot_of[first : first + self.experts] < 0
            wanted += [
                first + one for one in self.guesser.guess(later, router if ahead == 1 else (), count, ahead, worth, absent)
            ]
        self.statistics.policy_seconds += time.perf_counter() - began
        self._start_ahead(wanted[:room], held)

    def _prefetch(self, layer: int, experts: Sequence[int], held: np.ndarray) -> None:
        """Those of them that are not there."""
        at = layer * self.experts + np.asarray(experts, dtype=np.int64)
        self._start_ahead(at[self.slot_of[at] < 0].tolist(), np.concatenate([held, at]))

    def _room_ahead(self) -> int:
        """How many more experts may wait for later layers."""
        return max(0, int(AHEAD_SHARE * self.slots) - sum(map(len, self.reserved.values())))

    def _start_ahead(self, missing: list[int], held: np.ndarray) -> None:
        """What is read so stays until its layer's turn, if nothing needed wants the room."""
        missing = missing[: self._room_ahead()]
        started = missing[: self._start_some(missing, held, ahead=True)]
        for one in started:
            self.reserved.setdefault(one // self.experts, set()).add(one)
        self.early[started] = True
        self.statistics.prefetched += len(started)

    def _start_some(self, missing: list[int], kept: Collection[int], ahead: bool = False) -> int:
        """Begin to read the first of these, as many as there is room for without `kept`; returns how many."""
        if not missing:
            return 0
        count = self._make_room(len(missing), kept)
        self._start(missing[:count], ahead)
        return count

    def _spare(self, kept: Collection[int]) -> None:
        """Leave a few slots free, while there is time, so that the next layer's reads need not wait for the policy."""
        if self.slots < self.slot_of.size and self.misses is None:
            self._make_room(min(self.top_k, self.slots // 8), kept)

    def _make_room(self, count: int, kept: Collection[int]) -> int:
        """Free slots, up to `count` of them, at the cost of what is worth least and is not `kept`; how many there are."""
        if count <= len(self.free):
            return count
        began = time.perf_counter()
        pinned = np.fromiter((*kept, *self.coming, *chain.from_iterable(self.reserved.values())), dtype=np.int64)
        held = self.slot_of >= 0
        held[pinned] = False
        count = min(count, len(self.free) + int(held.sum()))
        if count > len(self.free):
            victims = lowest(self.policy.keep(), held, pinned, count - len(self.free))
            self.policy.gone(victims)
            self._forget(victims)
        self.statistics.policy_seconds += time.perf_counter() - began
        return count

    def _start(self, experts: list[int], ahead: bool = False) -> None:
        if not experts:
            return
        self.statistics.transfers += len(experts)
        slots, wanted = [self.free.pop() for _ in experts], []
        try:
            for one, slot in zip(experts, slots, strict=True):
                layer, expert = divmod(one, self.experts)
                wanted.append((layer, expert, self.memory.place(slot, self.store.shifts(layer, expert))))
            self.slot_of[experts] = slots
            self.coming.update(zip(experts, self.source.start_many(wanted, ahead), strict=True))
        except BaseException as error:  # such as ctrl-C: whether something is written to the slots is not known then
            self.slot_of[experts] = -1
            if isinstance(error, Exception):
                self.free += slots
            raise

    def _give_way(self, needed: np.ndarray) -> list[int]:
        """Of what was being read for later: what is there is like any other, what has not begun is called off.

        Returns what of that is needed now, to be read before all else.
        """
        self._wait([one for one, future in self.coming.items() if future.done()])
        off = [one for one, future in self.coming.items() if future.cancel()]
        self._forget(off)
        for one in off:
            del self.coming[one]
            self.reserved.get(one // self.experts, set()).discard(one)
        self.statistics.transfers -= len(off)
        self.statistics.prefetched -= len(off)
        return sorted(set(off) & set(needed.tolist()))

    def _wait(self, experts: list[int]) -> None:
        """Until these are there. What failed is forgotten, for its slot holds nothing, and so is all that was under way."""
        began = time.perf_counter()
        for one in experts:
            error = self.coming[one].exception()  # ctrl-C here leaves it among those that are coming
            if error is not None:
                self._forget([one])
                del self.coming[one]
                self._abandon()
                raise error
            del self.coming[one]
        self.statistics.stalled_seconds += time.perf_counter() - began if experts else 0.0

    def _abandon(self) -> None:
        """Forget all that is being read, once nobody writes there any more."""
        for one, future in list(self.coming.items()):
            if not future.cancel():
                future.exception()
            self._forget([one])
            del self.coming[one]

    def _forget(self, experts: np.ndarray | list[int]) -> None:
        """In this order: interrupted, a slot may be nobody's for good, but never two experts'."""
        slots = self.slot_of[experts]
        self.slot_of[experts] = -1
        self.early[experts] = False
        self.free += slots[slots >= 0].tolist()


def remembered_bytes(layers: int, experts: int, top_k: int) -> int:
    """What the default policy and the guesser remember of earlier tokens: paths, a matrix of transitions, and scores."""
    return layers * experts * (2 * PATH_BYTES + 4 * experts + 100) + TOKENS * (CONTEXT_BYTES + 4 * layers * top_k)
