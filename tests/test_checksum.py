"""The checksum of packed experts: its definition, and what it finds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.offload.checksum import AT_ONCE, ROW, Checksum


def of(*parts: bytes) -> str:
    made = Checksum()
    for part in parts:
        made.update(part)
    return made.hexdigest()


def plain(content: bytes) -> str:
    """The definition, in one piece."""
    from hashlib import blake2b

    rows = np.frombuffer(content.ljust(-(-len(content) // ROW) * ROW, b"\0"), dtype="<u8").reshape(-1, ROW // 8).astype(object)
    sums = [int(row.sum()) % 2**64 for row in rows] + [int(sum(rows[:, i])) % 2**64 for i in range(ROW // 8)]
    whole = b"".join(value.to_bytes(8, "little") for value in sums) + len(content).to_bytes(8, "little")
    return blake2b(whole, digest_size=8).hexdigest()


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_checksum_is_that_of_the_bytes_however_they_come(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 2 * AT_ONCE + 3 * ROW) | st.integers(0, 3 * ROW))
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=6)))
    assert of(*(content[a:b] for a, b in zip([0, *cuts], [*cuts, size], strict=True))) == plain(content)


def test_a_checksum_finds_what_disks_do() -> None:
    rng = np.random.default_rng(1)
    content = rng.integers(0, 256, 64 * ROW, dtype=np.uint8)
    right, seen = of(content.tobytes()), set()

    def wrong(change: Callable[[np.ndarray], object]) -> None:
        copy = content.copy()
        change(copy)
        assert (copy != content).any()
        assert of(copy.tobytes()) != right
        seen.add(of(copy.tobytes()))

    def put(copy: np.ndarray, where: slice, what: object) -> None:
        copy[where] = what

    rows = content.reshape(64, ROW)
    wrong(lambda c: put(c, slice(5, 6), c[5] ^ 128))
    wrong(lambda c: put(c, slice(7 * ROW, 8 * ROW), 0))
    wrong(lambda c: put(c, slice(7 * ROW, 8 * ROW), rows[9]))  # a page of another place
    wrong(lambda c: put(c.reshape(64, ROW), slice(3, 5), rows[[4, 3]]))  # two pages exchanged
    wrong(lambda c: put(c.reshape(-1, 512), slice(8, 10), content.reshape(-1, 512)[[9, 8]]))  # two sectors of a page exchanged
    wrong(lambda c: put(c, slice(0, 64 * ROW - 8), content[8:]))  # shifted by a word
    wrong(lambda c: put(c[7::8], slice(None), c[7::8] | 128))  # a line that is stuck
    for first, second in rng.integers(0, 64 * ROW // 8, (200, 2)):  # the same bit of two words
        if first != second:
            bit = 1 << int(rng.integers(8))
            wrong(lambda c, at=[8 * first + 7, 8 * second + 7], bit=bit: put(c, at, c[at] ^ bit))
    assert len(seen) > 200 and of(content.tobytes() + b"\0") != right != of(content.tobytes()[:-1])
