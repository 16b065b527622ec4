"""The placements that need no optimisation: what a plan has to beat, and where a search may start."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Assignment = NDArray[np.int64]  # the rank of every expert, [layers, E]


def contiguous(load: NDArray[np.float64], ranks: int) -> Assignment:
    """Experts in order, as even as can be: what every engine does by default. load `[layers, E]` gives the sizes only."""
    layers, experts = load.shape
    return np.tile(np.arange(experts) * ranks // experts, (layers, 1))


def round_robin(load: NDArray[np.float64], ranks: int) -> Assignment:
    """Expert e on rank e modulo ranks. load `[layers, E]` gives the sizes only."""
    layers, experts = load.shape
    return np.tile(np.arange(experts) % ranks, (layers, 1))


def packed(load: NDArray[np.float64], ranks: int) -> Assignment:
    """Balanced packing, as EPLB does it: heaviest expert first, to the lightest rank that has a slot free.

    load: float64 `[layers, E]`. Every rank gets at most ceil(E / ranks) experts.
    """
    layers, experts = load.shape
    slots = -(-experts // ranks)
    assignment = np.empty((layers, experts), dtype=np.int64)
    for layer in range(layers):
        weight, count = np.zeros(ranks), np.zeros(ranks, dtype=np.int64)
        for expert in np.argsort(-load[layer], kind="stable"):
            rank = int(np.where(count < slots, weight, np.inf).argmin())
            assignment[layer, expert] = rank
            weight[rank] += load[layer, expert]
            count[rank] += 1
    return assignment


BASELINES: dict[str, Callable[[NDArray[np.float64], int], Assignment]] = {
    "contiguous": contiguous,
    "round_robin": round_robin,
    "packed": packed,
}
