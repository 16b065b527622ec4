"""Standard output, and what becomes of a command when nobody takes it any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OutputGoneError(OSError):
    """Standard output cannot be written: nobody reads it, or its disk is full. Other files and pipes raise other errors."""


class _Watched:
    """A stream whose errors can be told from those of others."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> Any:
        with _told_apart():
            return self._stream.write(text)

    def flush(self) -> None:
        with _told_apart():
            self._stream.flush()


@contextmanager
def _told_apart() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputGoneError(error.errno, error.strerror) from error


@contextmanager
def watched_output() -> Iterator[None]:
    """Inside, `sys.stdout` raises OutputGoneError for what it cannot write."""
    stream = sys.stdout
    sys.stdout = _Watched(stream)
    try:
        yield
    finally:
        sys.stdout = stream


def drop_output() -> None:
    """What is still to be written goes nowhere, so that ending the process does not fail, too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
