"""An expert on its way from disk into tensors: which blocks of files are read for it, and where their bytes go.

A checkpoint's offsets are not aligned to blocks. What lies in memory at the same distance from a block as in its file (see
`usual_shift`) is read right into its place by one scattered read, all of an expert that lies together in the file at once.
Blocks that hold the end of one part and the beginning of another go to a scratch, and are copied from there. What lies
otherwise is read into memory of the reader's own, and copied from there.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from ctypes import memmove
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from coterie.offload.aio import MOST_PLACES
from coterie.offload.checkpoint import ReadCounter
from coterie.offload.checksum import Checksum, check

BLOCK = 4096  # what O_DIRECT can always do with: offsets, lengths and places in memory are multiples
SECTOR = 512  # what it can do with on most devices
STAGE_BYTES = 2 << 20  # the most that is read at once; of 4 MiB ahead what is needed would wait too long
LEAST_DIRECT = 4  # blocks from which on a piece is read right into its place
MOST_SPANS = (
    MOST_PLACES - 1
) // 2  # of a request that is: pieces that lie one after another, a block of the scratch around each
EDGES = (MOST_SPANS + 1) * BLOCK  # bytes of the scratch for a request's blocks that are not all one span's


@dataclass(frozen=True)
class Piece:
    """A run of bytes of a file."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Part:
    """One parameter of one expert, `shape` in `dtype` as stored: the pieces one after another; none where it is still to be."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def length(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Record = Mapping[str, Part]  # by parameter: gate_up_proj, down_proj, ...


@dataclass(frozen=True)
class Span:
    """`length` bytes of a request, from `start` on, that are a parameter's from its byte `first` on, as stored."""

    name: str
    start: int
    length: int
    first: int


class Run(NamedTuple):
    """`length` bytes from `begin` on of a parameter in memory, or, where that is None, of the scratch."""

    name: str | None
    begin: int
    length: int


class Edge(NamedTuple):
    """`length` bytes of a parameter from `at` on that come to the scratch, at `scratch`."""

    name: str
    at: int
    scratch: int
    length: int


@dataclass
class Request:
    """A read of whole blocks: `least` of its bytes must be there, the file may end within the last block.

    direct: right into the places of its spans, but for blocks that are not all one span's.
    """

    file: Path
    offset: int
    least: int
    direct: bool
    spans: list[Span] = field(default_factory=list)
    block: int = BLOCK

    @property
    def length(self) -> int:
        """Bytes, to the end of the last block."""
        return -(-self.least // self.block) * self.block

    @cached_property
    def layout(self) -> tuple[list[Run], list[Edge]]:
        """Of a direct request: where its bytes go, one run after another, and what of the scratch is to be copied."""
        runs: list[Run] = []
        edges: list[Edge] = []
        at = kept = 0  # of the request, and of the scratch
        for span in self.spans:
            first, end = -(-span.start // self.block) * self.block, span.start + span.length
            last = end // self.block * self.block
            if first > at:
                runs.append(Run(None, kept, self.block))
                kept += self.block
            if first > span.start:
                edges.append(Edge(span.name, span.first, kept - (first - span.start), first - span.start))
            runs.append(Run(span.name, span.first + first - span.start, last - first))
            if last < end:  # in the block that comes next
                edges.append(Edge(span.name, span.first + last - span.start, kept, end - last))
            at = last
        if self.least > at:
            runs.append(Run(None, kept, self.block))
        return runs, edges


@dataclass(frozen=True)
class Expected:
    """What the bytes of an expert must give as a checksum, in the order of its parts."""

    checksum: str
    layer: int
    expert: int


class Slot(dict[str, torch.Tensor]):
    """Tensors that experts are read into again and again, by parameter; what must be known of them is found out once."""

    @cached_property
    def bytes(self) -> dict[str, np.ndarray]:
        """Their memory, uint8; of those that are on the CPU."""
        return {name: _bytes_of(tensor) for name, tensor in self.items() if tensor.device.type == "cpu"}

    @cached_property
    def addresses(self) -> dict[str, int]:
        """Where that begins."""
        return {name: found.ctypes.data for name, found in self.bytes.items()}

    @cached_property
    def offsets(self) -> dict[str, int]:
        """How far behind a block each begins."""
        return {name: tensor.data_ptr() % BLOCK for name, tensor in self.items()}


class Own(NamedTuple):
    """A reader's own memory, uint8, and where it begins."""

    bytes: np.ndarray
    address: int

    @classmethod
    def of(cls, memory: np.ndarray) -> Own:
        """With its address."""
        return cls(memory, memory.ctypes.data)


class Transfer:
    """An expert and the tensors `into` which it goes, by parameter. What was read is given to `take`, in the requests' order.

    requests: as `plan` makes them for these tensors. expected: None where nothing is known.
    """

    def __init__(
        self, record: Record, into: Slot, requests: Sequence[Request], counter: ReadCounter,
        expected: Expected | None = None,
    ) -> None:  # fmt: skip
        self.record, self.into, self.requests, self.counter, self.expected = record, into, requests, counter, expected
        self.seen = None if expected is None else Checksum()

    def views(self, request: Request, own: Own) -> list[np.ndarray]:
        """Where a request reads to, one after another. own: of the reader, EDGES; of what is not direct STAGE_BYTES."""
        if not request.direct:
            return [own.bytes[: request.length]]
        parts = self.into.bytes
        return [(own.bytes if name is None else parts[name])[at : at + size] for name, at, size in request.layout[0]]

    def goes_to(self, request: Request, own: Own) -> list[tuple[int, int]]:
        """The same as addresses and lengths."""
        if not request.direct:
            return [(own.address, request.length)]
        parts = self.into.addresses
        return [((own.address if name is None else parts[name]) + at, size) for name, at, size in request.layout[0]]

    def take(self, request: Request, own: Own) -> None:
        """Put the bytes of a request where they belong, once they are in its `views` with the same `own`.

        In any order, unless `seen` is not None: a checksum goes by the requests' own.
        """
        if request.direct:
            parts = self.into.addresses
            for name, at, scratch, length in request.layout[1]:
                memmove(parts[name] + at, own.address + scratch, length)
            if self.seen is not None:
                for span in request.spans:
                    self.seen.update(self.into.bytes[span.name][span.first : span.first + span.length].data)
            self.counter.add(request.least - request.spans[0].start)
            return
        for span in request.spans:
            found = own.bytes[span.start : span.start + span.length]
            if self.seen is not None:
                self.seen.update(found.data)
            if _as_stored(self.record[span.name], self.into[span.name]):
                self.into.bytes[span.name][span.first : span.first + span.length] = found
            else:
                dtype = self.record[span.name].dtype
                values = torch.from_numpy(found.copy() if found.ctypes.data % dtype.itemsize else found).view(dtype)
                self.into[span.name].view(-1)[span.first // dtype.itemsize :][: len(values)].copy_(values)
        self.counter.add(sum(span.length for span in request.spans))

    def check(self) -> None:
        """Raises CoterieError, once all has been taken, for bytes that do not give what is expected."""
        if self.seen is not None and self.expected is not None:
            check(self.seen, self.expected.checksum, self.requests[0].file, self.expected.layer, self.expected.expert)


def plan(record: Record, shifts: Sequence[int | None], in_order: bool, block: int = BLOCK) -> list[Request]:
    """What is to be read for an expert, in blocks.

    shifts: `shifts_of` the tensors that it goes into; in_order: of its parts, as a checksum is made, or else of the file.
    """
    pieces: list[tuple[Piece, str, int]] = []
    for name, part in record.items():
        first = 0
        for piece in part.pieces:
            pieces.append((piece, name, first))
            first += piece.length
    if not in_order:
        pieces.sort(key=lambda found: (str(found[0].file), found[0].offset))
    known = dict(zip(record, shifts, strict=True))
    made: list[Request] = []
    for piece, name, first in _run_together(pieces):
        shift = known[name]
        if shift is not None and (shift + first - piece.offset) % block == 0 and piece.length >= LEAST_DIRECT * block:
            _add_direct(made, piece, name, first, block)
            continue
        done = 0
        while done < piece.length:
            length = _joined(made[-1], piece, done, name, first, record[name].dtype.itemsize) if made else 0
            if not length:
                at = piece.offset + done
                made.append(Request(piece.file, at // block * block, at % block, False, block=block))
            done += length
    return made


def shifts_of(record: Record, into: Slot) -> tuple[int | None, ...]:
    """Of each part in order, how far behind a block its tensor begins in memory; None where the part must be cast for it."""
    return tuple(into.offsets[name] if _as_stored(part, into[name]) else None for name, part in record.items())


def _run_together(pieces: list[tuple[Piece, str, int]]) -> list[tuple[Piece, str, int]]:
    """Pieces that follow on each other in the file and in the parameter as one."""
    made: list[tuple[Piece, str, int]] = []
    for piece, name, first in pieces:
        if made:
            last, whose, at = made[-1]
            follows = (last.file, last.offset + last.length) == (piece.file, piece.offset)
            if follows and whose == name and at + last.length == first:
                made[-1] = Piece(last.file, last.offset, last.length + piece.length), name, at
                continue
        made.append((piece, name, first))
    return made


def _add_direct(made: list[Request], piece: Piece, name: str, first: int, block: int) -> None:
    """Requests of STAGE_BYTES at most, cut at blocks, the last one there first, if the piece follows on it."""
    at, end = piece.offset, piece.offset + piece.length
    if made and made[-1].direct and (made[-1].file, made[-1].offset + made[-1].least) == (piece.file, at):
        last = made[-1]
        until = min(end, last.offset + STAGE_BYTES)
        if len(last.spans) < MOST_SPANS and until - at >= LEAST_DIRECT * block:
            last.spans.append(Span(name, last.least, until - at, first))
            last.least += until - at
            at = until
    while at < end:
        offset = at // block * block
        until = min(end, offset + STAGE_BYTES)
        span = Span(name, at - offset, until - at, first + at - piece.offset)
        made.append(Request(piece.file, offset, until - offset, True, [span], block))
        at = until


def usual_shift(records: Iterable[Iterable[Record]], name: str) -> int:
    """Bytes by which most experts' parameter `name` begins behind a block in its file; a multiple of its values' size."""
    found = Counter(part.pieces[0].offset % BLOCK for layer in records for record in layer for part in [record[name]])
    sizes = {record[name].dtype.itemsize for layer in records for record in layer}
    shift = found.most_common(1)[0][0] if found else 0
    return shift if all(shift % size == 0 for size in sizes) else 0


def _joined(request: Request, piece: Piece, done: int, name: str, first: int, itemsize: int) -> int:
    """Let a request go on with what is left of a piece, whole values of it, if it lies there and has room; bytes added."""
    start = piece.offset + done - request.offset
    if request.direct or request.file != piece.file or start != request.least:
        return 0
    length = min(piece.length - done, (STAGE_BYTES - start) // itemsize * itemsize)
    if length > 0:
        request.spans.append(Span(name, start, length, first + done))
        request.least += length
    return max(0, length)


def _as_stored(part: Part, out: torch.Tensor) -> bool:
    """Whether a part's bytes are those of the tensor."""
    return out.dtype == part.dtype and out.device.type == "cpu"


def _bytes_of(out: torch.Tensor) -> np.ndarray:
    found: np.ndarray = out.view(-1).view(torch.uint8).numpy()
    return found


def aligned_empty(shape: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> torch.Tensor:
    """Memory that blocks can be read into: `shift` bytes behind a page, a large one where there are such; taken when used.

    A process that is forked does not have it. Large pages spare the system and, on virtual disks, the host a table of small
    ones for every read. Memory that processes share, Python's default, has none unless the system is set so.
    """
    count = torch.Size(shape).numel() * dtype.itemsize
    pages = mmap.mmap(-1, max(1, count + shift), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):  # not on macOS
            pages.madvise(getattr(mmap, advice))
    with torch.inference_mode(False):  # what is made in that mode could not be written to outside of it
        return torch.frombuffer(pages, dtype=torch.uint8, count=count, offset=shift).view(dtype).view(shape)
