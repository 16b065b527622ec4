"""Where each expert's weights lie in a checkpoint, and reading them into slots, in place and off the interpreter's lock.

Files are opened with O_DIRECT where the file system has it, so that reading neither fills memory with cached pages nor waits
for page faults; offsets in a checkpoint are not aligned, so a little more is read than asked for. `preadv` releases the
interpreter's lock.
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
READERS = 4


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
        self._own = threading.local()
        self._files: dict[Path, int] = {}
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

    def start(self, layer: int, expert: int, into: Mapping[str, torch.Tensor]) -> Future[None]:
        """Begin to fill the tensors (by parameter) with an expert, casting as needed; what has not begun can be cancelled.

        The result raises CoterieError, naming the file, for an error of the disk, a file that has become shorter, or bytes that
        do not give their checksum.
        """
        return self.readers.submit(self._read_all, layer, expert, into)

    def _read_all(self, layer: int, expert: int, into: Mapping[str, torch.Tensor]) -> None:
        seen = None if self.checksums is None else Checksum()
        record = self.records[layer][expert]
        for name, part in record.items():
            self._read(part, into[name], seen)
        if seen is not None and self.checksums is not None:
            check(seen, self.checksums[layer][expert], next(iter(record.values())).pieces[0].file, layer, expert)

    def _read(self, part: Part, out: torch.Tensor, seen: Checksum | None) -> None:
        flat, start = out.view(-1), 0
        for piece in part.pieces:
            for offset in range(0, piece.length, STAGE_BYTES - 2 * BLOCK):
                length = min(piece.length - offset, STAGE_BYTES - 2 * BLOCK)
                raw = self.staged(piece.file, piece.offset + offset, length)
                if seen is not None:
                    seen.update(raw)
                values = torch.frombuffer(raw, dtype=torch.uint8)
                count = length // part.dtype.itemsize
                flat[start : start + count].copy_(_viewed(values, part.dtype))
                start += count

    def staged(self, file: Path, offset: int, length: int) -> memoryview:
        """The bytes, in this thread's own aligned memory until its next read."""
        if not hasattr(self._own, "stage"):
            self._own.stage = memoryview(mmap.mmap(-1, STAGE_BYTES))
        first = offset // BLOCK * BLOCK
        whole = -(-(offset + length - first) // BLOCK) * BLOCK
        view, done = self._own.stage[:whole], 0
        try:
            while done < offset + length - first:
                got = os.preadv(self._files[file], [view[done:]], first + done)
                if got == 0:
                    raise CoterieError(
                        f"{file}: ends at byte {first + done}, expected {offset + length}; was it changed while in use?"
                    )
                done += got
        except OSError as error:
            raise CoterieError(f"{file}: cannot be read: {error.strerror}") from error
        self.counter.add(length)
        found: memoryview = view[offset - first : offset - first + length]
        return found

    def close(self) -> None:
        """Give the files and threads back."""
        self.readers.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def _viewed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 as another dtype; a piece may begin at an offset that is no multiple of its size."""
    if values.data_ptr() % dtype.itemsize:
        values = values.clone()
    return values.view(dtype)
