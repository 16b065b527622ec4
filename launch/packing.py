"""`coterie pack`: the experts of a checkpoint once more, one run of bytes each (docs/offload.md)."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from coterie.launch.commands import say
from coterie.launch.quiet import quiet_transformers

if TYPE_CHECKING:
    from coterie.offload.pack import Contents


def pack(options: argparse.Namespace) -> dict[str, Any]:
    """Write the sidecar, go on with one, or check one."""
    from tqdm import tqdm

    quiet_transformers()
    from coterie.offload import pack as packer
    from coterie.offload.sidecar import aligned, length_of

    started, found = time.perf_counter(), contents_of(options.model, options.quantise)
    whole = sum(aligned(length_of(record)) for layer in found.kept for record in layer)
    doing, do = ("verify", packer.verify) if options.verify else ("pack", packer.pack)
    with tqdm(desc=doing, total=whole, unit="B", unit_scale=True, disable=None) as bar:
        done = do(found, options.out, bar.update)
    seconds = time.perf_counter() - started
    there = "all of it is right" if options.verify else f"{done.resumed_bytes / 1e6:,.1f} MB were there already"
    say(
        f"{options.out}: {done.experts} experts, {done.bytes / 1e6:,.1f} MB in {done.files} files, {seconds:.1f} s; {there}; "
        f"use it with generate --memory SIZE --packed {options.out}{_quantise(options)}"
    )
    return {"out": str(options.out), **asdict(done), "seconds": seconds}


def _quantise(options: argparse.Namespace) -> str:
    return "" if options.quantise is None else f" --quantise {options.quantise}"


def contents_of(model: str, quantise: str | None = None) -> Contents:
    """What there is to be packed of MODEL, rounded to a format so as this machine's GPU, or its processor, multiplies it."""
    import torch

    from coterie.moe.cached import index_experts
    from coterie.moe.families import inspect
    from coterie.moe.quantise import rounding_of
    from coterie.offload.checkpoint import Checkpoint
    from coterie.offload.copies import AS_STORED
    from coterie.offload.pack import Contents

    shape, empty = inspect(model)
    checkpoint = Checkpoint.open(shape.folder)
    store = index_experts(shape, empty, checkpoint)
    store.close()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = AS_STORED if quantise is None else rounding_of(empty, quantise, device)
    return Contents(shape.name, checkpoint, shape.layer_ids, store.records, how)
