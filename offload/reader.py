"""Reading experts while the processor computes: the system reads, and one thread of ours only puts away what has come.

Threads that wait for a read each, and take the interpreter when it has ended, hold up the thread that computes.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count

import torch

from coterie.offload.aio import Queue, Read
from coterie.offload.files import Files, gone_on, remaining
from coterie.offload.transfer import BLOCK, STAGE_BYTES, Own, Request, Transfer, aligned_empty
from coterie.routing.errors import CoterieError

DEPTH = 32  # reads at a time; more wait here
AHEAD_BYTES = 8 << 20  # under way, from which on nothing begins that is not needed yet
TOO_MANY = (errno.EAGAIN, errno.ENOMEM)  # the system can begin no more for now
MOST_TRIES, TRY_SECONDS = 100, 0.01
STAGES = 8  # reads at a time of what cannot be read right into its place


@dataclass
class Job:
    """A transfer asked for. sent, taken: how many of its requests; came: what waits for its turn."""

    transfer: Transfer
    future: Future[None] = field(default_factory=Future)
    sent: int = 0
    under_way: int = 0
    taken: int = 0
    came: dict[int, Flight] = field(default_factory=dict)
    error: BaseException | None = None


@dataclass
class Flight:
    """A read under way. number: of the request; own: the reader's part of where it goes, the nth of its kind."""

    job: Job
    number: int
    request: Request
    own: Own
    nth: int | None
    done: int = 0


class AsyncReader:
    """Fills transfers by asynchronous reads. Raises OSError where the system has none, or refuses them.

    Reads begin in the thread that asks for them, or, where others had to end first, in the reader's own, which puts away what
    has come. What both use is used under the lock.
    """

    def __init__(self, files: Files) -> None:
        if not hasattr(os, "eventfd"):
            raise OSError("no eventfd here")
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            self._queue = Queue(DEPTH, self._wake)
        except OSError:
            os.close(self._wake)
            raise
        self._files = files
        self._lock = threading.RLock()
        self._wanted: deque[Job] = deque()
        self._later: deque[Job] = deque()
        self._open: dict[int, Job] = {}  # all that is not settled, by id
        self._flying: dict[int, Flight] = {}
        self._again: list[Flight] = []  # those that a short read stopped
        self._tags = count()
        self._stages: list[Own] = []
        self._free = list(range(STAGES))
        edges = aligned_empty((DEPTH + STAGES, BLOCK), torch.uint8).numpy()  # some wait for their turn to be put away
        self._edges = [Own.of(row) for row in edges]
        self._free_edges = list(range(len(self._edges)))
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="coterie-read", daemon=True)
        self._thread.start()

    def start(self, transfers: Sequence[Transfer], ahead: bool) -> list[Future[None]]:
        """Begin; ahead: behind all that is needed. What has not begun can be cancelled."""
        jobs = [Job(transfer) for transfer in transfers]
        with self._lock:
            if self._closing:
                raise CoterieError(
                    "experts cannot be read any more: the model was closed, or an earlier read failed; load it again"
                )
            try:
                self._open.update((id(job), job) for job in jobs)
                (self._later if ahead else self._wanted).extend(jobs)
                self._send()
            except BaseException:  # such as ctrl-C: nobody knows how far it came
                self._reset(CoterieError("experts were still being read when the run was interrupted"))
                self._queue = Queue(DEPTH, self._wake)
                raise
        return [job.future for job in jobs]

    def close(self) -> None:
        """Wait until nothing is written any more, and give the system's part back; what was not there yet has failed."""
        with self._lock:
            if not self._closing:
                self._closing = True
                os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:  # where garbage may be collected
            self._thread.join()

    def _reset(self, why: BaseException, ended: bool = False) -> None:
        """Wait until the system writes nowhere any more; what was asked for has failed.

        ended: the reader's thread puts nothing away any more. Else what it is just putting away is told once it has done so.
        """
        try:
            self._queue.close()
        except OSError as error:
            why = error
        for flight in (*self._flying.values(), *self._again):
            flight.job.under_way -= 1
            self._release(flight)
        for line in (self._flying, self._again, self._wanted, self._later):
            line.clear()
        for job in list(self._open.values()):
            if job.future.cancelled() or not (job.sent or job.future.set_running_or_notify_cancel()):
                self._open.pop(id(job))
                continue
            job.error = job.error or why
            if ended:
                job.future.set_exception(job.error)
            self._settle(job)
        if ended:
            self._open.clear()

    def _run(self) -> None:
        why: BaseException = CoterieError("experts were still being read when reading was closed")
        try:
            while not self._closing:
                os.eventfd_read(self._wake)
                with self._lock:
                    came = [self._ended(tag, result) for tag, result in self._queue.ended()]
                    slow = [flight for flight in came if flight is not None and not self._put_away_at_once(flight)]
                    if not self._closing:
                        self._send()  # before anything else is put away: the disk is to have something to do
                for flight in slow:
                    self._put_away(flight)
        except BaseException as error:  # theirs who wait
            why = error
            raise
        finally:
            with self._lock:
                self._closing = True
                self._reset(why, ended=True)
                os.close(self._wake)

    def _send(self) -> None:
        """Begin what may begin, all by one call."""
        reads = [self._read_of(flight) for flight in self._again]
        self._again.clear()
        while len(self._flying) < DEPTH and (found := self._next()) is not None:
            reads.append(self._read_of(found))
        tries = 0
        while reads:
            try:
                reads = reads[self._queue.submit(reads) :]
            except OSError as error:
                if error.errno in TOO_MANY and self._flying.keys() - {read.tag for read in reads}:
                    self._again += [self._flying.pop(read.tag) for read in reads]  # until some have ended
                    return
                if error.errno in TOO_MANY and tries < MOST_TRIES:  # others' reads have to end
                    tries += 1
                    time.sleep(TRY_SECONDS)
                    continue
                flight = self._ended(reads.pop(0).tag, -(error.errno or errno.EIO))
                assert flight is not None
                flight.job.under_way -= 1
                self._release(flight)
                self._settle(flight.job)

    def _read_of(self, flight: Flight) -> Read:
        tag, request, done = next(self._tags), flight.request, flight.done
        self._flying[tag] = flight
        if done:  # a short read stopped it
            views = remaining(flight.job.transfer.views(request, flight.own), done)
            places = [(view.ctypes.data, len(view)) for view in views]
        else:
            places = flight.job.transfer.goes_to(request, flight.own)
        return Read(tag, self._files.descriptors[request.file], request.offset + done, places)

    def _next(self) -> Flight | None:
        """The next request of what was asked for first."""
        for line in (self._wanted, self._later):
            while line and (line[0].error is not None or line[0].future.cancelled()):
                dropped = line.popleft()
                if dropped.future.cancelled():
                    self._open.pop(id(dropped), None)
            if not line:
                continue
            job = line[0]
            request = job.transfer.requests[job.sent]
            busy = line is self._later and sum(flight.request.length for flight in self._flying.values()) >= AHEAD_BYTES
            if busy or not (self._free_edges if request.direct else self._free):
                return None
            if not (job.sent or job.future.set_running_or_notify_cancel()):
                return self._next()
            return self._begun(line, job, request)
        return None

    def _begun(self, line: deque[Job], job: Job, request: Request) -> Flight:
        number, job.sent, job.under_way = job.sent, job.sent + 1, job.under_way + 1
        if job.sent == len(job.transfer.requests):
            line.popleft()
        if request.direct:
            nth = self._free_edges.pop()
            own = self._edges[nth]
        else:
            nth = self._free.pop()
            while len(self._stages) <= nth:
                self._stages.append(Own.of(aligned_empty((STAGE_BYTES,), torch.uint8).numpy()))
            own = self._stages[nth]
        return Flight(job, number, request, own, nth)

    def _ended(self, tag: int, result: int) -> Flight | None:
        """The flight whose read has ended, its job's error set if it failed; None if it goes on where a short read stopped."""
        flight = self._flying.pop(tag)
        request = flight.request
        if result < 0:
            flight.job.error = CoterieError(f"{request.file}: cannot be read: {os.strerror(-result)}")
            return flight
        try:
            flight.done = gone_on(request, flight.done, result)
        except CoterieError as error:
            flight.job.error = error
            return flight
        if flight.done >= request.least:
            return flight
        self._again.append(flight)
        return None

    def _put_away_at_once(self, flight: Flight) -> bool:
        """Where that takes next to no time, and no turn: what was read right into its place, without a checksum."""
        job = flight.job
        if not flight.request.direct or job.transfer.seen is not None:
            return False
        self._take(flight)
        job.under_way -= 1
        self._release(flight)
        self._settle(job)
        return True

    def _put_away(self, flight: Flight) -> None:
        """Take what has come, as far as its turn has."""
        job = flight.job
        for came in self._due(flight):
            self._take(came)
            with self._lock:
                self._release(came)
                if not self._closing:
                    self._send()
        with self._lock:
            job.under_way -= 1
            self._settle(job)

    def _due(self, flight: Flight) -> Iterator[Flight]:
        """What may be taken now: this, or, where a checksum goes by their order, those whose turn has come."""
        job = flight.job
        if job.transfer.seen is None:
            yield flight
            return
        job.came[flight.number] = flight
        while job.taken in job.came:
            yield job.came.pop(job.taken)

    def _take(self, flight: Flight) -> None:
        job = flight.job
        job.taken += 1
        try:
            if job.error is None:
                job.transfer.take(flight.request, flight.own)
        except BaseException as error:  # the future's to raise
            job.error = error

    def _release(self, flight: Flight) -> None:
        if flight.nth is not None:
            (self._free_edges if flight.request.direct else self._free).append(flight.nth)
            flight.nth = None

    def _settle(self, job: Job) -> None:
        """Tell how it ended, once nothing is written to its tensors any more."""
        if job.under_way or (job.error is None and job.taken < len(job.transfer.requests)):
            return
        self._open.pop(id(job), None)
        for flight in job.came.values():
            self._release(flight)
        job.came.clear()
        if job.future.done():  # told before, when all was given up
            return
        try:
            if job.error is None:
                self._files.finish(job.transfer)
        except BaseException as error:  # the future's to raise
            job.error = error
        if job.error is None:
            job.future.set_result(None)
        else:
            job.future.set_exception(job.error)
