"""The files that experts are read from: open as long as the store is, and what is wrong with them told by name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from coterie.offload.transfer import BLOCK, Request, Transfer
from coterie.routing.errors import CoterieError


class Files:
    """Opened with O_DIRECT where all of their file systems have it (`direct`). Raises CoterieError if one cannot be."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.descriptors: dict[Path, int] = {}
        self.direct = True
        for path in paths:
            try:
                self.descriptors[path] = self._opened(path)
            except OSError as error:
                raise CoterieError(f"{path}: cannot be read: {error.strerror}") from error
        self._versions = {path: self._version(path) for path in self.descriptors}

    def _opened(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError:  # a file system without it
            self.direct = False
            return os.open(path, os.O_RDONLY)

    def _version(self, path: Path) -> tuple[int, int]:
        """What changes when the file that was opened does: its size, and when it was last written to, ns."""
        found = os.fstat(self.descriptors[path])
        return found.st_size, found.st_mtime_ns

    def finish(self, transfer: Transfer) -> None:
        """All is there: raises CoterieError for a wrong checksum, or a file that has been written to since it was opened."""
        transfer.check()
        for path in {request.file for request in transfer.requests}:
            if self._version(path) != self._versions[path]:
                raise CoterieError(f"{path}: was changed while in use; start again once it is whole")

    def fill(self, request: Request, raw: np.ndarray) -> None:
        """Read a request into `raw`, uint8, waiting for it. Raises CoterieError for an error of the disk or a short file."""
        view, done = raw.data, 0
        try:
            while done < request.least:
                got = os.preadv(self.descriptors[request.file], [view[done:]], request.offset + done)
                done = gone_on(request, done, got)
        except OSError as error:
            raise CoterieError(f"{request.file}: cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Close them; again is nothing."""
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])


def gone_on(request: Request, done: int, got: int) -> int:
    """Where a request goes on after `got` more bytes than `done`, a place where O_DIRECT can; its end if it is complete.

    Raises CoterieError if the file ends there.
    """
    found = done + got
    if found >= request.least:
        return found
    if found // BLOCK * BLOCK <= done:
        expected = request.offset + request.least
        raise CoterieError(
            f"{request.file}: ends at byte {request.offset + found}, expected {expected}; was it changed while in use?"
        )
    return found // BLOCK * BLOCK
