"""What every rank of a job must have found alike before it loads: the model, the plan, the prompts, the arguments."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from coterie.routing.errors import InputError
from coterie.routing.files import sha256

SAMPLE_BYTES = 1 << 16
OWN = ("out", "json", "debug")  # arguments in which ranks may differ


def found_here(options: argparse.Namespace) -> dict[str, str]:
    """Digests of what `generate` was given, by what the user calls it."""
    found = {f"{options.model}: the checkpoint": checkpoint_digest(options.model)}
    given = [path for path in (options.plan, options.prompts, options.prior) if path is not None]
    if options.replan not in (None, "auto") and Path(options.replan).is_file():  # else refused later, with what it may be
        given.append(Path(options.replan))
    found |= {str(path): sha256(path)[:16] for path in given}
    arguments = {name: str(value) for name, value in vars(options).items() if name not in OWN}
    found["the arguments"] = _short(json.dumps(arguments, sort_keys=True).encode())
    return found


def checkpoint_digest(model: str) -> str:
    """Of the configuration, the headers of all shards, and a sample from the middle of each: not of all weights."""
    from coterie.moe.families import resolve_model
    from coterie.offload.checkpoint import Checkpoint

    _, folder = resolve_model(model)
    checkpoint = Checkpoint.open(folder)
    tensors = checkpoint.tensors
    places = sorted((n, p.file.name, p.offset, p.length, str(p.dtype), list(p.shape)) for n, p in tensors.items())
    samples = [_sample(file) for file in checkpoint.files]
    return _short(_read(folder / "config.json"), json.dumps(places).encode(), *samples)


def _sample(file: Path) -> bytes:
    with file.open("rb") as opened:
        opened.seek(file.stat().st_size // 2)
        return opened.read(SAMPLE_BYTES)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


def _short(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
