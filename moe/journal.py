"""Finished sequences on disk while the others still run, so that a stop costs only what was under way.

A text file beside the output: a header line that says whose it is, then a JSON line for each finished sequence, in the order in
which they ended. Lines are only ever added at the end; what a stop left of a last line is dropped when the file is read again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from coterie.moe.batch import Request
from coterie.moe.text import Prompt
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.files import check_writable

FORMAT = "coterie.journal.v1"
SYNC_SECONDS = 10.0  # between two waits for the disk itself; lines reach the operating system at once


@dataclass(frozen=True)
class Entry:
    """A finished sequence. index: of its prompt; token_ids: new ones."""

    index: int
    token_ids: tuple[int, ...]
    finish_reason: str

    def line(self) -> bytes:
        """As it stands in the file."""
        value = {"index": self.index, "token_ids": self.token_ids, "finish_reason": self.finish_reason}
        return json.dumps(value).encode() + b"\n"


def journal_of(out: Path) -> Path:
    """Where the journal of the output file `out` lies: beside it, or beside what it links to."""
    out = out.resolve()
    return out.with_name(f".{out.name}.journal")


def digest(prompts: Sequence[Prompt], requests: Sequence[Request]) -> str:
    """Of all that the outputs show of the prompts: names, texts, token ids and limits."""
    made = hashlib.sha256()
    for prompt, request in zip(prompts, requests, strict=True):
        made.update(json.dumps([prompt.id, prompt.text, request.token_ids, request.max_new_tokens]).encode() + b"\n")
    return made.hexdigest()


class Journal:
    """An open journal; only one process writes it. Raises CoterieError, saying how to go on, if that fails.

    finished: prompts that are in it, by index the offset of their line. dropped: bytes of a torn last line.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.finished: dict[int, int] = {}
        self.dropped = 0
        self._file = file
        self._synced = time.monotonic()

    @classmethod
    def begin(cls, path: Path, header: dict[str, Any]) -> Journal:
        """A new one. Raises InputError if there is one already."""
        check_writable(path)
        try:
            file = path.open("x+b", buffering=0)
        except FileExistsError as error:
            raise InputError(
                f"{path}: an earlier run left it, expected none; --resume continues that run, removing the file starts over"
            ) from error
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        journal = cls(path, file)
        journal._lock()
        try:
            journal._write(json.dumps({"format": FORMAT, **header}).encode() + b"\n")
            journal.sync()
        except CoterieError:
            path.unlink()  # there is nothing in it to go on from
            raise
        return journal

    @classmethod
    def resume(cls, path: Path, header: dict[str, Any], prompts: int) -> Journal:
        """One that a stopped run of `prompts` prompts left. Raises InputError if it belongs to other prompts or settings."""
        try:
            file = path.open("r+b", buffering=0)
        except OSError as error:
            raise InputError(f"{path}: cannot be continued: {error.strerror}") from error
        journal = cls(path, file)
        journal._lock()
        whole = journal._read(prompts, header)
        journal.dropped = os.fstat(file.fileno()).st_size - whole
        file.truncate(whole)
        file.seek(whole)
        if whole == 0:
            journal._write(json.dumps({"format": FORMAT, **header}).encode() + b"\n")
        return journal

    def append(self, entries: Sequence[Entry]) -> None:
        """Add finished sequences; those that are in it already are left out."""
        for entry in entries:
            if entry.index not in self.finished:
                self.finished[entry.index] = self._write(entry.line())
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def entry(self, index: int) -> Entry:
        """The finished sequence of prompt `index`."""
        with self.path.open("rb") as file:
            file.seek(self.finished[index])
            return _entry(file.readline())

    def way_on(self) -> str:
        """For people whose run ends early."""
        if not self.finished:
            return "--resume begins again, nothing was finished"
        return f"--resume continues after the {len(self.finished)} finished prompts in {self.path}"

    def sync(self) -> None:
        """Wait until all lines are on the disk itself."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        self._synced = time.monotonic()

    def close(self) -> None:
        """Leave it for a later --resume."""
        self._file.close()

    def remove(self) -> None:
        """It has served: the output is complete."""
        self.path.unlink()
        self.close()

    def _write(self, line: bytes) -> int:
        """Add a line; returns its offset."""
        start = self._file.tell()
        try:
            done = 0
            while done < len(line):
                done += self._file.write(line[done:]) or 0
        except OSError as error:
            raise self._failed(error) from error
        return start

    def _failed(self, error: OSError) -> CoterieError:
        return CoterieError(f"{self.path}: cannot be written: {error.strerror}; make room, then: {self.way_on()}")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{self.path}: another run is writing it, expected none; wait for it, or end it") from error
        except OSError as error:
            raise CoterieError(
                f"{self.path}: cannot be locked ({error.strerror}); write --out to another file system"
            ) from error

    def _read(self, prompts: int, header: dict[str, Any]) -> int:
        """Check the header, find the entries; returns the length of what is whole."""
        with self.path.open("rb") as file:
            first = file.readline()
            if not first.endswith(b"\n"):
                return 0
            _check_header(self.path, _parsed(self.path, 1, first), header)
            offset, number = len(first), 1
            for number, line in enumerate(file, 2):
                if not line.endswith(b"\n"):
                    break
                found = _parsed(self.path, number, line)
                if not _is_entry(found, prompts) or found["index"] in self.finished:
                    raise InputError(
                        f"{self.path}: line {number}: found {str(line)[:60]}, expected a finished prompt; {REMOVE}"
                    )
                self.finished[found["index"]] = offset
                offset += len(line)
        return offset


REMOVE = "remove the file to start over"


def check_header(path: Path, header: dict[str, Any]) -> None:
    """Raises InputError if the journal at `path` says otherwise than `header`, for the fields that this has."""
    try:
        with path.open("rb") as file:
            first = file.readline()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if first.endswith(b"\n"):
        _check_header(path, _parsed(path, 1, first), header)


def _check_header(path: Path, found: Any, expected: dict[str, Any]) -> None:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{path}: format: found {str(found)[:60]}, expected {FORMAT!r}; {REMOVE}")
    for field, value in expected.items():
        if found.get(field) != value:
            was, now = str(found.get(field))[:20], str(value)[:20]
            raise InputError(f"{path}: {field}: found {was}, expected {now} as now; give what the stopped run had, or {REMOVE}")


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: line {number}: is not JSON ({str(error)[:60]}); {REMOVE}") from error


def _is_entry(found: Any, prompts: int) -> bool:
    if not isinstance(found, dict) or set(found) != {"index", "token_ids", "finish_reason"}:
        return False
    index, ids = found["index"], found["token_ids"]
    known = type(index) is int and 0 <= index < prompts and found["finish_reason"] in ("stop", "length")
    return known and isinstance(ids, list) and all(type(i) is int for i in ids)


def _entry(line: bytes) -> Entry:
    found = json.loads(line)
    return Entry(found["index"], tuple(found["token_ids"]), found["finish_reason"])
