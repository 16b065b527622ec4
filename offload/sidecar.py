"""The sidecar of a checkpoint: its experts once more, each in one run of bytes that begins at a multiple of 4 KiB.

A folder with `experts-00000.bin` and so on, and `index.json`, which says what lies where, what it must give as a checksum, and
which checkpoint it is a copy of. `offload/pack.py` writes it; a folder without `index.json` is not one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from coterie.offload.checkpoint import Checkpoint
from coterie.offload.checksum import Checksum, check
from coterie.offload.copies import AS_STORED, AsStored, check_fields, parts_of
from coterie.offload.transfer import BLOCK, Part, Piece, Record
from coterie.routing.errors import InputError
from coterie.routing.files import read_json

FORMAT = "coterie.experts.v1"
INDEX, JOURNAL = "index.json", ".experts.journal"
SAMPLED = 8  # experts of a layer that are compared if the checkpoint's files have another time


@dataclass(frozen=True)
class Source:
    """A file of a checkpoint. header_sha256: of the safetensors header with its length; mtime_ns: of its last change."""

    file: str
    size: int
    header_sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Sidecar:
    """What `index.json` says. records: as of `index_experts`, an expert's parts adjacent; checksums: of its bytes, likewise
    `[layer][expert]`; bytes: of all files.
    """

    folder: Path
    records: Sequence[Sequence[Record]]
    checksums: Sequence[Sequence[str]]
    files: int
    bytes: int


def aligned(length: int) -> int:
    """The next multiple of 4 KiB."""
    return -(-length // BLOCK) * BLOCK


def length_of(record: Record) -> int:
    """Bytes of an expert."""
    return sum(part.length for part in record.values())


def lay(record: Record, run: Piece) -> dict[str, Part]:
    """The same parts, one after another in a run."""
    made, start = {}, run.offset
    for name, part in record.items():
        made[name] = replace(part, pieces=(Piece(run.file, start, part.length),))
        start += part.length
    return made


def run_of(record: Record) -> Piece:
    """All of an expert that was packed."""
    pieces = [part.pieces[0] for part in record.values()]
    return Piece(pieces[0].file, pieces[0].offset, sum(piece.length for piece in pieces))


def described(record: Record) -> dict[str, Any]:
    """Dtype and shape by parameter, in the order of the bytes, as they stand in the index."""
    return {n: {"dtype": str(p.dtype).removeprefix("torch."), "shape": list(p.shape)} for n, p in record.items()}


def open_sidecar(
    folder: Path, checkpoint: Checkpoint, records: Sequence[Sequence[Record]], how: AsStored = AS_STORED
) -> Sidecar:
    """The sidecar of `checkpoint` in `folder`. records: the checkpoint's own; how: what was made of them.

    Raises InputError, naming file and field, if it is none, of another checkpoint, of one that has changed, or lacks bytes.
    """
    path = folder / INDEX
    if not path.is_file():
        unfinished = "packing was not finished: go on" if (folder / JOURNAL).is_file() else "make it"
        raise InputError(f"{path}: no such file, expected it in a folder of packed experts; {unfinished} with coterie pack")
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        is_ = found.get("format") if isinstance(found, dict) else found
        raise InputError(f"{path}: format: found {str(is_)[:60]!r}, expected {FORMAT!r}; pack again, into another folder")
    same_times = check_sources(path, found.get("checkpoint"), sources_of(checkpoint))
    check_fields(path, found, how.fields(records[0][0]))
    layers = _layers(path, found.get("layers"), folder, [[how.record(record) for record in layer] for layer in records])
    made = Sidecar(folder, [[r for r, _ in layer] for layer in layers], [[c for _, c in layer] for layer in layers], 0, 0)
    sizes = _check_sizes(made.records)
    if not same_times:
        for original, packed in zip(records, made.records, strict=True):
            for expert in sorted({i * len(packed) // SAMPLED for i in range(SAMPLED)}):
                how.check_sample(original[expert], packed[expert])
    return replace(made, files=len(sizes), bytes=sum(sizes.values()))


def _layers(
    path: Path, found: Any, folder: Path, records: Sequence[Sequence[Record]]
) -> list[list[tuple[dict[str, Part], str]]]:
    experts = [len(entry["experts"]) for entry in found] if _is_layers(found) else None
    if experts != [len(layer) for layer in records]:
        raise InputError(
            f"{path}: layers: found {_short(experts)} experts, expected {_short([len(layer) for layer in records])}; "
            f"remove {folder} and pack again"
        )
    made = []
    for layer, (entry, originals) in enumerate(zip(found, records, strict=True)):
        if entry.get("parameters") != described(originals[0]):
            raise InputError(
                f"{path}: layers[{layer}].parameters: found {_short(entry.get('parameters'))}, expected "
                f"{_short(described(originals[0]))} as in the checkpoint; remove {folder} and pack again"
            )
        named = {name: originals[0][name] for name in entry["parameters"]}
        made.append([_expert(path, f"layers[{layer}].experts[{e}]", one, named) for e, one in enumerate(entry["experts"])])
    return made


def _is_layers(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(e, dict) and isinstance(e.get("experts"), list) for e in found)


def _expert(path: Path, field: str, entry: Any, parts: Record) -> tuple[dict[str, Part], str]:
    length = length_of(parts)
    try:
        file, offset, known, checksum = (entry[name] for name in ("file", "offset", "length", "checksum"))
        right = type(offset) is int and offset >= 0 and offset % BLOCK == 0 and known == length
        right = right and isinstance(checksum, str) and isinstance(file, str) and Path(file).name == file
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: {field}: found {_short(entry)}, expected file, offset, length and checksum") from error
    if not right:
        raise InputError(
            f"{path}: {field}: found {_short(entry)}, expected a file of the folder, an offset that is a multiple of {BLOCK}, "
            f"length {length} and a checksum"
        )
    return lay(parts, Piece(path.parent / file, offset, length)), checksum


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _check_sizes(records: Sequence[Sequence[Record]]) -> dict[Path, int]:
    """Bytes by file. Raises InputError for a file that is missing or shorter than the index says."""
    ends: dict[Path, int] = {}
    for layer in records:
        for run in map(run_of, layer):
            ends[run.file] = max(ends.get(run.file, 0), aligned(run.offset + run.length))
    for file, expected in ends.items():
        found = file.stat().st_size if file.is_file() else None
        if found != expected:
            what = "no such file" if found is None else f"found {found} bytes"
            raise InputError(f"{file}: {what}, expected {expected} bytes; remove {file.parent} and pack again")
    return ends


def sources_of(checkpoint: Checkpoint) -> list[Source]:
    """What tells these files from others without reading them whole. Raises InputError if one cannot be read."""
    made = []
    for file in checkpoint.files:
        try:
            with file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                head = stream.read(8)
                head += stream.read(int.from_bytes(head, "little"))
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from error
        made.append(Source(file.name, status.st_size, hashlib.sha256(head).hexdigest(), status.st_mtime_ns))
    return made


def check_sources(path: Path, packed: Any, now: Sequence[Source]) -> bool:
    """Whether the files also have the times that they had when they were packed; a copy has others, which is no fault.

    Raises InputError if names, sizes or headers differ. path: the file that says what was packed.
    """
    again = f"the checkpoint is another or has changed since it was packed; remove {path.parent} and pack again"
    try:
        before = {entry["file"]: entry for entry in packed}
        times = [before[source.file]["mtime_ns"] if source.file in before else None for source in now]
        if sorted(before) != [source.file for source in now]:
            raise InputError(
                f"{path}: checkpoint: found files {_short([s.file for s in now])}, expected {_short(list(before))}: {again}"
            )
        for source in now:
            for field in ("size", "header_sha256"):
                found, expected = asdict(source)[field], before[source.file][field]
                if found != expected:
                    raise InputError(f"{path}: {source.file}: {field}: found {found}, expected {expected}: {again}")
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path}: checkpoint: found {_short(packed)}, expected file, size, header_sha256 and mtime_ns of each file; "
            f"remove {path.parent} and pack again"
        ) from error
    return times == [source.mtime_ns for source in now]


def verify_expert(sidecar: Sidecar, layer: int, expert: int) -> None:
    """Read an expert and check it. Raises CoterieError, naming file, layer and expert, if its bytes have changed."""
    run, seen = run_of(sidecar.records[layer][expert]), Checksum()
    for part in parts_of(run):
        seen.update(part)
    check(seen, sidecar.checksums[layer][expert], run.file, layer, expert)
