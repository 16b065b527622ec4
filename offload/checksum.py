"""A checksum of an expert's bytes that costs little beside reading them from a disk.

The bytes, as 64-bit little-endian words and filled up with zeros, are a table of rows of 4 KiB. The sums of all rows and of all
columns modulo 2^64, and the length, go through BLAKE2b to 64 bits. Whatever happens to the bytes of one row, or to any three
words, changes a sum for certain; rows that are lost, exchanged or of another place change the sums of rows. What escapes: four
words or more whose changes cancel in every row and every column, as those of highest bits at the corners of a rectangle do;
chance, once in 2^64; somebody who means to deceive.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import numpy as np

from coterie.routing.errors import CoterieError

ROW = 4096  # bytes
AT_ONCE = 512 << 10  # bytes whose columns are added while they are still in the processor's cache


class Checksum:
    """Of bytes that come in parts; where these do not end at a multiple of 4 KiB, up to 4 KiB are copied."""

    def __init__(self) -> None:
        self._columns = np.zeros(ROW // 8, dtype="<u8")
        self._digest = blake2b(digest_size=8)
        self._rest = bytearray()
        self._length = 0

    def update(self, part: memoryview | bytes) -> None:
        """Add a part, contiguous bytes."""
        view = memoryview(part)
        self._length += len(view)
        if self._rest:
            missing = min(ROW - len(self._rest), len(view))
            self._rest += view[:missing]
            view = view[missing:]
            if len(self._rest) < ROW:
                return
            self._add(memoryview(bytes(self._rest)))
            self._rest.clear()
        whole = len(view) // ROW * ROW
        for first in range(0, whole, AT_ONCE):
            self._add(view[first : min(first + AT_ONCE, whole)])
        self._rest += view[whole:]

    def _add(self, rows: memoryview) -> None:
        words = np.frombuffer(rows, dtype="<u8").reshape(-1, ROW // 8)
        self._columns += words.sum(0)
        self._digest.update(words.sum(1).tobytes())

    def hexdigest(self) -> str:
        """16 hexadecimal digits; nothing can be added afterwards."""
        if self._rest:
            self._add(memoryview(bytes(self._rest).ljust(ROW, b"\0")))
        self._digest.update(self._columns.tobytes())
        self._digest.update(self._length.to_bytes(8, "little"))
        return self._digest.hexdigest()


def check(seen: Checksum, expected: str, file: Path, layer: int, expert: int) -> None:
    """Raises CoterieError, naming file, layer and expert, if the bytes read are not those that were packed."""
    found = seen.hexdigest()
    if found != expected:
        raise CoterieError(
            f"{file}: expert {expert} of layer {layer} (counting those with experts, from 0): found checksum {found}, expected "
            f"{expected}: its bytes have changed; remove {file.parent} and pack again"
        )
