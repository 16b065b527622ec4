"""`--trace-events F`: what every rank did when, for chrome://tracing or Perfetto, and what went over which link.

The file is Chrome's trace-event format, a lane per rank; the sums are under `coterie` beside the events, for `coterie show`.
"""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.routing.errors import InputError
from coterie.routing.files import read_json, write_text

if TYPE_CHECKING:
    from coterie.moe.collectives import Group
    from coterie.offload.cache import ExpertCache


SAMPLED = 5  # numbers of a `Sample`


@dataclass(frozen=True)
class Sums:
    """Of a whole run. bytes: `[ranks][ranks]`, from rank to rank; rows_by_layer: `[ranks][layers]`, sent by each rank.

    seconds: by rank, what it spent in collectives (sending, and waiting for others) and in its experts; hosts: by rank.
    cache: by rank the steps of its cache of experts (`offload/cache.py` Sample), or None where all experts are in memory.
    """

    hosts: list[str]
    bytes: list[list[int]]
    rows_by_layer: list[list[int]]
    communication_seconds: list[float]
    experts_seconds: list[float]
    cache: list[list[list[float]]] | None = None


def begin(group: Group, cache: ExpertCache | None) -> None:
    """Record events from now on."""
    group.traffic.events = []
    if cache is not None:
        cache.samples = []


def write(path: Path, group: Group, layers: int, cache: ExpertCache | None) -> Sums | None:
    """Gather all ranks' events and sums; rank 0 writes the file and returns the sums. Every rank must call it."""
    traffic = group.traffic
    mine = (
        socket.gethostname(), [traffic.bytes_to[r] for r in range(group.size)],
        [traffic.rows_by_layer[layer] for layer in range(layers)], traffic.exchanging() + traffic.seconds["agree"],
        traffic.seconds["experts"], [(e.name, e.start, e.seconds, e.layer) for e in traffic.events or []],
        None if cache is None else [list(sample) for sample in cache.samples or []],
    )  # fmt: skip
    gathered = group.gather(mine)
    if group.rank != 0:
        return None
    sums = Sums(*(list(column) for column in zip(*(said[:5] for said in gathered), strict=True)))
    if cache is not None:
        sums = replace(sums, cache=[said[6] for said in gathered])
    events = [event for rank, said in enumerate(gathered) for event in _lane(rank, said[0], said[5])]
    write_text(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "coterie": asdict(sums)}))
    return sums


def _lane(rank: int, host: str, events: list[tuple[str, float, float, int]]) -> list[dict[str, Any]]:
    """One rank's events in the file's format: microseconds, complete events ("X"), and the lane's name ("M")."""
    name = {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank} ({host})"}}
    return [name] + [
        {"name": what, "ph": "X", "pid": 0, "tid": rank, "ts": start * 1e6, "dur": seconds * 1e6, "args": {"layer": layer}}
        for what, start, seconds, layer in events
    ]


def describe(sums: Sums, seconds: float) -> str:
    """For people, a line: what went over the links, the busiest one, and how long ranks waited."""
    if len(sums.hosts) == 1:
        return f"experts: {100 * sums.experts_seconds[0] / seconds:.0f}% of the time"
    sent = np.array(sums.bytes)
    source, to = np.unravel_index(sent.argmax(), sent.shape)
    waited = [100 * s / seconds for s in sums.communication_seconds]
    return (
        f"links: {sent.sum() / 1e6:.1f} MB, most from rank {source} to {to} ({sent.max() / 1e6:.1f} MB); the busiest rank gets "
        f"{sent.sum(0).max() / max(sent.sum(0).mean(), 1):.2f} times the mean; "
        f"ranks communicate {min(waited):.0f} to {max(waited):.0f}% of the time"
    )


def read(path: Path) -> Sums | None:
    """The sums in a timeline file, None for JSON of another kind. Raises InputError if they are not as written."""
    value = read_json(path)
    if not isinstance(value, dict) or "traceEvents" not in value:
        return None
    try:
        sums = Sums(**value["coterie"])
        ranks = len(sums.hosts)
        shapes = [np.array(sums.bytes, dtype=float).shape, np.array(sums.rows_by_layer, dtype=float).shape[:1]]
        steps = [np.array(one or np.zeros((0, SAMPLED)), dtype=float).shape[1:] for one in sums.cache or []]
        if steps not in ([], [(SAMPLED,)] * ranks):
            raise ValueError(f"a cache of {steps} for {ranks} ranks")
        if shapes != [(ranks, ranks), (ranks,)] or len(sums.communication_seconds) != ranks:
            raise ValueError(f"{shapes} for {ranks} ranks")
    except (KeyError, TypeError, ValueError) as error:
        what = "no such field" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path}: coterie: found {what}, expected what generate --trace-events writes") from error
    return sums
