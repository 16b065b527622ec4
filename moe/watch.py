"""Every rank's heartbeat, and what the others make of its silence: a collective that fails names the rank that is to blame.

Each rank writes a beat to the job's store twice a second and reads all others'. Clocks are never compared: a rank is silent
for as long as its beat has not changed here. Of ranks on this machine the system also tells whether they live.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from coterie.moe.beats import STALE_SECONDS, Beat, Heard, Seat, blame, late, silence, system_says
from coterie.moe.traffic import Traffic
from coterie.moe.transports import CountsInside, TellsProgress, Transport, Wait
from coterie.routing.errors import CoterieError, RankLostError, first_line

BEAT_SECONDS, GUARD_SECONDS = 0.5, 0.25
SEARCH_SECONDS = 3.5  # how long a failure may look for the rank to blame
SURE_BEATS = 2  # of every rank since a failure, after which all are taken to live
GRACE_SECONDS = 0.75  # after the timeout, for the collective to fail by itself before the guard ends the process
TERMINATED_SECONDS = 2.0  # the same after SIGTERM
LINGER_SECONDS = 1.75  # how long the rank that keeps the store waits for the others to read why it leaves
MEETING_SECONDS = 1800.0  # work between collectives, such as loading, may take one rank this much longer than another
MESSAGE_LENGTH = 400


class Watch:
    """This rank's heartbeat and its view of the others.

    store: the job's, held for as long as this is; keeper: the rank in whose process the store is, None if the launcher keeps
    it; end: ends the process with the error, where the main thread cannot; terminated: whether SIGTERM has come.
    """

    def __init__(
        self, store: Any, rank: int, seats: Sequence[Seat], timeout: float, traffic: Traffic,
        end: Callable[[CoterieError], object], keeper: int | None = 0, terminated: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.store, self.rank, self.seats, self.timeout, self.traffic = store, rank, tuple(seats), timeout, traffic
        self._connection = store.clone()  # the threads' own: a store serves one call at a time
        self.end, self.keeper, self.terminated = end, keeper, terminated
        self.beat = Beat()
        self.entered: float | None = None  # since when the main thread waits for other ranks, without a byte from them
        self.read_at = self.resumed_at = time.monotonic()  # resumed_at: no silence before it counts
        self.heard = {seat.rank: (Beat(), self.read_at) for seat in seats}  # with the time at which the beat last changed
        self.broken = ""  # what the store's connection failed with
        self._stopping, self._kick, self._told = threading.Event(), threading.Event(), threading.Event()
        self._failing = threading.RLock()  # held for good by the thread that ends the process
        self._saying = threading.Lock()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beats, self._guard)]

    def start(self) -> None:
        """Begin, once every rank's first beat is in the store."""
        for thread in self._threads:
            thread.start()

    @staticmethod
    def key(rank: int) -> str:
        """Where a rank's beat is in the store."""
        return f"beat/{rank}"

    def _say(self, **news: Any) -> None:
        """Change what the next beat says; the guard's thread may do so, too."""
        with self._saying:
            self.beat = replace(self.beat, **news)

    def progressed(self) -> None:
        """Bytes have moved: whoever is waited for answers."""
        if self.entered is not None:
            self.entered = time.monotonic()

    @contextmanager
    def waiting(self, begins: bool = True) -> Iterator[None]:
        """Around what waits for other ranks, and fails if one does not answer. begins: a collective, or else ends one."""
        self._say(collectives=self.beat.collectives + begins)
        self.entered = time.monotonic()
        try:
            yield
        except (CoterieError, RuntimeError) as error:
            raise self.failure(error) from error
        finally:
            self.entered = None

    def view(self) -> dict[int, Heard]:
        """What is known of every rank."""
        here = self.seats[self.rank]
        return {s.rank: Heard(self.heard[s.rank][0], self._silent(s.rank), system_says(s, here)) for s in self.seats}

    def _silent(self, rank: int) -> float:
        return max(0.0, self.read_at - max(self.heard[rank][1], self.resumed_at))

    def failure(self, error: Exception) -> CoterieError:
        """What to raise for a collective that failed or took too long; looks for the rank to blame for some seconds."""
        self._failing.acquire()  # where the guard has it, it ends the process
        if isinstance(error, RankLostError):
            return error
        waited = time.monotonic() - (self.entered or time.monotonic())
        found = self._search(SEARCH_SECONDS) or late(self.view(), self.rank, self.beat.collectives)
        if found:
            return self._lost(found, f" (waited {waited:.0f} s for it)" if waited >= 1 else "")
        if self.broken:
            return CoterieError(f"the store in which the ranks meet is gone: its launcher has ended ({self.broken})")
        way = "; a longer --timeout lets it take its time" if waited > self.timeout / 2 else ""
        return CoterieError(f"an exchange failed though every rank lives: {type(error).__name__}: {first_line(error)}{way}")

    def _lost(self, found: Mapping[int, str], more: str = "") -> RankLostError:
        named = "; ".join(f"{self.seats[rank]} {how}" for rank, how in sorted(found.items()))
        return RankLostError(named + more, tuple(sorted(found)))

    def _fresh(self, seconds: float) -> dict[int, Heard] | None:
        """A view of beats read after the system was asked (who left had said so by then), None if none come in time."""
        asked, known = time.monotonic(), self.view()
        while self.read_at <= asked:
            if time.monotonic() - asked > seconds or self._stopping.is_set() or self.broken:
                return None
            self._kick.set()
            time.sleep(0.01)
        return {rank: replace(h, system=known[rank].system) for rank, h in self.view().items()}

    def _search(self, seconds: float) -> dict[int, str]:
        """Looks at fresh beats until some rank is clearly to blame, all have shown that they live, or the time is up."""
        began, first = time.monotonic(), {rank: beat.number for rank, (beat, _) in self.heard.items()}
        while time.monotonic() - began < seconds:
            known = self._fresh(BEAT_SECONDS)
            found = self._without_store() if known is None and self._keeper_gone() else blame(known or {}, self.rank)
            if found:
                return found
            if known and all(h.beat.number >= first[rank] + SURE_BEATS for rank, h in known.items() if rank != self.rank):
                return {}
            time.sleep(0.05)
        return self._without_store() if self.read_at <= began else {}

    def _keeper_gone(self) -> bool:
        return bool(self.broken or (self.keeper is not None and system_says(self.seats[self.keeper], self.seats[self.rank])))

    def _without_store(self) -> dict[int, str]:
        """Whom to blame when the store cannot be read: its keeper, unless something more is known."""
        now = time.monotonic()
        known = {rank: replace(h, age=now - self.heard[rank][1]) for rank, h in self.view().items()}
        found = blame(known, self.rank, math.inf)  # unread beats are no sign of silence
        if found or self.keeper is None or self.keeper == self.rank:
            return found
        return {self.keeper: silence(known[self.keeper])}

    def meet(self, seconds: float = MEETING_SECONDS) -> None:
        """Wait until every rank is here, as long as all live and `seconds` at most: after work that takes some much longer."""
        meeting = self.beat.meetings + 1
        self._say(meetings=meeting)
        began = time.monotonic()
        while missing := [rank for rank, (beat, _) in self.heard.items() if beat.meetings < meeting]:
            known = self._fresh(BEAT_SECONDS)
            if self.broken:
                raise self.failure(ConnectionError(self.broken))
            if found := blame(known or {}, self.rank, self.timeout, failed=False):  # those who have come may have gone again
                raise self._lost(found)
            if time.monotonic() - began > seconds:
                raise self._lost(dict.fromkeys(missing, f"lives but was not ready within {seconds:.0f} s"))
            time.sleep(0.02)

    def leave(self, message: str = "", lost: tuple[int, ...] = ()) -> None:
        """Tell the others that this rank ends, and why if that is early. The store's keeper gives them time to read it."""
        if not self._threads[0].is_alive():
            return
        self._say(left=message[:MESSAGE_LENGTH], lost=lost, done=not message)
        self._kick.set()
        self._told.wait(2 * BEAT_SECONDS)
        patience, stale = (LINGER_SECONDS, STALE_SECONDS) if message else (self.timeout, self.timeout)
        until = time.monotonic() + patience
        while self.keeper == self.rank and time.monotonic() < until and not self._all_left(stale):
            self._kick.set()
            time.sleep(0.05)
        self._stopping.set()
        self._kick.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(BEAT_SECONDS)

    def _all_left(self, stale: float) -> bool:
        others = [h for rank, h in self.view().items() if rank != self.rank]
        return all(h.beat.left or h.beat.done or h.system == "dead" or h.age >= stale for h in others)

    def _beats(self) -> None:
        while not self._stopping.is_set():
            self._kick.clear()
            try:
                self._exchange()
            except RuntimeError as error:  # the store's keeper is gone: whoever waits for a rank is told so
                self.broken = first_line(error)
                return
            self._kick.wait(BEAT_SECONDS)

    def _exchange(self) -> None:
        """Write this rank's beat, read all."""
        traffic = self.traffic
        beat = replace(self.beat, number=self.heard[self.rank][0].number + 1, step=traffic.step, layer=traffic.layer)
        self._connection.set(self.key(self.rank), beat.to_json())
        now = time.monotonic()
        for seat, data in zip(self.seats, self._connection.multi_get([self.key(s.rank) for s in self.seats]), strict=True):
            found = Beat.from_json(data)
            if found != self.heard[seat.rank][0]:
                self.heard[seat.rank] = (found, now)
        self.read_at = now
        if beat.left or beat.done:
            self._told.set()

    def _guard(self) -> None:
        """Ends the process where the main thread cannot: SIGTERM, a collective that never returns, a rank long silent."""
        last = time.monotonic()
        while not self._stopping.wait(GUARD_SECONDS):
            now = time.monotonic()
            if now - last > 2 * GUARD_SECONDS + 1:  # this process itself was stopped: the others' silence was not theirs
                self.resumed_at = now
            last = now
            if (reason := self._overdue(now)) is not None and self._failing.acquire(blocking=False):
                self.end(reason())

    def _overdue(self, now: float) -> Callable[[], CoterieError] | None:
        """What makes the guard end the process: a function that finds the words."""
        waited = now - max(self.entered or now, self.resumed_at)
        if self.terminated():
            return self._terminated
        if waited > self.timeout + GRACE_SECONDS:
            return lambda: self.failure(TimeoutError(f"no answer for {waited:.0f} s"))
        if waited > 1 and blame(self._fresh(BEAT_SECONDS) or {}, self.rank, self.timeout, failed=False):
            return lambda: self.failure(ConnectionError("a rank is gone"))
        unread = now - max(self.read_at, self.resumed_at)
        if max(unread, *(self._silent(s.rank) for s in self.seats if s.rank != self.rank)) > self.timeout:
            return lambda: self.failure(TimeoutError("a rank is silent"))
        return None

    def _terminated(self) -> CoterieError:
        found = self._search(TERMINATED_SECONDS)
        return self._lost(found) if found else CoterieError("ended by SIGTERM, from the launcher or the system")


class Watched:
    """A transport whose every failure names the rank that is to blame."""

    def __init__(self, inner: Transport, watch: Watch) -> None:
        self.inner, self.watch = inner, watch
        self.name, self.rank, self.size = inner.name, inner.rank, inner.size
        if isinstance(inner, TellsProgress):
            inner.on_progress(watch.progressed)

    def start_all_to_all(self, out: torch.Tensor, rows: torch.Tensor, receive: Sequence[int], send: Sequence[int]) -> Wait:
        """As `Transport`."""
        with self.watch.waiting():
            wait = self.inner.start_all_to_all(out, rows, receive, send)
        return self._ending(wait)

    def meet(self) -> None:
        """As `Watch`."""
        self.watch.meet()

    def _ending(self, wait: Wait) -> Wait:
        """`wait`, watched."""

        def finish() -> None:
            with self.watch.waiting(begins=False):
                wait()

        return finish

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """As `Transport`."""
        with self.watch.waiting():
            return self.inner.all_gather(mine)

    def gather_objects(self, value: Any) -> list[Any]:
        """As `Transport`."""
        with self.watch.waiting():
            return self.inner.gather_objects(value)

    def device(self) -> torch.device:
        """As `Transport`."""
        return self.inner.device()

    def subgroup(self, groups: Sequence[Sequence[int]]) -> Watched:
        """As `Transport`."""
        with self.watch.waiting():
            return watched(self.inner.subgroup(groups), self.watch)


class WatchedCounts(Watched):
    """The same of a transport that sends counts inside."""

    inner: Any

    def start_all_to_all_counted(self, rows: torch.Tensor, send: Sequence[int]) -> tuple[torch.Tensor, Sequence[int], Wait]:
        """As `CountsInside`."""
        with self.watch.waiting():
            out, receive, wait = self.inner.start_all_to_all_counted(rows, send)
        return out, receive, self._ending(wait)


def watched(transport: Transport, watch: Watch) -> Watched:
    """The transport, watched, with all that it can."""
    return (WatchedCounts if isinstance(transport, CountsInside) else Watched)(transport, watch)
