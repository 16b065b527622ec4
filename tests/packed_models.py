"""Looking into sidecars, and damaging them."""

from __future__ import annotations

from pathlib import Path

from coterie.offload.transfer import Part


def bytes_in(part: Part) -> bytes:
    return b"".join(piece.file.read_bytes()[piece.offset : piece.offset + piece.length] for piece in part.pieces)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 0x80
    file.write_bytes(content)
