"""Host memory between the disk and a GPU: experts that were read stay there, pinned, as many as its budget holds.

What a device misses is copied from here by the store's threads, on streams of their own, or computed here (`Misses`).
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch

from coterie.offload.slots import Slots
from coterie.offload.store import AHEAD_READERS, READERS, ExpertStore, Wanted, start_each
from coterie.offload.transfer import Record
from coterie.routing.errors import CoterieError

LEAST = READERS + AHEAD_READERS + 1  # experts: one for each reader, and one that can give way


@dataclass(frozen=True)
class Misses:
    """What is done about an expert that the device does not have: brought there, or computed on the host.

    row_seconds: of one token's row on the host; copy_seconds: of one expert to the device; None where that is not weighed.
    """

    row_seconds: float | None = None
    copy_seconds: float | None = None

    def on_host(self, rows: int) -> bool:
        """Whether so many rows are better computed where the expert is."""
        return self.row_seconds is None or self.copy_seconds is None or rows * self.row_seconds < self.copy_seconds


class HostTier:
    """`slots` experts of those in `store`, LEAST or all; what was used longest ago gives way. `start`, `close`: the store's.

    shapes: of one expert, by parameter; dtypes: of parameters that are not in `dtype`. pinned: the memory is registered with
    CUDA, so that copies run beside computing.
    """

    def __init__(
        self, store: ExpertStore, slots: int, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, pinned: bool,
        dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.store, self.slots = store, slots
        kept = {name: dtypes.get(name, dtype) for name in shapes}
        self.memory = Slots(slots, shapes, kept, torch.device("cpu"), store.records, store.files.block, moving=False)
        self.pools: dict[str, torch.Tensor] = self.memory.stacked
        self._unpin: weakref.finalize[..., HostTier] | None = None
        if pinned:
            self._pin()
        self.slot_of: OrderedDict[tuple[int, int], int] = OrderedDict()  # by (layer, expert), the longest unused first
        self.free = list(range(slots - 1, -1, -1))
        self.busy: dict[tuple[int, int], int] = {}  # how many are using it
        self.lock = threading.Lock()
        self._come = threading.Condition(self.lock)  # whenever one of `_coming` is there, or failed
        self._coming: set[tuple[int, int]] = set()  # being read from disk
        self._own = threading.local()

    @property
    def records(self) -> Sequence[Sequence[Record]]:
        """The store's."""
        return self.store.records

    def _pin(self) -> None:
        pinned: list[torch.Tensor] = []  # kept until they are registered no more: their addresses will be others' later
        self._unpin = weakref.finalize(self, _unregister, pinned)
        for memory in (stack.memory for stack in self.memory.stacks.values()):
            size = memory.numel()
            if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)):  # type: ignore[no-untyped-call]
                self._unpin()
                raise CoterieError(f"host memory: {size / 1e9:.1f} GB cannot be pinned; give a smaller --host-memory")
            pinned.append(memory)

    def start(self, layer: int, expert: int, into: Mapping[str, torch.Tensor], ahead: bool = False) -> Future[None]:
        """As `ExpertStore.start`. What the device is still computing may read the old contents of `into`: it is waited for."""
        ready = None
        if next(iter(into.values())).is_cuda:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(next(iter(into.values())).device))
        return (self.store.ahead if ahead else self.store.readers).submit(self._deliver, (layer, expert), into, ready)

    def start_many(self, experts: Sequence[Wanted], ahead: bool = False) -> list[Future[None]]:
        """As `ExpertStore.start_many`."""
        return start_each(self.start, experts, ahead)

    def _deliver(self, key: tuple[int, int], into: Mapping[str, torch.Tensor], ready: torch.cuda.Event | None) -> None:
        slot = self._taken(key)
        try:
            if ready is None:
                for name, out in into.items():
                    out.copy_(self.pools[name][slot])
                return
            with torch.cuda.stream(self._stream(next(iter(into.values())).device)) as _:
                stream = torch.cuda.current_stream()
                stream.wait_event(ready)
                for name, out in into.items():
                    out.copy_(self.pools[name][slot], non_blocking=True)
                stream.synchronize()
        finally:
            self._released(key)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """This thread's own."""
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._own.stream
        return stream

    def _taken(self, key: tuple[int, int]) -> int:
        """The slot of an expert that stays until it is released; read from disk if it was not there."""
        with self.lock:
            self.busy[key] = self.busy.get(key, 0) + 1
            self._come.wait_for(lambda: key not in self._coming)
            if key in self.slot_of:
                self.slot_of.move_to_end(key)
                return self.slot_of[key]
            slot = self.free.pop() if self.free else self._given_up()
            self._coming.add(key)
        try:
            self.store.read(*key, self.memory.place(slot, ()))
        except BaseException:
            self._arrived(key, None, slot)
            self._released(key)
            raise
        self._arrived(key, slot)
        return slot

    def _arrived(self, key: tuple[int, int], slot: int | None, unused: int | None = None) -> None:
        with self.lock:
            self._coming.discard(key)
            if slot is not None:
                self.slot_of[key] = slot
            if unused is not None:
                self.free.append(unused)
            self._come.notify_all()

    def _given_up(self) -> int:
        """The slot of what was unused longest."""
        victim = next(key for key in self.slot_of if key not in self.busy)
        return self.slot_of.pop(victim)

    def _released(self, key: tuple[int, int]) -> None:
        with self.lock:
            self.busy[key] -= 1
            if not self.busy[key]:
                del self.busy[key]

    @contextmanager
    def held(self, layer: int, experts: Sequence[int]) -> Iterator[list[int]]:
        """Their slots, for as long as they are computed here; at most `slots - LEAST` at once."""
        futures = [self.store.readers.submit(self._taken, (layer, expert)) for expert in experts]
        taken = []
        try:
            for expert, future in zip(experts, futures, strict=True):
                taken.append((expert, future.result()))
            yield [slot for _, slot in taken]
        finally:
            for expert, future in zip(experts, futures, strict=True):
                if future.exception() is None:
                    self._released((layer, expert))

    def close(self) -> None:
        """Give files and threads back, and memory to the system as it was."""
        self.store.close()
        if self._unpin is not None:
            self._unpin()


def _unregister(pinned: list[torch.Tensor]) -> None:
    while pinned:
        torch.cuda.cudart().cudaHostUnregister(pinned.pop().data_ptr())  # type: ignore[no-untyped-call]
