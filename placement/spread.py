"""Several searches at once: in child processes of this one (`--workers`), or in the processes that mpirun started.

A child is a fresh interpreter that is sent one call on its standard input and answers on its standard output, so that the
caller's program needs no guard and nothing is forked. Searches that are spread are pure functions of arrays.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from coterie.placement.deadline import Deadline, interruptible
from coterie.routing.errors import CoterieError, InputError, first_line, wanted

GRACE = 20.0  # seconds that a child may take beyond its deadline: one step of its search


class LostWorker(CoterieError):
    """A child that ended without an answer: killed, or out of memory."""


@dataclass
class Child:
    """One call in another process. function: `module:name`; its keyword `report`, if `reported`, sends values back."""

    function: str
    arguments: dict[str, Any]
    deadline: Deadline
    reported: Callable[..., None] | None = None
    _answer: list[Any] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ready: bool = False
    _stopping: bool = False

    def start(self) -> Child:
        """Start it; returns itself."""
        root = str(Path(__file__).absolute().parents[2]) if _is_checkout() else ""
        paths = [p for p in (root, os.environ.get("PYTHONPATH", "")) if p]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "coterie.placement.spread"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            start_new_session=True,
        )  # fmt: skip
        call = (self.function, self.arguments, self.deadline, self.reported is not None)
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # it has ended already: `result` says so
            pickle.dump(call, self._process.stdin)
            self._process.stdin.flush()
        self._reader = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        return self

    def _listen(self, stream: Any) -> None:
        try:
            while True:
                kind, value = pickle.load(stream)
                if kind == "ready":
                    self._signal(ready=True)
                elif kind == "report" and self.reported is not None:
                    self.reported(*value)
                elif kind != "report":
                    self._answer.append((kind, value))
        except (EOFError, pickle.UnpicklingError):
            return

    def wait(self, deadline: Deadline) -> None:
        """Until it has answered, or the deadline."""
        while self._reader.is_alive() and not deadline.passed():
            self._reader.join(min(0.2, deadline.left()))

    def stop(self) -> None:
        """Ask for what it has: its deadline is now. One that is not ready to be asked yet is asked then."""
        self._signal(stopping=True)

    def _signal(self, ready: bool = False, stopping: bool = False) -> None:
        """A second signal would end the child without an answer, and so would one that it does not wait for yet."""
        with self._lock:
            before = self._ready and self._stopping
            self._ready, self._stopping = self._ready or ready, self._stopping or stopping
            if self._ready and self._stopping and not before and self._process.poll() is None:
                self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it without an answer."""
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        """Its pipes, once it has ended."""
        self._reader.join(GRACE)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()

    def result(self) -> Any:
        """What the call returned, waited for until its deadline and a little longer.

        Raises LostWorker if there is no answer, CoterieError if the call raised.
        """
        self.wait(self.deadline)
        if self._reader.is_alive() and self.deadline.stop.is_set():
            self.stop()
        self._reader.join(GRACE)
        if self._process.poll() is None and not self._answer:
            self._process.kill()
        self._process.wait()
        self._close()
        if not self._answer:
            raise LostWorker(f"{self.function}: a worker ended without an answer (exit code {self._process.returncode})")
        kind, value = self._answer[0]
        if kind == "error":
            raise CoterieError(f"{self.function}: a worker failed: {value}")
        return value


@contextmanager
def ended(children: Sequence[Child | None]) -> Iterator[None]:
    """What is raised inside ends the children too, those that have come by then: nobody will ask for their answers."""
    try:
        yield
    except BaseException:
        for child in children:
            if child is not None:
                child.kill()
        raise


def _is_checkout() -> bool:
    """Run from links in a checkout, where the package's folder may not be on the child's path."""
    return Path(__file__).absolute().parent.parent.name == "coterie"


def _send(stream: BinaryIO, kind: str, value: Any) -> None:
    pickle.dump((kind, value), stream)
    stream.flush()


def _end_with_parent() -> None:
    """Nothing more comes on standard input; it is closed when nobody wants the answer any more, however the parent ended."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _serve() -> None:
    name, arguments, deadline, reports = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a solver prints is not an answer
    module, function = name.split(":")
    if reports:
        arguments["report"] = lambda *values: _send(out, "report", values)
    try:
        with interruptible(deadline):
            _send(out, "ready", None)
            _send(out, "result", getattr(importlib.import_module(module), function)(**arguments, deadline=deadline))
    except Exception as error:  # sent to the parent, which raises it, if it is still there
        with suppress(OSError):
            _send(out, "error", f"{type(error).__name__}: {error}")
    finally:
        with suppress(OSError):
            out.close()


@dataclass(frozen=True)
class World:
    """The processes that work on one plan: this one's number among `size`, and how to gather from all."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]


def mpi_world(launcher: str, size: int) -> Any:
    """MPI's communicator of the `size` processes that `launcher` started. Raises InputError where it cannot be had."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise InputError(f"{launcher}: mpi4py cannot be used ({first_line(error)}): {wanted('mpi')}") from error
    communicator = MPI.COMM_WORLD
    if communicator.size != size:
        library = MPI.Get_library_version().split(",")[0].strip()
        raise InputError(
            f"{launcher}: started {size} processes, but mpi4py ({library}) sees {communicator.size}: "
            "expected mpi4py and the launcher to be of the same MPI"
        )
    return communicator


def world() -> World:
    """The processes of an mpirun, or this one alone. Raises InputError where they cannot be reached."""
    name = next((n for n in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if n in os.environ), None)
    said = "1" if name is None else os.environ[name]
    if not (said.isascii() and said.isdigit()):
        raise InputError(f"{name}: found {said!r}, expected the number of processes that mpirun has started")
    size = int(said)
    if size < 2:
        return World()
    communicator = mpi_world("mpirun", size)
    return World(communicator.rank, communicator.size, communicator.allgather)


if __name__ == "__main__":
    _serve()
