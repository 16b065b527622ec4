"""Where every tensor of a safetensors checkpoint lies on disk, and reading just the parts that are wanted.

Files are read with `pread` at known offsets, never through a memory map, and every byte read is counted: that a rank reads
only its own experts is a number, not a promise.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from coterie.offload.coded import Code, decoded_places
from coterie.routing.errors import InputError
from coterie.routing.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PAGES = 1 << 16  # bytes from which a tensor gets memory pages of its own
MAX_HEADER = 100_000_000  # the format's own limit
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class TensorPlace:
    """One tensor in its file. offset: absolute, bytes; length: bytes.

    code: what the bytes stand for, `dtype` and `shape` being the weights'; None where they are the weights.
    """

    file: Path
    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    code: Code | None = None

    def stored(self) -> TensorPlace:
        """The bytes themselves."""
        return self if self.code is None else replace(self, dtype=self.code.dtype, shape=self.code.shape, code=None)


@dataclass
class ReadCounter:
    """Bytes read from checkpoint files by this process; safe to add to from several threads. watch: told of each addition."""

    bytes: int = 0
    watch: Callable[[int], object] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        """Count `count` more bytes."""
        with self._lock:
            self.bytes += count
            if self.watch is not None:
                self.watch(count)


Version = tuple[int, int, int]  # of a file: what changes when it is written to, or another takes its place


def version_of(file: Path | int) -> Version:
    """The size, the time of the last write in ns, and which file it is. file: its path, or open."""
    found = os.fstat(file) if isinstance(file, int) else file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


class Checkpoint:
    """The tensors of a checkpoint folder by name, and a counter of what was read. versions: of its files as indexed.

    Tensors of a checkpoint in fewer bits go by the names of the weights that they stand for (offload/coded.py).
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorPlace], versions: Mapping[Path, Version] | None = None) -> None:
        self.folder = folder
        self.tensors = tensors
        self.versions = dict(versions or {})
        self.counter = ReadCounter()

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Index the headers of all shards. Raises InputError, naming the file, for a missing, truncated or malformed one."""
        tensors: dict[str, TensorPlace] = {}
        versions = {}
        for shard in _shards(folder):
            try:
                versions[shard] = version_of(shard)
            except OSError as error:
                raise InputError(f"{shard}: cannot be read: {error.strerror}") from error
            tensors |= read_header(shard)
        _check_index(folder, tensors)
        return cls(folder, decoded_places(folder, tensors), versions)

    @property
    def coded(self) -> bool:
        """Whether weights are to be worked out from what is stored."""
        return any(place.code is not None for place in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        """All that tensors lie in, in order."""
        scales = (place.code.scales.file for place in self.tensors.values() if place.code is not None)
        return sorted({*scales, *(place.file for place in self.tensors.values())})

    def slice(self, name: str, rows: Sequence[int] | None = None) -> TensorSlice:
        """A tensor, or some of its first dimension's rows, to be read when asked for."""
        return TensorSlice(self.tensors[name], self.counter, None if rows is None else tuple(rows), self.versions)


@dataclass(frozen=True)
class TensorSlice:
    """A lazily read tensor; `slice[...]` reads it, as transformers' loader does with safetensors' own slices.

    rows: indices into the first dimension, in the order wanted, or None for all. versions: of files as far as they are known.
    """

    place: TensorPlace
    counter: ReadCounter
    rows: tuple[int, ...] | None = None
    versions: Mapping[Path, Version] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype on disk."""
        return self.place.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that reading gives."""
        return self.place.shape if self.rows is None else (len(self.rows), *self.place.shape[1:])

    @property
    def length(self) -> int:
        """Bytes that are read."""
        code = self.place.code
        if code is not None:
            return self.values().length + self.scales().length
        return math.prod(self.shape) * self.place.dtype.itemsize

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and scales as stored, of a tensor with a code."""
        return self.values().read(), self.scales().read()

    def values(self) -> TensorSlice:
        """The bytes themselves."""
        return self._part(self.place.stored())

    def scales(self) -> TensorSlice:
        """Those of a tensor with a code."""
        assert self.place.code is not None
        return self._part(self.place.code.scales)

    def _part(self, place: TensorPlace) -> TensorSlice:
        """The same rows of what it is worked out from; scales that all share have none."""
        rows = None if math.prod(place.shape) == 1 else self.rows
        return TensorSlice(place, self.counter, rows, self.versions)

    def get_shape(self) -> list[int]:
        """As safetensors' slices spell it."""
        return list(self.shape)

    def is_floating_point(self) -> bool:
        """As tensors spell it."""
        return self.place.dtype.is_floating_point

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def read(self) -> torch.Tensor:
        """Read the bytes and return a tensor of `shape`; runs of adjacent rows are one read each."""
        if self.place.code is not None and self.rows != ():
            return self.place.code.decoded(*self.stored())
        buffer = _buffer(self.length)
        view = memoryview(buffer)
        done = 0
        for offset, length in self._ranges():
            _read_into(
                self.place.file, self.place.offset + offset, view[done : done + length], self.versions.get(self.place.file)
            )
            done += length
        self.counter.add(done)
        if not done:
            return torch.empty(self.shape, dtype=self.place.dtype)
        return torch.frombuffer(buffer, dtype=self.place.dtype).reshape(self.shape)

    def ranges(self) -> list[tuple[int, int]]:
        """Where its bytes lie in the file, (offset, length)."""
        return [(self.place.offset + offset, length) for offset, length in self._ranges()]

    def _ranges(self) -> list[tuple[int, int]]:
        if self.rows is None:
            return [(0, self.place.length)]
        size = self.place.length // self.place.shape[0]
        ranges: list[tuple[int, int]] = []
        for row in self.rows:
            if ranges and sum(ranges[-1]) == row * size:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + size)
            else:
                ranges.append((row * size, size))
        return ranges


def _buffer(length: int) -> bytearray | mmap.mmap:
    """Memory that goes back to the system as soon as the tensor in it is gone.

    Loading stacks thousands of small tensors into large ones. glibc would keep what the small ones took: the process stayed
    nearly twice as large as its weights.
    """
    if length < PAGES:
        return bytearray(length)
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _read_into(file: Path, offset: int, view: memoryview, version: Version | None) -> None:
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            if version is not None and version_of(descriptor) != version:
                raise InputError(f"{file}: was changed since its header was read; start again once it is whole")
            done = 0
            while done < len(view):
                got = os.preadv(descriptor, [view[done:]], offset + done)
                if got == 0:
                    raise InputError(
                        f"{file}: ends at byte {offset + done}, expected {len(view) - done} more; is it truncated?"
                    )
                done += got
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        weight_map = _weight_map(index)
        shards = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        shards = [folder / SINGLE]
    for shard in shards:
        if not shard.is_file():
            wanted = f"listed in {INDEX}" if index.is_file() else f"or {INDEX} beside it"
            raise InputError(f"{shard}: no such file, expected it {wanted}; fetch the checkpoint again")
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) and "/" not in v for v in weight_map.values()):
        raise InputError(f"{index}: weight_map: found {str(weight_map)[:60]}, expected an object of tensor name to file name")
    return weight_map


def _check_index(folder: Path, tensors: dict[str, TensorPlace]) -> None:
    index = folder / INDEX
    if not index.is_file():
        return
    for name, shard in _weight_map(index).items():
        if name not in tensors:
            raise InputError(
                f"{folder / shard}: lacks tensor {name!r}, expected it there by {INDEX}; fetch the checkpoint again"
            )


def read_header(file: Path) -> dict[str, TensorPlace]:
    """The tensors of one safetensors file. Raises InputError if the header is malformed or the file shorter than it says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 0 < length <= min(MAX_HEADER, size - 8):
                raise InputError(
                    f"{file}: found a header of {length} bytes in a file of {size}; is it truncated or not safetensors?"
                )
            header = json.loads(stream.read(length).decode("utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: header is not JSON ({str(error)[:80]}); is it a safetensors file?") from error
    if not isinstance(header, dict):
        raise InputError(f"{file}: header: found {type(header).__name__}, expected an object")
    return {k: _place(file, k, v, 8 + length, size) for k, v in header.items() if k != "__metadata__"}


def _place(file: Path, name: str, entry: Any, start: int, size: int) -> TensorPlace:
    if isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and entry["dtype"] not in DTYPES:
        raise InputError(f"{file}: tensor {name!r}: dtype: found {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    try:
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: tensor {name!r}: found {str(entry)[:80]}, expected dtype, shape, data_offsets") from error
    if not whole or last - first != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{file}: tensor {name!r}: shape {list(shape)} does not fit data_offsets [{first}, {last}]")
    if start + last > size:
        raise InputError(
            f"{file}: found {size} bytes, expected {start + last} for tensor {name!r}: the file is truncated; fetch it again"
        )
    return TensorPlace(file, start + first, last - first, dtype, shape)
