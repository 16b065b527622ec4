"""Linux's own asynchronous reads (io_submit and its like, aio_abi.h): one call queues many, and no thread waits for each.

System calls by number through ctypes: no library of theirs is needed, and containers that forbid io_uring allow these.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Sequence
from typing import NamedTuple

SETUP, DESTROY, SUBMIT, EVENTS = range(4)
NUMBERS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}  # of these calls, by `platform.machine()`
CONTROL = struct.Struct("<QIIHhIQQqQII")  # struct iocb
EVENT = struct.Struct("<QQqq")  # struct io_event
PLACE = struct.Struct("<QQ")  # struct iovec
SCATTERED = 7  # IOCB_CMD_PREADV
TO_EVENTFD = 1  # IOCB_FLAG_RESFD
MOST_PLACES = 2  # of a read


class Read(NamedTuple):
    """Bytes of an open file from `offset` on, to `places`, (address, length) each. tag: what its end is known by."""

    tag: int
    descriptor: int
    offset: int
    places: Sequence[tuple[int, int]]


def numbers() -> tuple[int, int, int, int] | None:
    """Of the system calls here; None where there are none."""
    return NUMBERS.get(platform.machine()) if sys.platform == "linux" and struct.calcsize("P") == 8 else None


class Queue:
    """Up to `depth` reads at a time. Their ends are signalled to `ends`, an eventfd. Raises OSError if the system refuses."""

    def __init__(self, depth: int, ends: int) -> None:
        found = numbers()
        if found is None:
            raise OSError(f"no asynchronous reads on {sys.platform} {platform.machine()}")
        self._numbers, self._ends, self._context = found, ends, ctypes.c_ulong(0)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        self._controls = ctypes.create_string_buffer(CONTROL.size * depth)
        self._places = ctypes.create_string_buffer(PLACE.size * MOST_PLACES * depth)  # copied by the system when reads begin
        first = ctypes.addressof(self._controls)
        self._pointers = (ctypes.c_void_p * depth)(*range(first, first + CONTROL.size * depth, CONTROL.size))
        self._events = ctypes.create_string_buffer(EVENT.size * depth)
        self._call(SETUP, ctypes.c_uint(depth), ctypes.byref(self._context))

    def _call(self, which: int, *arguments: object) -> int:
        done: int = self._libc.syscall(ctypes.c_long(self._numbers[which]), *arguments)
        if done < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return done

    def submit(self, reads: Sequence[Read]) -> int:
        """Begin the first of these; how many. Raises OSError where the first cannot be."""
        begin = ctypes.addressof(self._places)
        for number, (tag, descriptor, offset, places) in enumerate(reads):
            at = PLACE.size * MOST_PLACES * number
            for nth, place in enumerate(places):
                PLACE.pack_into(self._places, at + PLACE.size * nth, *place)
            control = (tag, 0, 0, SCATTERED, 0, descriptor, begin + at, len(places), offset, 0, TO_EVENTFD, self._ends)
            CONTROL.pack_into(self._controls, CONTROL.size * number, *control)
        return self._call(SUBMIT, self._context, ctypes.c_long(len(reads)), self._pointers)

    def ended(self) -> list[tuple[int, int]]:
        """(tag, bytes read or -errno) of those that have ended, each told once."""
        most, at_once = len(self._events) // EVENT.size, ctypes.byref((ctypes.c_long * 2)())
        count = self._call(EVENTS, self._context, ctypes.c_long(0), ctypes.c_long(most), self._events, at_once)
        return [(tag, result) for tag, _, result, _ in EVENT.iter_unpack(memoryview(self._events)[: EVENT.size * count])]

    def close(self) -> None:
        """Give it back, once what is under way has ended."""
        self._call(DESTROY, self._context)
