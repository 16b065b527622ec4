"""Memory as a limit: experts of any size on ranks of any size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from coterie.placement.problem import Limit
from coterie.placement.topology import Topology
from coterie.routing.errors import InputError


def open_slots(topology: Topology, layers: int, experts: int, slots: int) -> NDArray[np.int64]:
    """The slots of every rank that memory lets be used, int64 `[layers, ranks]`, at most `slots`; raises as `memory_limit`."""
    limit = memory_limit(topology, layers, experts, slots)
    if limit is None:
        return np.full((layers, topology.ranks), slots)
    return np.asarray(np.round(limit.caps / limit.weights[:, :1]), dtype=np.int64)


def memory_limit(topology: Topology, layers: int, experts: int, slots: int) -> Limit | None:
    """The most bytes of experts that a rank may hold in each layer; None where memory cannot bind or sizes are not known.

    A rank's memory is shared out over the layers in proportion to their bytes, whole experts at a time, what is left over in
    one layer going to the next. Raises InputError if all experts together do not fit, saying by how many bytes.
    """
    size = topology.bytes_of_experts(layers)
    memory = np.broadcast_to(np.asarray(topology.memory_bytes, dtype=np.float64), (topology.ranks,))
    if not size.all() or (size.sum() * slots <= memory).all():
        return None
    room = whole_experts(size, memory, slots, experts)
    short = experts - room.sum(1)
    if (short > 0).any():
        missing = float((np.maximum(short, 0) * size).sum())
        whole = " as far as was found, experts staying whole" if size.sum() * experts <= memory.sum() else ""
        raise InputError(
            f"topology: memory_bytes: the experts need {size.sum() * experts:.0f} bytes in all, the ranks hold "
            f"{memory.sum():.0f}: {missing:.0f} bytes of experts have no place{whole}; give more ranks or more memory"
        )
    weights = np.repeat(size[:, None], experts, axis=1)
    return Limit(weights, room * size[:, None], memory=True)


def whole_experts(size: NDArray[np.float64], memory: NDArray[np.float64], slots: int, experts: int) -> NDArray[np.int64]:
    """How many experts of each layer a rank has room for, int64 `[layers, ranks]`; size `[layers]`, memory `[ranks]`.

    Where shares leave a layer short, no layer gets more room than it needs.
    """
    room = _shared(size, memory, slots, experts)
    return room if (room.sum(1) >= experts).all() else _tightest(size, memory, slots, experts)


def _tightest(size: NDArray[np.float64], memory: NDArray[np.float64], slots: int, experts: int) -> NDArray[np.int64]:
    """Room for exactly `experts` of each layer, largest layers first, one by one where most memory is left."""
    room = np.zeros((len(size), len(memory)), dtype=np.int64)
    left = memory.astype(np.float64)
    for layer in np.argsort(-size, kind="stable"):
        for _ in range(experts):
            free = np.where(room[layer] < slots, left, -1.0)
            rank = int(free.argmax())
            if free[rank] < size[layer]:
                break
            room[layer, rank] += 1
            left[rank] -= size[layer]
    return room


def _shared(size: NDArray[np.float64], memory: NDArray[np.float64], slots: int, experts: int) -> NDArray[np.int64]:
    """Every layer's share of each rank's memory, in proportion to its bytes, shortages made up for where most is left."""
    room = np.zeros((len(size), len(memory)), dtype=np.int64)
    used = np.zeros(len(memory))
    share = np.cumsum(size) / size.sum()
    for layer, bytes_each in enumerate(size):
        fits = np.floor((memory * share[layer] - used) / bytes_each + 1e-9).astype(np.int64)
        room[layer] = np.clip(fits, 0, slots)
        short = experts - room[layer].sum()
        for rank in np.argsort(used - memory, kind="stable"):  # most memory left first
            if short <= 0:
                break
            left = int((memory[rank] - used[rank]) // bytes_each)
            extra = int(min(short, max(0, min(slots, left) - room[layer, rank])))
            room[layer, rank] += extra
            short -= extra
        used += room[layer] * bytes_each
    return room
