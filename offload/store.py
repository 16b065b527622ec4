"""Where each expert's weights lie in a checkpoint, and reading them into slots, in place and off the interpreter's lock.

Files are opened with O_DIRECT where the file system has it, so that reading neither fills memory with cached pages nor waits
for page faults. Where the system has asynchronous reads they are used (offload/reader.py), otherwise threads and `preadv`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType

import torch

from coterie.offload.checkpoint import ReadCounter, Version
from coterie.offload.files import Files
from coterie.offload.reader import AsyncReader
from coterie.offload.transfer import (
    STAGE_BYTES,
    Expected,
    Own,
    Record,
    Request,
    Slot,
    Transfer,
    aligned_empty,
    own_shift,
    plan,
    shifts_of,
)

READERS = 4  # threads for what is needed, where the system has no asynchronous reads; and
PLANNED = 4096  # experts whose reads are remembered, about 1 KB each
AHEAD_READERS = 2  # for what may be: few, so that what is needed meanwhile does not wait long


Wanted = tuple[int, int, Mapping[str, torch.Tensor]]  # layer, expert, and the tensors that it goes to


def start_each(start: Callable[..., Future[None]], experts: Sequence[Wanted], ahead: bool) -> list[Future[None]]:
    """`start_many` by `start`."""
    begun: list[Future[None]] = []
    try:
        for one in experts:
            begun.append(start(*one, ahead))  # noqa: PERF401 - what was begun before one fails is needed
    except BaseException:
        for future in begun:
            if not future.cancel():
                future.exception()
        raise
    return begun


class ExpertStore:
    """All experts of a checkpoint. records: `[layer][expert]`, layers by their place among those with experts.

    checksums: `[layer][expert]`, what the bytes of an expert's parts must give (offload/checksum.py); None: not checked.
    versions: of the files when their headers were read, as far as they are known.
    """

    def __init__(
        self, records: Sequence[Sequence[Record]], counter: ReadCounter, checksums: Sequence[Sequence[str]] | None = None,
        versions: Mapping[Path, Version] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.records = records
        self.counter = counter
        self.checksums = checksums
        self.files = Files(
            {piece.file for layer in records for record in layer for part in record.values() for piece in part.pieces}, versions
        )
        self.readers = ThreadPoolExecutor(READERS, "coterie-read")
        self.ahead = ThreadPoolExecutor(AHEAD_READERS, "coterie-ahead")
        self._own = threading.local()
        block, in_order = self.files.block, checksums is not None

        @lru_cache(PLANNED)
        def planned(layer: int, expert: int, shifts: tuple[int | None, ...]) -> list[Request]:
            return plan(records[layer][expert], shifts, in_order, block)

        self._planned = planned
        self._shifts = [[tuple(own_shift(part, block) for part in record.values()) for record in layer] for layer in records]

    @cached_property
    def asynchronous(self) -> AsyncReader | None:
        """What reads while the processor computes; None where threads do: without O_DIRECT, or if the system refuses."""
        if not self.files.direct:
            return None
        try:
            reader = AsyncReader(self.files)
        except OSError:
            return None
        weakref.finalize(self, reader.close)
        return reader

    def start_many(self, experts: Sequence[Wanted], ahead: bool = False) -> list[Future[None]]:
        """As `start` of each; if one cannot be begun, nothing is written to any of them any more when that is raised."""
        if self.asynchronous is None:
            return start_each(self.start, experts, ahead)
        return self.asynchronous.start([self._transfer(*one) for one in experts], ahead)

    def start(self, layer: int, expert: int, into: Mapping[str, torch.Tensor], ahead: bool = False) -> Future[None]:
        """Begin to fill the tensors (by parameter) with an expert, casting as needed; what has not begun can be cancelled.

        ahead: not needed yet, behind others of that kind.
        The result raises CoterieError, naming the file, for an error of the disk, a file that was written to meanwhile, or
        bytes that do not give their checksum.
        """
        if self.asynchronous is None:
            return (self.ahead if ahead else self.readers).submit(self.read, layer, expert, into)
        return self.asynchronous.start([self._transfer(layer, expert, into)], ahead)[0]

    def read(self, layer: int, expert: int, into: Mapping[str, torch.Tensor]) -> None:
        """The same in the calling thread."""
        transfer = self._transfer(layer, expert, into)
        own = self.stage()
        for request in transfer.requests:
            self.files.fill(request, transfer.views(request, own))
            transfer.take(request, own)
        self.files.finish(transfer)

    def shifts(self, layer: int, expert: int) -> tuple[int, ...]:
        """How far behind a page each part of an expert is best read to (`transfer.own_shift`)."""
        return self._shifts[layer][expert]

    def _transfer(self, layer: int, expert: int, into: Mapping[str, torch.Tensor]) -> Transfer:
        record, slot = self.records[layer][expert], into if isinstance(into, Slot) else Slot(into)
        requests = self._planned(layer, expert, shifts_of(record, slot))
        expected = None if self.checksums is None else Expected(self.checksums[layer][expert], layer, expert)
        return Transfer(record, slot, requests, self.counter, expected)

    def stage(self) -> Own:
        """This thread's own memory for what cannot be read right into its place, `[STAGE_BYTES]`."""
        if not hasattr(self._own, "stage"):
            self._own.stage = Own.of(aligned_empty((STAGE_BYTES,), torch.uint8).numpy())
        found: Own = self._own.stage
        return found

    def close(self) -> None:
        """Give the files and threads back, once nothing is being read any more; what has not begun is called off."""
        if (reader := vars(self).get("asynchronous")) is not None:
            reader.close()
        self.readers.shutdown(cancel_futures=True)
        self.ahead.shutdown(cancel_futures=True)
        self.files.close()
