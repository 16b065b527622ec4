"""Where each expert's weights lie in a checkpoint, and reading them into slots, in place and off the interpreter's lock.

Files are opened with O_DIRECT where the file system has it, so that reading neither fills memory with cached pages nor waits
for page faults. What lies in whole blocks of the file is read right into aligned memory (`aligned_empty`); the rest, as most
of a checkpoint, whose offsets are not aligned, through a reader's own memory, a little more than asked for. `preadv` releases
the interpreter's lock.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from coterie.offload.checkpoint import ReadCounter
from coterie.offload.checksum import Checksum, check
from coterie.routing.errors import CoterieError

BLOCK = 4096
STAGE_BYTES = 8 << 20  # of one reader; longer pieces are read in parts
READERS = 4  # of what is needed; and
AHEAD_READERS = 2  # of what may be: few, so that what is needed meanwhile does not wait long


@dataclass(frozen=True)
class Piece:
    """A run of bytes of a file."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Part:
    """One parameter of one expert, `shape` in `dtype` as stored: the pieces one after another."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


Record = Mapping[str, Part]  # by parameter: gate_up_proj, down_proj, ...


class ExpertStore:
    """All experts of a checkpoint. records: `[layer][expert]`, layers by their place among those with experts.

    checksums: `[layer][expert]`, what the bytes of an expert's parts must give (offload/checksum.py); None: not checked.
    """

    def __init__(
        self, records: Sequence[Sequence[Record]], counter: ReadCounter, checksums: Sequence[Sequence[str]] | None = None
    ) -> None:
        self.records = records
        self.counter = counter
        self.checksums = checksums
        self.readers = ThreadPoolExecutor(READERS, "coterie-read")
        self.ahead = ThreadPoolExecutor(AHEAD_READERS, "coterie-ahead")
        self._own = threading.local()
        self._files: dict[Path, int] = {}
        self._versions: dict[Path, tuple[int, int]] = {}
        self.direct = True
        for file in {piece.file for layer in records for record in layer for part in record.values() for piece in part.pieces}:
            self._open(file)

    def _open(self, file: Path) -> None:
        try:
            try:
                self._files[file] = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
            except OSError:  # a file system without it
                self._files[file] = os.open(file, os.O_RDONLY)
                self.direct = False
        except OSError as error:
            raise CoterieError(f"{file}: cannot be read: {error.strerror}") from error
        self._versions[file] = self._version(file)

    def _version(self, file: Path) -> tuple[int, int]:
        """What changes when the file that was opened does: its size, and when it was last written to, ns."""
        found = os.fstat(self._files[file])
        return found.st_size, found.st_mtime_ns

    def start(self, layer: int, expert: int, into: Mapping[str, torch.Tensor], ahead: bool = False) -> Future[None]:
        """Begin to fill the tensors (by parameter) with an expert, casting as needed; what has not begun can be cancelled.

        ahead: not needed yet, behind others of that kind.
        The result raises CoterieError, naming the file, for an error of the disk, a file that was written to meanwhile, or
        bytes that do not give their checksum.
        """
        return (self.ahead if ahead else self.readers).submit(self.read, layer, expert, into)

    def read(self, layer: int, expert: int, into: Mapping[str, torch.Tensor]) -> None:
        """The same in the calling thread."""
        record = self.records[layer][expert]
        seen = None if self.checksums is None else Checksum()
        for name, part in record.items():
            self._read(part, into[name], seen)
        if seen is not None and self.checksums is not None:
            check(seen, self.checksums[layer][expert], next(iter(record.values())).pieces[0].file, layer, expert)
        for file in {piece.file for part in record.values() for piece in part.pieces}:
            if self._version(file) != self._versions[file]:
                raise CoterieError(f"{file}: was changed while in use; start again once it is whole")

    def _read(self, part: Part, out: torch.Tensor, seen: Checksum | None) -> None:
        flat, start = out.view(-1), 0
        for piece in part.pieces:
            count = piece.length // part.dtype.itemsize
            into = flat[start : start + count]
            done = self._read_blocks(piece, into, seen) if out.dtype == part.dtype and out.device.type == "cpu" else 0
            self._read_staged(piece, done, part.dtype, into, seen)
            start += count

    def _read_blocks(self, piece: Piece, out: torch.Tensor, seen: Checksum | None) -> int:
        """The whole blocks that a piece begins with, right into `out`, where both are aligned; returns their bytes."""
        length = piece.length // BLOCK * BLOCK
        if piece.offset % BLOCK or out.data_ptr() % BLOCK or not length:
            return 0
        view = out.view(torch.uint8).numpy().data[:length]
        self._fill(piece.file, piece.offset, view, length)
        if seen is not None:
            seen.update(view)
        self.counter.add(length)
        return length

    def _read_staged(self, piece: Piece, start: int, dtype: torch.dtype, out: torch.Tensor, seen: Checksum | None) -> None:
        for offset in range(start, piece.length, STAGE_BYTES - 2 * BLOCK):
            length = min(piece.length - offset, STAGE_BYTES - 2 * BLOCK)
            raw = self.staged(piece.file, piece.offset + offset, length)
            if seen is not None:
                seen.update(raw)
            values = torch.frombuffer(raw, dtype=torch.uint8)
            first = offset // dtype.itemsize
            out[first : first + length // dtype.itemsize].copy_(_viewed(values, dtype))

    def staged(self, file: Path, offset: int, length: int) -> memoryview:
        """The bytes, in this thread's own aligned memory until its next read."""
        if not hasattr(self._own, "stage"):
            self._own.stage = memoryview(mmap.mmap(-1, STAGE_BYTES))
        first = offset // BLOCK * BLOCK
        whole = -(-(offset + length - first) // BLOCK) * BLOCK
        view = self._own.stage[:whole]
        self._fill(file, first, view, offset + length - first)
        self.counter.add(length)
        found: memoryview = view[offset - first : offset - first + length]
        return found

    def _fill(self, file: Path, first: int, view: memoryview, least: int) -> None:
        """Read from `first` on into `view`, whole blocks, of which `least` bytes must be there."""
        done = 0
        try:
            while done < least:
                got = os.preadv(self._files[file], [view[done:]], first + done)
                before, done = done, done + got
                if done < least:
                    done = done // BLOCK * BLOCK  # where O_DIRECT can go on
                if done <= before:
                    raise CoterieError(
                        f"{file}: ends at byte {first + before + got}, expected {first + least}; was it changed while in use?"
                    )
        except OSError as error:
            raise CoterieError(f"{file}: cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Give the files and threads back."""
        self.readers.shutdown()
        self.ahead.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def aligned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory that blocks can be read into: it begins at a page, a large one where there are such; taken when used."""
    count = max(1, torch.Size(shape).numel() * dtype.itemsize)
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no large pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape)


def _viewed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 as another dtype; a piece may begin at an offset that is no multiple of its size."""
    if values.data_ptr() % dtype.itemsize:
        values = values.clone()
    return values.view(dtype)
