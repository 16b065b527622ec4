"""An expert on its way from disk into tensors: which blocks of files are read for it, and where their bytes go.

A checkpoint's offsets are not aligned to blocks. A slot's tensors have room around them (`offload/slots.py`) and begin as many
bytes behind a page as their part of the expert does behind a block of its file: whole blocks are then read right into them, and
what is a neighbour's in the first and the last falls into that room. Other tensors are filled from memory of the reader's own.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from ctypes import c_uint8, memmove, string_at
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from coterie.offload.checkpoint import ReadCounter, TensorSlice
from coterie.offload.checksum import Checksum, check

BLOCK = 4096  # what O_DIRECT can always do with: offsets, lengths and places in memory are multiples; a page
SECTOR = 512  # what it can do with on most devices
STAGE_BYTES = 2 << 20  # the most that is read at once; of 4 MiB ahead what is needed would wait too long


@dataclass(frozen=True)
class Piece:
    """A run of bytes of a file."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Part:
    """One parameter of one expert, `shape` in `dtype` as stored: the pieces one after another; none where it is still to be.

    coded: what it is worked out from where the pieces' bytes only stand for it, one after another (offload/coded.py).
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    coded: tuple[TensorSlice, ...] = ()

    @property
    def length(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def on_disk(self) -> int:
        """Bytes that are read for it."""
        return sum(one.length for one in self.coded) if self.coded else self.length


Record = Mapping[str, Part]  # by parameter: gate_up_proj, down_proj, ...


@dataclass(frozen=True)
class Span:
    """`length` bytes of a request, from `start` on, that are a parameter's from its byte `first` on, as stored."""

    name: str
    start: int
    length: int
    first: int


@dataclass
class Request:
    """A read of whole blocks: `least` of its bytes must be there, the file may end within the last block.

    direct: right into the place of its only span, with what is read before it; the block that holds its last `tail` bytes, if
    there are such, to the reader's own memory: another piece of the parameter goes on there.
    """

    file: Path
    offset: int
    least: int
    direct: bool
    spans: list[Span] = field(default_factory=list)
    block: int = BLOCK
    tail: int = 0

    @property
    def length(self) -> int:
        """Bytes, to the end of the last block."""
        return -(-self.least // self.block) * self.block


@dataclass(frozen=True)
class Expected:
    """What the bytes of an expert must give as a checksum, in the order of its parts."""

    checksum: str
    layer: int
    expert: int


class Slot(dict[str, torch.Tensor]):
    """Tensors that an expert is read into, by parameter; what must be known of them is found out once.

    shifts: of those with a block's room before and behind them, by how many bytes they begin behind a page.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], shifts: Mapping[str, int] = MappingProxyType({})) -> None:
        super().__init__(tensors)
        self.shifts = shifts

    @cached_property
    def bytes(self) -> dict[str, np.ndarray]:
        """Their memory, uint8; of those that are on the CPU."""
        return {name: bytes_of(tensor) for name, tensor in self.items() if tensor.device.type == "cpu"}

    @cached_property
    def addresses(self) -> dict[str, int]:
        """Where that begins."""
        return {name: tensor.data_ptr() for name, tensor in self.items() if tensor.device.type == "cpu"}


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
        self.tails: list[tuple[int, bytes]] = []  # addresses, and what belongs there once all has been read

    def goes_to(self, request: Request, own: Own) -> list[tuple[int, int]]:
        """Where a request reads to, addresses and lengths. own: of the reader, a block; of what is not direct STAGE_BYTES."""
        if not request.direct:
            return [(own.address, request.length)]
        span, last = request.spans[0], request.block if request.tail else 0
        places = [(self.into.addresses[span.name] + span.first - span.start, request.length - last), (own.address, last)]
        return [place for place in places if place[1]]

    def views(self, request: Request, own: Own) -> list[np.ndarray]:
        """The same as memory."""
        places = self.goes_to(request, own)
        return [np.ctypeslib.as_array((c_uint8 * length).from_address(address)) for address, length in places]

    def take(self, request: Request, own: Own) -> None:
        """Put the bytes of a request where they belong, once they are in its `views` with the same `own`.

        In any order, unless `seen` is not None: a checksum goes by the requests' own.
        """
        if request.direct:
            span = request.spans[0]
            if request.tail:
                end = span.first + span.length
                self.tails.append((self.into.addresses[span.name] + end - request.tail, string_at(own.address, request.tail)))
            if self.seen is not None:
                self.seen.update(self.into.bytes[span.name][span.first : span.first + span.length].data)
            self.counter.add(span.length)
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

    def complete(self) -> None:
        """Once all has been taken. Raises CoterieError for bytes that do not give what is expected."""
        for address, tail in self.tails:
            memmove(address, tail, len(tail))
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
    pieces = _run_together(pieces)
    known = dict(zip(record, shifts, strict=True))
    direct = {name for name, part in record.items() if _is_direct(part, name, known[name], pieces, in_order, block)}
    made: list[Request] = []
    for piece, name, first in pieces:
        if name in direct:
            made += _direct(piece, name, first, first + piece.length == record[name].length, block)
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
    """Of each part in order, how far behind a page its tensor begins; None without room around it, or if it must be cast."""
    return tuple(into.shifts.get(name) if _as_stored(part, into[name]) else None for name, part in record.items())


def own_shift(part: Part, block: int) -> int:
    """How far behind a page a part's tensor should begin: as its bytes behind a block of their file."""
    shift = part.pieces[0].offset % block
    return 0 if shift % part.dtype.itemsize else shift


def _is_direct(
    part: Part, name: str, shift: int | None, pieces: Sequence[tuple[Piece, str, int]], in_order: bool, block: int
) -> bool:
    """Whether all pieces of a parameter can be read right into its tensor, which begins at `shift`."""
    mine = [(piece, first) for piece, whose, first in pieces if whose == name]
    if shift is None or (in_order and len(mine) > 1):
        return False
    return all((shift + first - piece.offset) % block == 0 and piece.length >= 2 * block for piece, first in mine)


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


def _direct(piece: Piece, name: str, first: int, ends: bool, block: int) -> list[Request]:
    """Requests of about the same size, STAGE_BYTES at most, cut at blocks. ends: the parameter does so with this piece."""
    offset, end = piece.offset // block * block, piece.offset + piece.length
    tail = 0 if ends else end % block
    parts = -(-(end - offset) // (STAGE_BYTES - block))
    size = -(-(end - offset) // parts // BLOCK) * BLOCK
    made = []
    for at in range(offset, end, size):
        until = min(end, at + size)
        begins = max(at, piece.offset)
        span = Span(name, begins - at, until - begins, first + begins - piece.offset)
        made.append(Request(piece.file, at, until - at, True, [span], block, tail if until == end else 0))
    return made


def usual_shift(records: Iterable[Iterable[Record]], name: str, block: int) -> int:
    """`own_shift` of most experts' parameter `name`."""
    found = Counter(own_shift(record[name], block) for layer in records for record in layer)
    return found.most_common(1)[0][0] if found else 0


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


def bytes_of(out: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor on the CPU, uint8."""
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
