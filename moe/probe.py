"""What the links between the ranks give, measured by a few all-to-alls when a job starts, and remembered for a day."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from coterie.moe.choose import Links
from coterie.moe.collectives import Group
from coterie.placement.topology import Link
from coterie.routing.errors import CoterieError
from coterie.routing.files import write_text

SMALL, LARGE = 64, 1 << 24  # bytes to each other rank
REPEATS = 7
METHOD = "2"  # of measuring: what another one has kept is measured again
ENOUGH = 8  # times the latency: then the bytes dominate
MAX_AGE = 86_400.0
FREE = (1 << 10, 1 << 20)  # least and most padding that is taken to be free


def measure(group: Group, remember: bool = True) -> Links:
    """The links of the group, the same figures on all ranks; takes a fraction of a second. remember: use and keep a file."""
    names = group.gather(socket.gethostname())
    file = _file([*names, group.transport_name, str(group.ranks_per_node), METHOD])
    known = group.gather(_read(file) if remember and group.rank == 0 else None)[0]
    if known is None:
        known = _measured(group)
        if remember and group.rank == 0:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, json.dumps(known))
            except (OSError, CoterieError) as error:
                told = f"{file}: the measured links cannot be kept ({error}); the next job measures them again"
                warnings.warn(told, RuntimeWarning, stacklevel=2)
    return Links(Link(*known["within"]), Link(*known["between"]))


def free_bytes(links: Links, group: Group) -> int:
    """Bytes per rank that take no longer than one more collective would."""
    within, between = links.within, links.between
    free = within.bytes_per_second * within.latency_seconds
    if group.nodes > 1:
        free = min(free, between.bytes_per_second * between.latency_seconds / group.ranks_per_node)
    return int(min(max(free, FREE[0]), FREE[1]))


def dense_seconds_per_weight(device: torch.device, dtype: torch.dtype, group: Group) -> float:
    """Of one token and one weight of a dense layer, on the slowest rank."""
    side, tokens, queued = (4096, 512, 16) if device.type == "cuda" else (1024, 32, 1)  # a launch must not be what is timed
    weight, x = torch.ones(side, side, dtype=dtype, device=device), torch.ones(tokens, side, dtype=dtype, device=device)
    times = []
    for _ in range(REPEATS):
        finish(device)
        started = time.perf_counter()
        for _ in range(queued):
            F.linear(x, weight)
        finish(device)
        times.append((time.perf_counter() - started) / queued)
    slowest = max(ns for (ns,) in group.agree([int(statistics.median(times) * 1e9)]))
    return slowest / 1e9 / weight.numel() / len(x)


def finish(device: torch.device) -> None:
    """Wait for all that a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measured(group: Group) -> dict[str, Any]:
    width = group.ranks_per_node
    first = group.rank // width * width
    inside = [r for r in range(group.size) if first <= r < first + width]
    outside = [r for r in range(group.size) if r not in inside]
    between = _link(group, outside, width) if group.nodes > 1 else None
    within = _link(group, inside, 1) if width > 1 else between
    return {"within": within or between, "between": between or within}


def _link(group: Group, to: Sequence[int], sharing: int) -> tuple[float, float]:
    """(bytes per second, latency) of all-to-alls with the ranks `to`; sharing: ranks whose bytes go over one link."""
    latency = _seconds(group, to, SMALL)
    size = SMALL << 8
    while True:
        took = _seconds(group, to, size)
        if took > ENOUGH * latency or size >= LARGE:
            others = len([r for r in to if r != group.rank])
            return sharing * others * size / max(took - latency, took / ENOUGH), latency
        size *= 4


def _seconds(group: Group, to: Sequence[int], size: int) -> float:
    """Median seconds of an all-to-all of `size` bytes to each of `to`; that of the slowest rank."""
    send = [int(r in to and r != group.rank) for r in range(group.size)]
    rows = torch.zeros((sum(send), size), dtype=torch.uint8, device=group.device)
    out, times = torch.empty_like(rows), []
    for _ in range(REPEATS):
        group.agree([0])
        finish(group.device)
        started = time.perf_counter()
        group.raw_all_to_all(out, rows, send, send)
        finish(group.device)  # NCCL only queues it
        times.append(time.perf_counter() - started)
    return max(ns for (ns,) in group.agree([int(statistics.median(times) * 1e9)])) / 1e9


def _file(parts: Sequence[str]) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "coterie" / f"links-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}.json"


def _read(file: Path) -> dict[str, Any] | None:
    """What was measured here within a day; a file that is not ours is measured again."""
    try:
        if time.time() - file.stat().st_mtime > MAX_AGE:
            return None
        found = json.loads(file.read_text())
        return found if all(len(found[k]) == 2 and min(found[k]) > 0 for k in ("within", "between")) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
