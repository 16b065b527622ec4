"""An expert on its way from disk into tensors: which blocks of files are read for it, and where their bytes go.

What lies in whole blocks of a file is read right into aligned memory (`aligned_empty`); the rest, as most of a checkpoint,
whose offsets are not aligned, into memory of the reader's own, and copied from there.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from coterie.offload.checkpoint import ReadCounter
from coterie.offload.checksum import Checksum, check

BLOCK = 4096
STAGE_BYTES = 2 << 20  # the most that is read at once


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


@dataclass
class Request:
    """A read of whole blocks: `least` of its bytes must be there, the file may end within the last block.

    direct: right into the place of its only span, all of it.
    """

    file: Path
    offset: int
    least: int
    direct: bool
    spans: list[Span] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Bytes, to the end of the last block."""
        return -(-self.least // BLOCK) * BLOCK


@dataclass(frozen=True)
class Expected:
    """What the bytes of an expert must give as a checksum, in the order of its parts."""

    checksum: str
    layer: int
    expert: int


class Transfer:
    """An expert and the tensors `into` which it goes, by parameter. What was read is given to `take`, in the requests' order.

    expected: None where nothing is known; its parts are then asked for in the order of the file.
    """

    def __init__(
        self, record: Record, into: Mapping[str, torch.Tensor], counter: ReadCounter, expected: Expected | None = None
    ) -> None:
        self.record, self.into, self.counter, self.expected = record, into, counter, expected
        self.seen = None if expected is None else Checksum()
        self.places = {name: _bytes_of(into[name]) for name, part in record.items() if _as_stored(part, into[name])}
        self.requests = self._planned()

    def place(self, request: Request) -> np.ndarray:
        """Where a direct request reads to, uint8."""
        (span,) = request.spans
        return self.places[span.name][span.first : span.first + span.length]

    def take(self, request: Request, raw: np.ndarray) -> None:
        """Put the bytes of a request where they belong. raw: uint8, `place`'s or the reader's own."""
        for span in request.spans:
            found = raw[span.start : span.start + span.length]
            if self.seen is not None:
                self.seen.update(found.data)
            if request.direct:
                continue
            if span.name in self.places:
                self.places[span.name][span.first : span.first + span.length] = found
            else:
                dtype = self.record[span.name].dtype
                values = torch.from_numpy(found.copy() if found.ctypes.data % dtype.itemsize else found).view(dtype)
                self.into[span.name].view(-1)[span.first // dtype.itemsize :][: len(values)].copy_(values)

        self.counter.add(sum(span.length for span in request.spans))

    def check(self) -> None:
        """Raises CoterieError, once all has been taken, for bytes that do not give what is expected."""
        if self.seen is not None and self.expected is not None:
            check(self.seen, self.expected.checksum, self.requests[0].file, self.expected.layer, self.expected.expert)

    def _planned(self) -> list[Request]:
        pieces: list[tuple[Piece, str, int]] = []
        for name, part in self.record.items():
            first = 0
            for piece in part.pieces:
                pieces.append((piece, name, first))
                first += piece.length
        if self.seen is None:
            pieces.sort(key=lambda found: (str(found[0].file), found[0].offset))
        made: list[Request] = []
        for piece, name, first in pieces:
            done = 0
            if not piece.offset % BLOCK and name in self.places and not (self.places[name].ctypes.data + first) % BLOCK:
                while piece.length - done >= BLOCK:
                    length = min(piece.length - done, STAGE_BYTES) // BLOCK * BLOCK
                    made.append(Request(piece.file, piece.offset + done, length, True, [Span(name, 0, length, first + done)]))
                    done += length
            while done < piece.length:
                length = _joined(made[-1], piece, done, name, first, self.record[name].dtype.itemsize) if made else 0
                if not length:
                    at = piece.offset + done
                    made.append(Request(piece.file, at // BLOCK * BLOCK, at % BLOCK, False))
                done += length
        return made


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


def aligned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory that blocks can be read into: it begins at a page, a large one where there are such; taken when used.

    A process that is forked does not have it. Large pages spare the system and, on virtual disks, the host a table of small
    ones for every read. Memory that processes share, Python's default, has none unless the system is set so.
    """
    count = torch.Size(shape).numel() * dtype.itemsize
    pages = mmap.mmap(-1, max(1, count), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):  # not on macOS
            pages.madvise(getattr(mmap, advice))
    return torch.frombuffer(pages, dtype=torch.uint8, count=count).view(dtype).view(shape)
