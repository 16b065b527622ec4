"""Writing a sidecar (offload/sidecar.py), so that a stop at any moment costs what was under way and no more.

What goes where follows from the checkpoint alone. A journal beside the files tells the checksum of each expert that is written;
the next run reads those again, drops what is not as it should be and all after it, and goes on from there. `index.json` comes
last, the journal goes then.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from coterie.offload import sidecar
from coterie.offload.checkpoint import Checkpoint
from coterie.offload.checksum import Checksum
from coterie.offload.copies import AS_STORED, AsStored, check_fields, leave_cache, parts_of
from coterie.offload.sidecar import FORMAT, INDEX, JOURNAL, Sidecar, Source, aligned
from coterie.offload.transfer import Piece, Record
from coterie.routing.errors import CoterieError, InputError
from coterie.routing.files import onto_disk

JOURNAL_FORMAT = "coterie.pack-journal.v1"
FILE_BYTES = 4 << 30  # the next file begins before one is longer, unless a single expert is
SYNC_BYTES = 256 << 20  # written between two waits for the disk itself
INDEX_BYTES = 256  # of index and journal for an expert, at most
OnBytes = Callable[[int], object]


@dataclass(frozen=True)
class Contents:
    """What is to be packed. records: the checkpoint's own, `[layer][expert]`; layer_ids: the decoder layer of each.

    how: what is made of them.
    """

    model: str
    checkpoint: Checkpoint
    layer_ids: tuple[int, ...]
    records: Sequence[Sequence[Record]]
    how: AsStored = AS_STORED

    @cached_property
    def kept(self) -> list[list[Record]]:
        """What each expert becomes; where, `layout` says."""
        return [[self.how.record(record) for record in layer] for layer in self.records]


@dataclass(frozen=True)
class Packed:
    """What is in the folder now. bytes: of all files of experts; resumed_bytes: of these, found there and right."""

    experts: int
    bytes: int
    files: int
    resumed_bytes: int


def pack(contents: Contents, folder: Path, on_bytes: OnBytes = lambda count: None) -> Packed:
    """Write the sidecar of a checkpoint, or go on with what a stopped run left. on_bytes: told what was written or found right.

    Raises InputError for a folder with something else in it, or that another run is writing, and for weights of several dtypes;
    CoterieError if the disk is full or fails, or the checkpoint changes meanwhile. KeyboardInterrupt says how to go on.
    """
    _check_alike(contents)
    _check_folder(folder)
    if (folder / INDEX).is_file() and not (folder / JOURNAL).is_file():
        return _complete(contents, folder, on_bytes)
    journal = _locked(folder)
    if journal is None:  # another run finished it just now
        return _complete(contents, folder, on_bytes)
    with journal:
        writer = Writer(contents, folder, journal)
        try:
            return writer.run(on_bytes)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {writer.way_on()}") from None
        finally:
            writer.close()


def verify(contents: Contents, folder: Path, on_bytes: OnBytes = lambda count: None) -> Packed:
    """Read a sidecar and check every expert. Raises CoterieError that names the first one that has changed, and counts them."""
    found = sidecar.open_sidecar(folder, contents.checkpoint, contents.records, contents.how)
    damaged: list[CoterieError] = []
    for layer, experts in enumerate(found.records):
        for expert, record in enumerate(experts):
            try:
                sidecar.verify_expert(found, layer, expert)
            except CoterieError as error:
                damaged.append(error)
            on_bytes(aligned(sidecar.length_of(record)))
    if damaged:
        raise CoterieError(f"{damaged[0]} ({len(damaged)} of {_count(found.records)} experts are damaged)")
    return _all_of(found)


def _complete(contents: Contents, folder: Path, on_bytes: OnBytes) -> Packed:
    found = sidecar.open_sidecar(folder, contents.checkpoint, contents.records, contents.how)
    on_bytes(found.bytes)
    return _all_of(found)


def _all_of(found: Sidecar) -> Packed:
    return Packed(_count(found.records), found.bytes, found.files, found.bytes)


def _count(records: Sequence[Sequence[Record]]) -> int:
    return sum(len(layer) for layer in records)


def layout(records: Sequence[Sequence[Record]], folder: Path) -> list[Piece]:
    """Where each expert goes, in the order of layers and experts."""
    runs: list[Piece] = []
    number, offset = 0, 0
    for record in (record for layer in records for record in layer):
        length = sidecar.length_of(record)
        if offset and offset + aligned(length) > FILE_BYTES:
            number, offset = number + 1, 0
        runs.append(Piece(folder / f"experts-{number:05}.bin", offset, length))
        offset += aligned(length)
    return runs


def _check_alike(contents: Contents) -> None:
    for layer, experts in zip(contents.layer_ids, contents.records, strict=True):
        for expert, record in enumerate(experts):
            found, expected = sidecar.described(record), sidecar.described(experts[0])
            if found != expected:
                raise InputError(
                    f"{contents.checkpoint.folder}: expert {expert} of layer {layer}: found {found}, expected {expected} as of "
                    f"expert 0; a layer of different experts is not packed"
                )


def _check_folder(folder: Path) -> None:
    """Make it if there is none; raises InputError for one in which something else is."""
    try:
        folder.mkdir(exist_ok=True)
        names = sorted(p.name for p in folder.iterdir())
    except FileNotFoundError as error:
        raise InputError(f"{folder}: the folder {folder.parent} does not exist; create it first") from error
    except OSError as error:
        raise InputError(f"{folder}: cannot be made or read: {error.strerror}") from error
    if names and JOURNAL not in names and INDEX not in names:
        raise InputError(f"{folder}: found {names[0]!r} in it, expected an empty folder or none; give another --out")


def _locked(folder: Path) -> BinaryIO | None:
    """The journal, locked; None if the sidecar has become complete."""
    path = folder / JOURNAL
    while True:
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666), "r+b", buffering=0)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise InputError(f"{path}: another run is packing into {folder}, expected none; wait for it, or end it") from error
        except OSError as error:
            file.close()
            raise CoterieError(f"{path}: cannot be locked ({error.strerror}); give --out on another file system") from error
        ours = path.is_file() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
        if (folder / INDEX).is_file():
            if ours:
                path.unlink()  # what a run left that was stopped at its very end
            file.close()
            return None
        if ours:
            return file
        file.close()  # the run that had it is done with it


class Writer:
    """The one run that may write into a folder. checksums: of the experts that are there, in the order of the layout."""

    def __init__(self, contents: Contents, folder: Path, journal: BinaryIO) -> None:
        self.contents, self.folder, self.journal = contents, folder, journal
        self.sources = sidecar.sources_of(contents.checkpoint)
        self.originals = [record for layer in contents.records for record in layer]
        self.runs = layout(contents.kept, folder)
        self.fields = contents.how.fields(self.originals[0])
        self.checksums: list[str] = []
        self._file: tuple[Path, int] | None = None
        self._unsynced = 0

    def run(self, on_bytes: OnBytes) -> Packed:
        """All of it, from what is there to the index."""
        self._take_over(on_bytes)
        kept = len(self.checksums)
        self._check_space()
        try:
            for original, run in list(zip(self.originals, self.runs, strict=True))[kept:]:
                self._write(original, run)
                on_bytes(aligned(run.length))
            self._sync()
            if sidecar.sources_of(self.contents.checkpoint) != self.sources:
                raise CoterieError(
                    f"{self.contents.checkpoint.folder}: has changed while it was packed; remove {self.folder} and pack again"
                )
            self._write_index()
        except OSError as error:
            raise self._failed(error) from error
        sizes = [aligned(run.length) for run in self.runs]
        return Packed(len(self.runs), sum(sizes), len({run.file for run in self.runs}), sum(sizes[:kept]))

    def way_on(self) -> str:
        """For people whose run ends early."""
        return f"the same command goes on after {len(self.checksums)} of {len(self.runs)} experts in {self.folder}"

    def close(self) -> None:
        """Give the file back that was written last."""
        if self._file is not None:
            os.close(self._file[1])
            self._file = None

    def _take_over(self, on_bytes: OnBytes) -> None:
        """Check what an earlier run left, drop what is not right, and begin the journal if there is none."""
        how = self.contents.how
        whole, listed = _journal(self.folder / JOURNAL, self.journal, self.sources, self.fields, len(self.runs))
        try:
            for original, run, expected in zip(self.originals, self.runs, listed, strict=False):
                if not _right(run, expected):
                    break
                how.check_sample(original, sidecar.lay(how.record(original), run))
                self.checksums.append(expected)
                on_bytes(aligned(run.length))
            self._drop_rest()
            self.journal.truncate(whole[len(self.checksums)])
            if whole[0] == 0:
                header = {"format": JOURNAL_FORMAT, "checkpoint": [asdict(source) for source in self.sources]}
                self._append(header | self.fields)
                self._sync()
        except OSError as error:
            raise self._failed(error) from error

    def _drop_rest(self) -> None:
        """Cut the files behind the last expert that is right, and remove what a stopped run was about to name."""
        ends: dict[Path, int] = {}
        for run in self.runs[: len(self.checksums)]:
            ends[run.file] = aligned(run.offset + run.length)
        for file in [*self.folder.glob("experts-*.bin"), *self.folder.glob(f".{INDEX}.*")]:
            if file in ends:
                os.truncate(file, ends[file])
            else:
                file.unlink()

    def _check_space(self) -> None:
        missing, free = self._missing(), shutil.disk_usage(self.folder).free
        if missing > free:
            raise CoterieError(f"{self.folder}: needs {missing} more bytes, found {free} free; make room, then {self.way_on()}")

    def _missing(self) -> int:
        return sum(aligned(run.length) + INDEX_BYTES for run in self.runs[len(self.checksums) :])

    def _failed(self, error: OSError) -> CoterieError:
        room = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(self.folder).free
            room = f": needs {self._missing()} more bytes, found {free} free; make room, then"
        return CoterieError(f"{self.folder}: cannot be written: {error.strerror}{room or ';'} {self.way_on()}")

    def _write(self, original: Record, run: Piece) -> None:
        """Copy an expert, and tell the journal."""
        file, seen, done = self._opened(run.file), Checksum(), run.offset
        for view in self.contents.how.views(original):
            seen.update(view)
            done += _put(file, view, done)
        _put(file, memoryview(bytes(aligned(run.length) - run.length)), done)
        self.checksums.append(seen.hexdigest())
        self._append({"expert": len(self.checksums) - 1, "checksum": self.checksums[-1]})
        self._unsynced += aligned(run.length)
        if self._unsynced > SYNC_BYTES:
            self._sync()

    def _opened(self, path: Path) -> int:
        if self._file is None or self._file[0] != path:
            self._sync()
            self.close()
            self._file = path, os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        return self._file[1]

    def _sync(self) -> None:
        """Wait until all is on the disk itself."""
        if self._file is not None:
            os.fsync(self._file[1])
            leave_cache(self._file[1], 0, 0)
        os.fsync(self.journal.fileno())
        self._unsynced = 0

    def _append(self, line: dict[str, Any]) -> None:
        text = memoryview(json.dumps(line).encode() + b"\n")
        while text:
            text = text[os.write(self.journal.fileno(), text) :]

    def _write_index(self) -> None:
        experts = iter(zip(self.runs, self.checksums, strict=True))
        layers = []
        for layer, records in zip(self.contents.layer_ids, self.contents.kept, strict=True):
            entries = [
                {"file": run.file.name, "offset": run.offset, "length": run.length, "checksum": checksum}
                for _, (run, checksum) in zip(records, experts, strict=False)
            ]
            layers.append({"layer": layer, "parameters": sidecar.described(records[0]), "experts": entries})
        index = {"format": FORMAT, "model": self.contents.model, "checkpoint": [asdict(source) for source in self.sources]}
        index |= self.fields
        temporary = self.folder / f".{INDEX}.part"
        try:
            with temporary.open("wb") as file:
                file.write(json.dumps({**index, "layers": layers}).encode())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / INDEX)
        finally:
            temporary.unlink(missing_ok=True)
        (self.folder / JOURNAL).unlink()
        onto_disk(self.folder)


def _put(descriptor: int, view: memoryview, offset: int) -> int:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)
    return done


def _right(run: Piece, expected: str) -> bool:
    """Whether an expert and the zeros behind it are there and as the journal says."""
    if not run.file.is_file() or run.file.stat().st_size < aligned(run.offset + run.length):
        return False
    seen = Checksum()
    for part in parts_of(run):
        seen.update(part)
    behind = Piece(run.file, run.offset + run.length, aligned(run.length) - run.length)
    return seen.hexdigest() == expected and not any(any(part) for part in parts_of(behind))


def _journal(
    path: Path, file: BinaryIO, sources: Sequence[Source], fields: Mapping[str, str], experts: int
) -> tuple[list[int], list[str]]:
    """(the length after the header and after each expert, 0 where there is no whole header; the experts' checksums).

    A line that is torn or is not what comes next ends it. Raises InputError if the header is of something else.
    """
    file.seek(0)
    lines = file.read().split(b"\n")[:-1]  # behind the last line break is what a stop cut short
    if not lines:
        return [0], []
    header = _parsed(lines[0])
    if header.get("format") != JOURNAL_FORMAT:
        raise InputError(
            f"{path}: format: found {str(header.get('format'))[:60]!r}, expected {JOURNAL_FORMAT!r}; pack into another folder"
        )
    sidecar.check_sources(path, header.get("checkpoint"), sources)
    check_fields(path, header, fields)
    whole, checksums = [len(lines[0]) + 1], []
    for number, line in enumerate(lines[1 : experts + 1]):
        entry = _parsed(line)
        if entry.get("expert") != number or not isinstance(entry.get("checksum"), str):
            break
        whole.append(whole[-1] + len(line) + 1)
        checksums.append(entry["checksum"])
    return whole, checksums


def _parsed(line: bytes) -> dict[str, Any]:
    """The object in a line; an empty one if it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
