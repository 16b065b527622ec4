"""Reading and writing files so that nothing is ever half-written and every failure names the file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coterie.routing.errors import CoterieError, InputError


@contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name if the block ends well, and is removed otherwise.

    Raises InputError if the folder does not exist or cannot be written; leaves an existing `path` as it was.
    """
    check_writable(path)
    path = path.resolve()  # a link stays a link: what it points to is replaced
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        onto_disk(temporary)
        temporary.replace(path)
        onto_disk(path.parent)
    except OSError as error:
        raise CoterieError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def onto_disk(path: Path) -> None:
    """Wait until a file, or what a folder lists, outlives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a folder on a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


def check_writable(path: Path, *read: Path | str | None) -> None:
    """Raises InputError now if `path` cannot be written later: before hours of work, not after.

    read: what is read to make it; names that are no files of this machine are passed over.
    """
    for other in read:
        if other is not None and path.exists() and Path(other).exists() and path.samefile(other):
            raise InputError(f"{path}: would be written over an input, which is also read; give another name")
    if path.is_symlink():
        path = path.resolve()
    folder = path.parent
    if not path.name or path.is_dir():
        raise InputError(f"{path}: is a folder; give a file name")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is no regular file and would be replaced by one; give another name")
    if not folder.is_dir():
        raise InputError(f"{path}: the folder {folder} does not exist; create it first")
    try:
        probe = folder / f".{path.name}.{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def files_of(folder: Path | str | None) -> list[Path]:
    """The files in a folder; none if it is not one, such as a model's name."""
    path = None if folder is None else Path(folder)
    return [] if path is None or not path.is_dir() else [file for file in sorted(path.iterdir()) if file.is_file()]


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_output(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; InputError if it is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no text (a trace?), expected JSON") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON: {str(error)[:200]}") from error


def looks_like_json(path: Path) -> bool:
    """By its first bytes, of an object; safetensors begin with the length of a header that is one."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40
    return not safetensors and head.lstrip()[:1] == b"{"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
