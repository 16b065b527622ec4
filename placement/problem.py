"""One placement problem without replicas: what the search, the dynamic program, the integer program and the bounds share.

Costs are in (token, ...) counts, not means, so that they stay integers in float64; `scale` turns them into what
`evaluate` prints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.placement.baselines import Assignment, contiguous, packed
from coterie.routing.affinity import Affinity
from coterie.routing.errors import InputError

DEFAULT_MAX_LOAD = 1.1
MARGIN = 1 / 3  # of what contiguous placement is above even: other text is loaded a little differently


@dataclass(frozen=True)
class Problem:
    """Place the E experts of each of L layers on `ranks` ranks, at most `slots` on each.

    load: float64 `[L, E]`; caps: float64 `[L]`, the most load a rank may carry.
    transitions: float64 `[L-1, E, E]`, what is paid if the pair is apart (hops), else None.
    members: bool `[patterns, E]` and prices: float64 `[patterns, ranks]`, per layer: what is paid if the rank hosts any
    expert of the pattern (dispatch), else None.
    """

    ranks: int
    slots: int
    load: NDArray[np.float64]
    caps: NDArray[np.float64]
    scale: float
    transitions: NDArray[np.float64] | None = None
    members: tuple[NDArray[np.bool_], ...] = ()
    prices: tuple[NDArray[np.float64], ...] = ()

    @property
    def layers(self) -> int:
        """L."""
        return int(self.load.shape[0])

    @property
    def experts(self) -> int:
        """E."""
        return int(self.load.shape[1])

    def cost(self, assignment: Assignment) -> float:
        """The objective, in counts, of the rank of every expert `[L, E]`."""
        if self.transitions is not None:
            apart = assignment[:-1, :, None] != assignment[1:, None, :]
            return float((self.transitions * apart).sum())
        return float(sum(self.layer_cost(layer, assignment[layer]) for layer in range(self.layers)))

    def layer_cost(self, layer: int, ranks_of: NDArray[np.int64]) -> float:
        """The dispatch cost of one layer; ranks_of `[E]`."""
        hosts = self.members[layer].astype(np.int64) @ one_hot(ranks_of, self.ranks) > 0
        return float((self.prices[layer] * hosts).sum())

    def feasible(self, assignment: Assignment) -> bool:
        """Whether every rank keeps to its slots and to the load cap."""
        hosts = one_hot(assignment, self.ranks)
        fits = hosts.sum(1).max() <= self.slots
        carried = np.einsum("le,ler->lr", self.load, hosts)
        return bool(fits and (carried.max(1) <= self.caps * (1 + 1e-9)).all())


def one_hot(assignment: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """int64 `[..., E, ranks]` from the rank of every expert `[..., E]`."""
    return np.asarray(assignment[..., None] == np.arange(ranks), dtype=np.int64)


def hops_problem(affinity: Affinity, ranks: int, slots: int, caps: NDArray[np.float64]) -> Problem:
    """Consecutive-layer pairs on different ranks (ExFlow)."""
    total = affinity.transitions.sum()
    scale = 1 / total if total else 1.0
    return Problem(ranks, slots, affinity.load, caps, scale, transitions=affinity.transitions)


def dispatch_problem(affinity: Affinity, ranks: int, slots: int, caps: NDArray[np.float64], known_homes: bool) -> Problem:
    """Distinct destination ranks per token, home left out: every home equally likely, or the homes of the trace.

    With known homes the patterns of `affinity` must carry `by_home`.
    """
    prices = []
    for p in affinity.patterns:
        if known_homes and p.by_home is not None:
            prices.append(p.weight[:, None] - p.by_home)
        else:
            prices.append(np.tile(p.weight[:, None] * (1 - 1 / ranks), (1, ranks)))
    scale = 1 / (affinity.tokens * len(affinity.patterns))
    members = tuple(p.experts for p in affinity.patterns)
    return Problem(ranks, slots, affinity.load, caps, scale, members=members, prices=tuple(prices))


def load_caps(load: NDArray[np.float64], ranks: int, slots: int, max_load: float | None) -> NDArray[np.float64]:
    """The most load a rank may carry, float64 `[L]`, for a cap relative to the mean.

    Without `max_load`: 1.1, or a third as far above even as contiguous placement if that is less, or in a layer with an
    expert too hot for that, what balanced packing reaches.
    Raises InputError if `max_load` is below what packing with swaps reaches, saying what it does.
    """
    mean = load.sum(1) / ranks
    reached = np.array([balanced_peak(row, ranks, slots) for row in load])
    if max_load is None:
        unplanned = np.einsum("le,ler->lr", load, one_hot(contiguous(load, ranks), ranks)).max(1)
        return np.asarray(np.maximum(np.minimum(DEFAULT_MAX_LOAD * mean, mean + MARGIN * (unplanned - mean)), reached))
    caps = max_load * mean
    if (reached > caps * (1 + 1e-9)).any():
        worst = float((reached / np.where(mean > 0, mean, 1)).max())
        raise InputError(
            f"--max-load: found {max_load:g}, but the evenest packing found of one layer has {worst:.4f}; give that or more"
        )
    return np.asarray(caps)


def balanced_peak(load: NDArray[np.float64], ranks: int, slots: int) -> float:
    """The busiest rank's load after balanced packing into `slots` and improving swaps; load `[E]`. Not always the least."""
    padded = np.pad(load, (0, ranks * slots - len(load)))
    return balance(packed(padded[None], ranks)[0], padded, ranks, 0.0)


def balance(here: NDArray[np.int64], load: NDArray[np.float64], ranks: int, cap: float) -> float:
    """Swap experts of the busiest rank, in place, until it carries at most `cap` or no swap helps; returns its load.

    here: the rank of every expert `[E]`; load `[E]`.
    """
    while True:
        carried = np.bincount(here, weights=load, minlength=ranks)
        peak = int(carried.argmax())
        inside, outside = np.flatnonzero(here == peak), np.flatnonzero(here != peak)
        if carried[peak] <= cap * (1 + 1e-9) or not len(outside):
            return float(carried[peak])
        change = load[outside][None, :] - load[inside][:, None]
        after = np.maximum(carried[peak] + change, carried[here[outside]][None, :] - change)
        i, o = np.unravel_index(after.argmin(), after.shape)
        if after[i, o] >= carried[peak] - 1e-9:
            return float(carried[peak])
        here[inside[i]], here[outside[o]] = here[outside[o]], here[inside[i]]
