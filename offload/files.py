"""The files that experts are read from: open as long as the store is, and what is wrong with them told by name."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from coterie.offload.checkpoint import Version, version_of
from coterie.offload.transfer import BLOCK, SECTOR, Request, Transfer, aligned_empty
from coterie.routing.errors import CoterieError


class Files:
    """Opened with O_DIRECT where all of their file systems have it (`direct`); closed with this. Raises CoterieError if one
    cannot be.

    versions: of those that were looked into before. block: what offsets, lengths and places in memory have to be multiples of,
    found out by trying.
    """

    def __init__(self, paths: Iterable[Path], versions: Mapping[Path, Version] = MappingProxyType({})) -> None:
        self.descriptors: dict[Path, int] = {}
        weakref.finalize(self, _close, self.descriptors)
        self.direct = True
        for path in paths:
            try:
                self.descriptors[path] = self._opened(path)
            except OSError as error:
                raise CoterieError(f"{path}: cannot be read: {error.strerror}") from error
        self.block = SECTOR if all(map(self._reads_sectors, self.descriptors)) else BLOCK
        self._versions = {path: version_of(descriptor) for path, descriptor in self.descriptors.items()}
        for path, found in self._versions.items():
            if versions.get(path, found) != found:
                raise CoterieError(f"{path}: was changed since its header was read; start again once it is whole")

    def _opened(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError:  # a file system without it
            self.direct = False
            return os.open(path, os.O_RDONLY)

    def _reads_sectors(self, path: Path) -> bool:
        place = aligned_empty((2 * SECTOR,), torch.uint8, SECTOR).numpy()
        try:
            os.preadv(self.descriptors[path], [place.data[:SECTOR], place.data[SECTOR:]], SECTOR)
        except OSError:  # a real error of the disk will be met again, and told, by whoever reads
            return False
        return True

    def finish(self, transfer: Transfer) -> None:
        """All is there: raises CoterieError for a wrong checksum, or a file that has been written to since it was opened."""
        transfer.complete()
        seen = None
        for request in transfer.requests:
            path = request.file
            if path is not seen and version_of(self.descriptors[path]) != self._versions[path]:
                raise CoterieError(f"{path}: was changed while in use; start again once it is whole")
            seen = path

    def fill(self, request: Request, views: Sequence[np.ndarray]) -> None:
        """Read a request into `views`, waiting for it. Raises CoterieError for an error of the disk or a short file."""
        done = 0
        try:
            while done < request.least:
                left = [view.data for view in remaining(views, done)]
                got = os.preadv(self.descriptors[request.file], left, request.offset + done)
                done = gone_on(request, done, got)
        except OSError as error:
            raise CoterieError(f"{request.file}: cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Close them; again is nothing."""
        _close(self.descriptors)


def _close(descriptors: dict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def remaining(views: Sequence[np.ndarray], done: int) -> list[np.ndarray]:
    """What is left of places that are filled one after another, after the first `done` bytes."""
    left = []
    for view in views:
        if done < len(view):
            left.append(view[done:])
        done = max(0, done - len(view))
    return left


def gone_on(request: Request, done: int, got: int) -> int:
    """Where a request goes on after `got` more bytes than `done`, a place where O_DIRECT can; its end if it is complete.

    Raises CoterieError if the file ends there.
    """
    found = done + got
    if found >= request.least:
        return found
    if found // request.block * request.block <= done:
        expected = request.offset + request.least
        raise CoterieError(
            f"{request.file}: ends at byte {request.offset + found}, expected {expected}; was it changed while in use?"
        )
    return found // request.block * request.block
