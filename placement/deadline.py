"""How long a solver may go on, and ctrl-C: it ends the search, which then returns the best plan so far."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Deadline:
    """A moment after which every solver stops, or the moment when `stop` is set. seconds: from now, may be infinite."""

    def __init__(self, seconds: float, stop: threading.Event | None = None) -> None:
        self.at = time.monotonic() + seconds
        self.stop = threading.Event() if stop is None else stop

    def left(self) -> float:
        """Seconds, 0 when it has passed."""
        return 0.0 if self.stop.is_set() else max(0.0, self.at - time.monotonic())

    def passed(self) -> bool:
        """Whether to stop now."""
        return self.left() <= 0.0

    def share(self, fraction: float) -> Deadline:
        """An earlier one, after `fraction` of what is left; ctrl-C ends both."""
        return Deadline(fraction * self.left(), self.stop)

    def __getstate__(self) -> float:
        """Another process has its own ctrl-C; the clock is the machine's."""
        return self.at

    def __setstate__(self, at: float) -> None:
        self.at, self.stop = at, threading.Event()


@contextmanager
def interruptible(deadline: Deadline) -> Iterator[None]:
    """The first ctrl-C sets `deadline.stop`, a second one interrupts as always. Other threads than the main one: no effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if deadline.stop.is_set():
            raise KeyboardInterrupt
        deadline.stop.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
