"""What becomes of an expert in a packed copy: its bytes as the checkpoint has them, or rounded as kernels multiply them.

Both say what an expert's parts are, give its bytes, and can tell a copy of it from that of another by a sample.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from coterie.kernels.formats import GROUP
from coterie.kernels.rounded import Kept
from coterie.offload.coded import fp8_in_place, kept_as_fp8
from coterie.offload.transfer import Part, Piece, Record, bytes_of
from coterie.routing.errors import CoterieError, InputError

PART_BYTES = 4 << 20  # read and written at once
SAMPLE_BYTES = 4096


class AsStored:
    """The checkpoint's own bytes, or the weights that they stand for."""

    def record(self, original: Record) -> Record:
        """The parts of an expert in the copy, in the order of the bytes; where, does not matter."""
        return {name: replace(part, coded=()) for name, part in original.items()}

    def fields(self, original: Record) -> dict[str, str]:
        """What index and journal say of it."""
        return {}

    def views(self, original: Record) -> Iterator[memoryview]:
        """The bytes of the copy of an expert, each view valid until the next. Raises CoterieError, naming the file."""
        for part in original.values():
            if part.coded:
                yield bytes_of(stored(part)).data
                continue
            for piece in part.pieces:
                yield from parts_of(piece)

    def check_sample(self, original: Record, packed: Record) -> None:
        """Raises InputError unless 4 KiB in the middle of every piece of an expert are the same in checkpoint and copy."""
        for name, part in original.items():
            start = packed[name].pieces[0].offset
            if part.coded:
                whole = bytes_of(stored(part))
                middle = (len(whole) - min(SAMPLE_BYTES, len(whole))) // 2
                found = bytes(whole[middle : middle + SAMPLE_BYTES])
                copy = Piece(packed[name].pieces[0].file, start + middle, len(found))
                check_same(found, _read(copy), part.pieces[0], part.pieces[0].offset, copy)
                continue
            for piece in part.pieces:
                length = min(SAMPLE_BYTES, piece.length)
                middle = (piece.length - length) // 2
                copy = Piece(packed[name].pieces[0].file, start + middle, length)
                found = _read(replace(piece, offset=piece.offset + middle, length=length))
                check_same(found, _read(copy), piece, piece.offset + middle, copy)
                start += piece.length


AS_STORED = AsStored()


@dataclass(frozen=True)
class Rounding(AsStored):
    """Weights of `products` in `format`, as `kernels/rounded.py` keeps them, biases as stored.

    transposed: the checkpoint has `[inputs, outputs]`; cpu: multiplied there. Data of all products come first, so that they
    begin where a block does; scales follow as NAME_scale, then what is not rounded.
    """

    format: str
    products: tuple[str, ...]
    transposed: bool
    cpu: bool

    def kept(self, shape: tuple[int, ...]) -> Kept:
        """How weights of this shape, as stored, are kept."""
        rows, columns = reversed(shape) if self.transposed else shape
        return Kept(self.format, rows, columns, self.cpu)

    def record(self, original: Record) -> Record:
        """As `AsStored`."""
        kept = {name: self.kept(original[name].shape) for name in self.products}
        data = {name: Part(one.data[1], one.data[0], ()) for name, one in kept.items()}
        scales = {scale_of(name): Part(torch.float32, one.scale, ()) for name, one in kept.items()}
        return {**data, **scales, **{name: part for name, part in original.items() if name not in kept}}

    def dtypes(self, original: Record, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """By part, in which it is multiplied or added in a model of `dtype`."""
        made = {name: part.dtype for name, part in self.record(original).items()}
        scales = {scale_of(name): self.kept(original[name].shape).scale_dtype(dtype) for name in self.products}
        return {**made, **{name: dtype for name in original if name not in self.products}, **scales}

    def fields(self, original: Record) -> dict[str, str]:
        """As `AsStored`."""
        orders = sorted({self.kept(original[name].shape).order for name in self.products} - {""})
        return {"quantise": self.format, "order": " ".join(orders)}

    def published(self, original: Record) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Data and scales of products that the checkpoint has in this format; they are not rounded again."""
        return {name: found for name in self.products if (found := self._exact(original[name])) is not None}

    def _exact(self, part: Part) -> tuple[torch.Tensor, torch.Tensor] | None:
        return kept_as_fp8(part.coded) if part.coded and self.format == "fp8" and not self.transposed else None

    def in_place(self, original: Record) -> Record | None:
        """The parts of a rounded expert where the checkpoint has them as they are kept, which published fp8 may; else None."""
        if any(part.coded for name, part in original.items() if name not in self.products):
            return None
        made = dict(self.record(original))
        for name in self.products:
            found = fp8_in_place(original[name].coded) if self.format == "fp8" and not self.transposed else None
            if found is None:
                return None
            for part, slices in zip((name, scale_of(name)), found, strict=True):
                pieces = (Piece(one.place.file, *at) for one in slices for at in one.ranges())
                made[part] = replace(made[part], dtype=slices[0].dtype, pieces=tuple(pieces))
        return made

    def made(
        self, plain: Mapping[str, torch.Tensor], original: Record,
        exact: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = MappingProxyType({}),
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """The parts of an expert by name, from its weights as stored, and of products in `exact` from data and scales.

        Raises InputError if weights are not finite.
        """
        made = dict(plain)
        for name, (data, scale) in exact.items():
            made |= {name: data, scale_of(name): scale}
        for name in [name for name in self.products if name not in exact]:
            weights = plain[name].T if self.transposed else plain[name]
            kept = self.kept(original[name].shape)
            made[name], made[scale_of(name)] = self._made(kept, weights, name, original[name])
        return {name: made[name].contiguous() for name in self.record(original)}

    def _made(self, kept: Kept, weights: torch.Tensor, name: str, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return kept.made(weights)
        except ValueError as error:
            where = "".join(f"{piece.file}: byte {piece.offset}: " for piece in part.pieces[:1])
            raise InputError(f"{where}{name} of an expert: {error}; fetch the checkpoint again") from error

    def views(self, original: Record) -> Iterator[memoryview]:
        """As `AsStored`."""
        exact = self.published(original)
        plain = {name: stored(part) for name, part in original.items() if name not in exact}
        for tensor in self.made(plain, original, exact).values():
            yield bytes_of(tensor).data

    def check_sample(self, original: Record, packed: Record) -> None:
        """Raises InputError unless 128 rows in the middle of every product, and all biases, are the same rounded again."""
        AS_STORED.check_sample({name: part for name, part in original.items() if name not in self.products}, packed)
        for name in self.products:
            kept, exact, piece = self.kept(original[name].shape), self._exact(original[name]), original[name].pieces[0]
            first = kept.rows // 2 // GROUP * GROUP
            last = min(first + GROUP, kept.rows)
            if exact is None:
                weights = stored(original[name])
                data, scale = self._made(kept, (weights.T if self.transposed else weights)[first:last], name, original[name])
            else:
                data, scale = exact[0][first:last], kept.scales_of(exact[1], first, last)
            row = packed[name].length // kept.rows
            copy = Piece(packed[name].pieces[0].file, packed[name].pieces[0].offset + first * row, (last - first) * row)
            check_same(bytes(bytes_of(data.contiguous())), _read(copy), piece, piece.offset, copy)
            copied = kept.scales_of(stored(packed[scale_of(name)]), first, last)
            found, expected = (bytes(bytes_of(values.contiguous())) for values in (scale, copied))
            check_same(found, expected, piece, piece.offset, packed[scale_of(name)].pieces[0])


def scale_of(name: str) -> str:
    """What the scales of a product's weights are called."""
    return f"{name}_scale"


def stored(part: Part) -> torch.Tensor:
    """A parameter of an expert, read from its file."""
    if part.coded:
        return torch.cat([one.read().view(-1, *part.shape[1:]) for one in part.coded])
    raw, done = np.empty(part.length, dtype=np.uint8), 0
    for piece in part.pieces:
        for view in parts_of(piece):
            raw[done : done + len(view)] = view
            done += len(view)
    return torch.from_numpy(raw).view(part.dtype).view(part.shape)


def check_fields(path: Path, found: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    """Raises InputError unless index or journal say what is expected of it. path: their file."""
    wants = f"--quantise {expected['quantise']}" if "quantise" in expected else "no --quantise"
    ways = {
        "quantise": f"give the --quantise that it was packed with, or pack into another folder with {wants}",
        "order": "the weights lie in an order of another processor; pack on this machine, into another folder, with "
        "CUDA_VISIBLE_DEVICES= where there is a GPU and they are for the CPU",
    }
    for field, way in ways.items():
        is_, wanted = str(found.get(field) or "none")[:60], expected.get(field) or "none"
        if is_ != wanted:
            raise InputError(f"{path}: {field}: found {is_}, expected {wanted}: {way}")


def check_same(found: bytes, expected: bytes, piece: Piece, offset: int, copy: Piece) -> None:
    """Raises InputError unless what the checkpoint has at `offset` is what the copy has."""
    if found != expected:
        raise InputError(
            f"{piece.file}: byte {offset}: found {found[:8].hex()}..., expected {expected[:8].hex()}... "
            f"as at byte {copy.offset} of {copy.file}: the checkpoint is another or has changed since it was packed; "
            f"remove {copy.file.parent} and pack again"
        )


def _read(piece: Piece) -> bytes:
    return b"".join(map(bytes, parts_of(piece)))


def parts_of(piece: Piece) -> Iterator[memoryview]:
    """The bytes in order, at most 4 MiB at a time, each part valid until the next. Raises CoterieError, naming the file."""
    view, done = memoryview(bytearray(min(piece.length, PART_BYTES))), 0
    try:
        descriptor = os.open(piece.file, os.O_RDONLY)
        try:
            while done < piece.length:
                got = os.preadv(descriptor, [view[: piece.length - done]], piece.offset + done)
                if got == 0:
                    raise CoterieError(f"{piece.file}: ends at byte {piece.offset + done}, expected {piece.length - done} more")
                done += got
                yield view[:got]
            leave_cache(descriptor, piece.offset, piece.length)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CoterieError(f"{piece.file}: cannot be read: {error.strerror}") from error


def leave_cache(descriptor: int, offset: int, length: int) -> None:
    """Let the system's cache of files forget what is read or written once."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
