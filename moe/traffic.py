"""What one rank sends and how long it takes: counters that are always on, and events for a timeline where asked for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

EXCHANGES = (
    "dispatch", "combine", "dispatch between nodes", "combine between nodes", "counts", "keys and values", "experts moved"
)  # fmt: skip


@dataclass(frozen=True)
class Event:
    """A stretch of time on one rank. start, seconds: of `time.time`'s clock; layer: -1 outside the layers."""

    name: str
    start: float
    seconds: float
    layer: int = -1


@dataclass
class Traffic:
    """What this rank sent to other ranks.

    step: of the generation, from 1; layer: its place among those with experts, -1 outside them. rows: dispatch and combine
    together; bytes: of those rows with their headers of 8 bytes per slot; overhead: bytes of counts, padding and agreement
    beside them. rows_by_layer: by layer; bytes_to: rows and overhead together, by destination rank; seconds: by kind of work;
    events: None unless a timeline is recorded.
    """

    rows: int = 0
    bytes: int = 0
    overhead: int = 0
    layer: int = -1
    step: int = 0
    rows_by_layer: Counter[int] = field(default_factory=Counter)
    bytes_to: Counter[int] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    events: list[Event] | None = None

    def sent(self, to: int, rows: int, row_bytes: int, overhead: int = 0) -> None:
        """Count one message to rank `to`, which must be another one."""
        self.rows += rows
        self.bytes += rows * row_bytes
        self.overhead += overhead
        self.rows_by_layer[self.layer] += rows
        self.bytes_to[to] += rows * row_bytes + overhead

    def exchanging(self) -> float:
        """Seconds spent so far in sending rows, and in waiting for those of others."""
        return sum(self.seconds[name] for name in EXCHANGES)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is counted inside is forgotten afterwards."""
        kept = dict(vars(self))
        vars(self).update(vars(Traffic()))
        try:
            yield
        finally:
            vars(self).update(kept)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        started, clock = time.time(), time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - clock
            self.seconds[name] += took  # type: ignore[assignment]
            if self.events is not None:
                self.events.append(Event(name, started, took, self.layer))
